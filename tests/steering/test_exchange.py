"""Control vectors of other libraries, written and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from actlas.core.edits import Add, Zero
from actlas.core.errors import ActlasError
from actlas.core.model import Model
from actlas.steering.exchange import from_steering_vectors, read_control_vector, write_control_vector
from tests.core.tiny import tiny


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


def _vector(model: Model, seed: int = 0) -> torch.Tensor:
    return torch.randn(model.d_model or 0, generator=torch.Generator().manual_seed(seed))


def test_a_written_vector_is_what_the_gguf_package_reads(model: Model, tmp_path: Path) -> None:
    v, w = _vector(model), _vector(model, 1)
    edit = Add("blocks.1.resid_post", v) * 1.5 + Add("blocks.1.resid_post", w) + Add("blocks.2.resid_post", w)
    path = write_control_vector(edit, tmp_path / "v.gguf", model)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    found = {t.name: np.array(t.data) for t in reader.tensors}
    assert set(found) == {"direction.1", "direction.2"}
    assert np.array_equal(found["direction.1"], (1.5 * v + w).numpy())


def test_reading_back_gives_the_same_model(model: Model, tmp_path: Path) -> None:
    edit = Add("blocks.1.resid_post", _vector(model)) * -2
    again = read_control_vector(write_control_vector(edit, tmp_path / "v.gguf", model), model)
    with model.edit(edit):
        want = model.logits("hello there")
    with model.edit(again):
        assert torch.equal(model.logits("hello there"), want)
    assert again.fingerprint == model.fingerprint


@pytest.mark.parametrize(
    "edit",
    [
        Zero("blocks.1.resid_post"),
        Add("blocks.1.mlp.out", torch.ones(1)),
        Add("blocks.0.resid_post", torch.ones(1)),
        Add("blocks.1.resid_post", torch.ones(1)).at(phase="generated"),
        Add("blocks.1.resid_post", torch.ones(1), keep_norm=True),
        Add("blocks.1.resid_post", torch.ones(1)) * 0,
    ],
)
def test_what_a_control_vector_cannot_hold_is_refused(edit: Any, model: Model, tmp_path: Path) -> None:
    with pytest.raises(ActlasError, match="control vector|nothing to write"):
        write_control_vector(edit, tmp_path / "v.gguf", model)
    assert not (tmp_path / "v.gguf").exists()


def test_files_that_do_not_fit_are_refused(model: Model, tmp_path: Path) -> None:
    cases: dict[str, tuple[Path, str]] = {}
    wide = tmp_path / "wide.safetensors"
    save_file({"1": torch.ones(3)}, wide)
    cases["wide"] = (wide, "3")
    deep = tmp_path / "deep.safetensors"
    save_file({"99": _vector(model)}, deep)
    cases["deep"] = (deep, "block 99")
    nan = tmp_path / "nan.safetensors"
    save_file({"1": torch.full((model.d_model or 0,), float("nan"))}, nan)
    cases["nan"] = (nan, "NaN")
    unnamed = tmp_path / "unnamed.safetensors"
    save_file({"happy": _vector(model)}, unnamed)
    cases["unnamed"] = (unnamed, "layer number")
    pickle = tmp_path / "v.pt"
    pickle.write_bytes(b"x")
    cases["pickle"] = (pickle, "pickle")
    good = write_control_vector(Add("blocks.1.resid_post", _vector(model)), tmp_path / "v.gguf", model)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(good.read_bytes()[:-40])
    cases["cut"] = (cut, "readable GGUF|not a control")
    cases["missing"] = (tmp_path / "none.gguf", "not a file")
    for path, said in cases.values():
        with pytest.raises(ActlasError, match=said):
            read_control_vector(path, model)


def test_layers_of_steering_vectors_are_read(model: Model, tmp_path: Path) -> None:
    @dataclass
    class SteeringVector:
        layer_activations: dict[int, torch.Tensor]
        layer_type: str = "decoder_block"

    v = _vector(model)
    edit = from_steering_vectors(SteeringVector({1: v}), model)
    assert edit.parts()[0].describe().startswith("Add at blocks.1.resid_post")
    assert "attn.out" in from_steering_vectors(SteeringVector({0: v}, "self_attn"), model).describe()
    with pytest.raises(ActlasError, match="layer_type"):
        from_steering_vectors(SteeringVector({0: v}, "router"), model)
    with pytest.raises(ActlasError, match="not a steering vector"):
        from_steering_vectors({"1": v}, model)
    file = tmp_path / "v.safetensors"
    save_file({"layer.1": v}, file)
    x = model.trace("hello", "blocks.1.resid_post")["blocks.1.resid_post"]
    with model.edit(read_control_vector(file, model)):
        assert torch.allclose(model.trace("hello", "blocks.1.resid_post")["blocks.1.resid_post"], x + v)
