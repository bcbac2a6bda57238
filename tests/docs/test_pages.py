"""The documentation is true: its Python runs, its commands exist, its excerpts are in the tree."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from actlas.cli.main import COMMANDS
from actlas.core.methods import find_method
from actlas.dictionaries.sae import ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_MODEL = {"kernels.md", "data.md"}  # the others load a bundled model


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__docs__"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, Python block {number}", "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name in WITHOUT_MODEL], ids=lambda p: p.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(page, "python")
    run_page(page, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in WITHOUT_MODEL and blocks(p, "python")], ids=lambda p: p.name
)
def test_python_of_a_page_runs_on_the_bundled_model(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, tmp_path, monkeypatch)
    assert not any(path.suffix == ".tmp" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_options_of_a_page_exist(page: Path) -> None:
    for line in "\n".join(blocks(page, "(?:sh|bash|console)")).splitlines():
        words = shlex.split(line, comments=True)
        if len(words) < 2 or words[0] != "actlas" or words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, f"{page.name}: {line}"
        known = options(words[1])
        if words[1] == "fit":
            info = find_method(words[2])
            kinds = {f.name for kind in ARCHITECTURES.values() for f in fields(kind)} if info.open else set()
            known |= {"--" + name.replace("_", "-") for name in {*info.options, *kinds}}
        for word in words[2:]:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in known, f"{page.name}: {line}"


def options(command: str) -> set[str]:
    app = importlib.import_module(f"actlas.cli.{command}").app
    parameters = typer.main.get_command(app).params
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_worked_example_of_contributing_is_in_the_tree() -> None:
    source = (ROOT / "src/actlas/core/probe.py").read_text(encoding="utf-8")
    excerpts = blocks(ROOT / "CONTRIBUTING.md", "python")
    assert excerpts
    for excerpt in excerpts:
        for part in excerpt.split("...\n"):
            assert part.strip("\n") in source
