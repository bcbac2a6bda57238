"""`actlas evaluate`: a saved dictionary against its controls, two dictionaries, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from actlas.cli.main import COMMANDS

SITE = "blocks.1.resid_post"


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setitem(COMMANDS, "evaluate", "Judge a dictionary, beside untrained ones of equal size.")


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = "the cat sat on the mat and the dog ran to the house"
    file = tmp_path / "text.jsonl"
    file.write_text("".join(f'{{"text": "{words} {i} times"}}\n' for i in range(30)), encoding="utf-8")
    return str(file)


def saved(folder: Path, model: str, seed: int = 0, d: int = 32) -> str:
    from actlas.dictionaries.evaluation import UnitDirections
    from actlas.models import load

    g = torch.Generator().manual_seed(seed)
    unit = F.normalize(torch.randn(40, d, generator=g), dim=1)
    lens = UnitDirections(site=SITE, directions=unit, centre=torch.zeros(d), k=4)
    return str(lens.save(folder, load(model)))


def test_a_dictionary_stands_beside_its_controls(actlas, tiny, text, tmp_path):
    path = saved(tmp_path / "lens", tiny)
    said = actlas("evaluate", path, tiny, text, "--tokens", 200, "--json")
    assert said.status == 0, said.err
    document = said.json
    names = {(m["name"], m["group"].get("dictionary")) for m in document["measurements"]}
    for name in ("explained_variance", "l0", "ce_loss_score", "dead_fraction"):
        assert {(name, d) for d in ("evaluated", "random atoms", "random directions")} <= names
    assert ("explained_variance over random atoms", None) in names
    assert (
        document["parts"] == ["core", "behaviour"]
        and "UnitDirections of 40 features" in document["dictionary"]
    )
    alone = actlas("evaluate", path, tiny, text, "--tokens", 200, "--no-controls", "--part", "core")
    assert alone.status == 0 and "explained_variance" in alone.out and "random" not in alone.out


def test_two_dictionaries_are_compared(actlas, tiny, tmp_path):
    one, other = saved(tmp_path / "a", tiny), saved(tmp_path / "b", tiny, seed=1)
    said = actlas("evaluate", one, "--against", one, "--json")
    mmcs = [m["value"] for m in said.json["measurements"] if m["name"] == "mmcs"]
    assert mmcs[0] == pytest.approx(1, abs=1e-5) and mmcs[1] < 0.9
    assert "mmcs" in actlas("evaluate", one, "--against", other).out


def test_bad_input(actlas, tiny, wider, text, vector, tmp_path):
    path = saved(tmp_path / "lens", tiny)
    assert "there is no part 'cores'" in actlas("evaluate", path, tiny, text, "--part", "cores").failed()
    actlas("evaluate", tmp_path / "nowhere", tiny, text).failed()
    actlas("evaluate", vector, tiny, text).failed()
    assert "d_model 32 and 48" in actlas("evaluate", path, wider, text).failed()
    from actlas.core.pca import fit_pca
    from actlas.models import load

    model = load(tiny)
    pca = fit_pca(model, ["the cat sat on the mat and ran"], SITE, components=2).save(tmp_path / "pca", model)
    assert "which is no dictionary" in actlas("evaluate", pca, tiny, text).failed()
