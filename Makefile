# make card    set up a virtual environment, measure the bundled model and write its card
# make test    set up the development environment and run the tests
# make slow    the slow tests too (they download the bundled models)
# make lint    ruff, formatting, types
# make bench   the benchmarks of bench/ (bench-kernels, bench-decode: some of them)
# make docs    the documentation site, in site/
#
# Variables: PYTHON=python3.12 (3.10 or newer), VENV=.venv, MODEL=smollm2, OUT=card

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= smollm2
OUT    ?= card

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PROJECT := pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE
SOURCES := $(shell find src -type f ! -name '*.pyc' ! -name '*.so' 2>/dev/null)

.PHONY: card test slow lint bench bench-kernels bench-decode docs clean

card: $(VENV)/.installed
	$(BIN)/actlas card $(MODEL) --out $(OUT)
	@echo "The card: $(abspath $(OUT))/card.html (also card.md and card.json)"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench

bench-kernels: $(VENV)/.installed-dev
	$(BIN)/python -m bench kernels columns

bench-decode: $(VENV)/.installed-dev
	$(BIN)/python -m bench decode

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet
	@echo "The site: $(abspath site)/index.html"

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The environment is made once; what follows is installed again when the project or its sources change.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else "Actlas needs Python 3.10 or newer, and $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The libraries change rarely and are large, so they have a stamp of their own.
$(VENV)/.installed: $(VENV)/.created $(PROJECT) $(SOURCES)
	@echo "Installing Actlas and what it needs into $(VENV) (some minutes the first time) ..."
	$(PIP) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(PROJECT) $(SOURCES)
	@echo "Installing Actlas and the development tools into $(VENV) (some minutes the first time) ..."
	$(PIP) '.[dev]'
	@touch $@ $(VENV)/.installed
