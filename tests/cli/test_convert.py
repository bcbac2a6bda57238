"""`actlas convert`: a SAELens folder becomes a lens and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actlas.cli.main import COMMANDS
from actlas.core.dictionary import Dictionary
from actlas.core.edit import Edit
from actlas.core.edits import Add
from actlas.dictionaries.saelens import load_saelens, save_saelens
from actlas.dictionaries.topk import TopKSAE
from actlas.models import load

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "convert", COMMANDS.get("convert", "Convert."))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A SAELens folder that fits the tiny model."""
    return save_saelens(TopKSAE.create("blocks.1.resid_post", 32, 64, k=4), tmp_path / "saelens")


def test_there_and_back(actlas: Run, folder: Path, tiny: str, tmp_path: Path) -> None:
    said = actlas("convert", folder, "--model", tiny, "-o", tmp_path / "lens", "--json")
    assert said.status == 0, said
    assert said.json["format"] == "lens" and said.json["kind"] == "TopKSAE" and said.json["features"] == 64
    lens = Dictionary.load(tmp_path / "lens")
    said = actlas("convert", tmp_path / "lens", "-o", tmp_path / "again", "--json")
    assert said.json["format"] == "saelens" and said.json["site"] == "blocks.1.resid_post"
    x = torch.randn(10, 32)
    torch.testing.assert_close(load_saelens(tmp_path / "again").reconstruct(x), lens.reconstruct(x))
    steered = actlas("generate", tiny, "the", "--edit", f"{tmp_path / 'lens'}#3*2", "--max-new-tokens", 2)
    assert steered.status == 0, steered


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{saelens}", "-o", "x"], "give the model that it reads"),
        (["nowhere", "-o", "x"], "nowhere does not exist"),
        (["{saelens}", "--model", "{wider}", "-o", "x"], "has 32 channels at blocks.1.resid_post, where"),
        (["{saelens}", "--model", "{tiny}", "-o", "x", "--input-scale", "2"], "does not scale its inputs"),
        (["{edit}", "-o", "x"], "holds a edit, not a lens"),
        (["{edit}", "-o", "x", "--input-scale", "2"], "--input-scale is for SAELens folders"),
    ],
)
def test_bad_input(
    actlas: Run, arguments: list[str], said: str, folder: Path, tiny: str, wider: str, vector: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names = {"saelens": str(folder), "tiny": tiny, "wider": wider, "edit": vector}
    assert said in actlas("convert", *(a.format(**names) for a in arguments)).failed()
    assert not (tmp_path / "x").exists()


def test_an_edit_becomes_a_control_vector_and_comes_back(actlas: Run, tiny: str, tmp_path: Path) -> None:
    model = load(tiny)
    v = torch.randn(model.d_model or 0)
    Add("blocks.1.resid_post", v).save(tmp_path / "vec", model)
    said = actlas("convert", tmp_path / "vec", "--model", tiny, "-o", tmp_path / "vec.gguf", "--json")
    assert said.status == 0 and said.json["format"] == "control vector", said
    said = actlas("convert", tmp_path / "vec.gguf", "--model", tiny, "-o", tmp_path / "again", "--json")
    assert said.status == 0 and said.json["format"] == "edit", said
    again = Edit.load(tmp_path / "again", model)
    assert torch.equal(again.parts()[0].vector, v)  # type: ignore[attr-defined]
    texts = [
        actlas("generate", tiny, "the", "--edit", f"{tmp_path / name}*3", "--max-new-tokens", 4, "--json")
        for name in ("vec", "vec.gguf")
    ]
    assert texts[0].json["edited"] == texts[1].json["edited"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{vec}", "-o", "v.gguf"], "give the model"),
        (["nowhere.gguf", "--model", "{tiny}", "-o", "x"], "is not a file"),
        (["{vec}", "--model", "{tiny}", "-o", "v.safetensors"], "written as .gguf"),
    ],
)
def test_bad_control_vectors(actlas: Run, arguments: list[str], said: str, tiny: str, tmp_path: Path) -> None:
    model = load(tiny)
    Add("blocks.1.resid_post", torch.ones(model.d_model or 0)).save(tmp_path / "vec", model)
    given = [a.format(vec=tmp_path / "vec", tiny=tiny) for a in arguments]
    found = actlas("convert", *given)
    assert found.status == 2 and said in found.err, found
