"""The room's methods are in the registry, give edits that install, save and load in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import find_method
from tests.core.families import BY_NAME
from tests.core.test_trace import model, text  # noqa: F401  (a fixture)

TEXTS = [text(40, i) for i in range(12)]
CASES = {
    "ppl-p-sparsity": {"p": 5.0, "tokens": 400, "context": 32},
    "layer-skip": {"budget": 1, "tokens": 300, "context": 32},
    "lac": {"alpha": 0.5, "mode": "skip"},
}


@pytest.mark.parametrize("name", CASES)
def test_fit_save_load_elsewhere(model, name: str, tmp_path: Path) -> None:  # noqa: F811
    info = find_method(name)
    assert info.room == "sparsity" and info.papers
    arguments = (model,) if info.data == "none" else (model, TEXTS)
    edit = info.fit(*arguments, **CASES[name])
    before = model.logits(TEXTS[0])
    with model.edit(edit):
        after = model.logits(TEXTS[0])
    assert float((after - before).abs().max()) > 1e-4
    edit.save(tmp_path / "e", model)
    with model.edit(Edit.load(tmp_path / "e", model)):
        again = model.logits(TEXTS[0])
    assert bool((again == after).all())
    code = f"from actlas.core.edit import Edit; print(Edit.load({str(tmp_path / 'e')!r}).describe())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == edit.describe()


def test_bad_options_are_refused(model) -> None:  # noqa: F811
    with pytest.raises(InputError, match="must be 'readout' or 'skip'"):
        find_method("lac").fit(model, mode="jump")
    with pytest.raises(InputError):
        find_method("layer-skip").fit(BY_NAME["llama"].model(), ["w1"], budget=99)
