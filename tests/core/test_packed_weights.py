"""Packed weights as an edit: what decoding multiplies with, in the ordinary model, and back again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.packed_weights import PackedWeights, rounding_error
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.kernels.packed import pack
from tests.core.tiny import tiny

GATE = "model.layers.1.mlp.gate_proj"


def test_layers_multiply_with_what_their_bytes_stand_for() -> None:
    model = tiny()
    layer = model.module.get_submodule(GATE)
    before = {n: p.clone() for n, p in model.module.state_dict().items()}
    plain = model.logits("hello there")
    edit = PackedWeights({GATE: "q4", "lm_head": "q8"})
    with model.edit(edit):
        assert torch.equal(layer.weight, pack(before[GATE + ".weight"], "q4").dequantised())
        found = model.logits("hello there")
    assert not torch.equal(found, plain)
    assert torch.equal(model.logits("hello there"), plain)
    assert all(torch.equal(p, before[n]) for n, p in model.module.state_dict().items())


def test_a_tied_embedding_stays_as_it_is() -> None:
    model = tiny()
    model.module.lm_head.weight = model.module.model.embed_tokens.weight
    table = model.module.model.embed_tokens.weight.clone()
    with model.edit(PackedWeights({"lm_head": "q4"})):
        assert torch.equal(model.module.model.embed_tokens.weight, table)
        assert not torch.equal(model.module.lm_head.weight, table)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


def test_gpt2s_turned_layers_are_packed_too() -> None:
    model = tiny("gpt2")
    layer = model.module.transformer.h[0].mlp.c_fc
    want = pack(layer.weight.T, "q4").dequantised().T
    with model.edit(PackedWeights({"transformer.h.0.mlp.c_fc": "q4"})):
        assert torch.equal(layer.weight, want)


def test_over_a_quantised_layer() -> None:
    model = tiny()
    coarse = QuantLinear.of(model.module.get_submodule(GATE), "int2-g32")
    edit = QuantEdit({GATE: coarse}) + PackedWeights({GATE: "q4"})
    with model.edit(edit):
        found = model.module.get_submodule(GATE).weight
        assert torch.allclose(found, pack(coarse.weight, "q4").dequantised())
        assert model.logits("hello").isfinite().all()


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny()
    edit = PackedWeights({GATE: "q4"})
    edit.save(tmp_path / "e", model)
    again = Edit.load(tmp_path / "e", model)
    with model.edit(edit):
        want = model.logits("hello")
    with model.edit(again):
        assert torch.equal(model.logits("hello"), want)


def test_rounding_error_is_zero_on_the_grid_only() -> None:
    model = tiny()
    layer = model.module.get_submodule(GATE)
    edit = PackedWeights({GATE: "q4"})
    assert rounding_error(edit, model.module) > 0.01
    values = torch.arange(32.0).remainder(16)
    layer.weight.data = (values - 8).expand(layer.weight.shape[0], 32).contiguous() * 0.5
    assert rounding_error(edit, model.module) == 0


def test_what_cannot_be_is_refused() -> None:
    model = tiny()
    with pytest.raises(InputError, match="no layer to pack"):
        PackedWeights({})
    with pytest.raises(InputError, match="'q3'"):
        PackedWeights({GATE: "q3"})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="has no layer"), model.edit(PackedWeights({"model.nowhere": "q4"})):
        pass
    with pytest.raises(InputError, match="no strength"):
        PackedWeights({GATE: "q4"}) * 2
    model.module.get_submodule(GATE).weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"), model.edit(PackedWeights({GATE: "q4"})):
        pass
