"""Rounded activations: against float64 arithmetic, static and dynamic, scopes, saving, gradients, bad input."""

from pathlib import Path

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.model import Model
from actlas.core.numbers import QuantSpec
from actlas.core.quant_activations import QuantizeActivations, per_block, static_quantizer
from tests.core.families import FAMILIES

IDS = {"input_ids": torch.arange(3, 15).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


@pytest.fixture(scope="module")
def model() -> Model:
    return next(f for f in FAMILIES if f.name == "llama").model()


def read(model: Model, site: str, *edits: Edit, inputs: dict = IDS) -> torch.Tensor:
    with model.edit(*edits):
        return model.trace(inputs, [site])[site]


def by_rows(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric integers with one scale a row, in float64."""
    x = x.double()
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


@pytest.mark.parametrize(
    "site", ["blocks.1.attn_norm", "blocks.1.attn.q", "blocks.1.attn.z", "blocks.1.mlp.act"]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_has_one_scale_a_token(model: Model, site: str, bits: int) -> None:
    before, after = read(model, site), read(model, site, QuantizeActivations(site, f"int{bits}-token-sym"))
    want = by_rows(before.flatten(2), bits).reshape(before.shape)
    assert torch.allclose(after.double(), want, atol=1e-6)
    assert not torch.equal(before, after)


def test_a_token_does_not_depend_on_its_batch(model: Model) -> None:
    edit = QuantizeActivations("blocks.*.mlp.act", "int3-token")
    alone = {k: v[1:] for k, v in IDS.items()}
    assert torch.allclose(
        read(model, "blocks.2.resid_post", edit)[1:],
        read(model, "blocks.2.resid_post", edit, inputs=alone),
        atol=1e-6,
    )


def test_static_channels_over_blocks(model: Model) -> None:
    parts = []
    for i in range(3):
        x = read(model, f"blocks.{i}.attn_norm").flatten(0, 1)
        parts.append(static_quantizer(f"blocks.{i}.attn_norm", "int8-channel", x.amin(0), x.amax(0)))
    whole = per_block("attn_norm", parts)
    one = parts[0] + parts[1] + parts[2]
    assert torch.equal(read(model, "blocks.2.resid_post", whole), read(model, "blocks.2.resid_post", one))
    before = read(model, "blocks.0.attn_norm").double()
    low, high = before.flatten(0, 1).amin(0).clamp_max(0), before.flatten(0, 1).amax(0).clamp_min(0)
    step = (high - low) / 255
    zero = (-low / step).round()
    want = step * (((before / step).round() + zero).clamp(0, 255) - zero)
    assert torch.allclose(read(model, "blocks.0.attn_norm", whole).double(), want, atol=1e-5)


def test_static_clips_and_dynamic_does_not(model: Model) -> None:
    site = "blocks.0.attn_norm"
    edit = static_quantizer(site, "int8-tensor-sym", -torch.full((32,), 0.1), torch.full((32,), 0.1))
    assert float(read(model, site, edit).abs().max()) <= 0.1 * 128 / 127 + 1e-6
    assert edit.scale is not None and edit.scale.shape == (1,)


def test_silent_channels_get_a_floor() -> None:
    high = torch.tensor([1.0, 0.0, 2.0])
    edit = static_quantizer("x", "int8-channel-sym", -high, high)
    assert edit.scale is not None
    assert float(edit.scale[1]) == pytest.approx(1e-5 / 127)


def test_log2_keeps_the_mask_and_equals_its_definition(model: Model) -> None:
    site = "blocks.1.attn.pattern"
    before = read(model, site).double()
    after = read(model, site, QuantizeActivations("blocks.*.attn.pattern", "log2-3")).double()
    first = read(model, site, QuantizeActivations(site, "log2-3")).double()
    exponent = (-torch.log2(before)).round()
    want = torch.where(exponent >= 8, 0.0, 2.0 ** (-exponent.clamp_min(0)))
    assert torch.allclose(first, want, atol=1e-7)
    above = torch.ones(6, 6).triu(1).bool()
    assert bool((after[..., above] == 0).all())


def test_scope_strength_and_saving(model: Model, tmp_path: Path) -> None:
    edit = QuantizeActivations("blocks.1.mlp.act", "int2-token-sym").at(positions=[2])
    before, after = read(model, "blocks.1.mlp.act"), read(model, "blocks.1.mlp.act", edit)
    same = (before == after).all(-1)
    assert same[:, [0, 1, 3, 4, 5]].all() and not same[:, 2].any()
    assert torch.equal(read(model, "blocks.1.mlp.act", edit * 0.0), before)
    x = before.flatten(0, 1)
    static = static_quantizer("blocks.1.mlp.act", "int4-channel", x.amin(0), x.amax(0))
    for e in (edit, static, QuantizeActivations("blocks.*.attn.pattern", "log2-4")):
        loaded = Edit.load(e.save(tmp_path / e.spec.replace("/", "_"), model), model)
        assert torch.equal(read(model, "blocks.2.resid_post", e), read(model, "blocks.2.resid_post", loaded))
        assert loaded.describe() == e.describe()


def test_gradients_go_straight_through(model: Model) -> None:
    table = model.module.get_input_embeddings().weight
    with model.edit(QuantizeActivations("blocks.1.resid_post", "int4-token-sym")):
        model.module(**IDS).logits.sum().backward()
    assert table.grad is not None and float(table.grad.abs().sum()) > 0
    table.grad = None


def test_bad_input(model: Model) -> None:
    one = torch.ones(1)
    with pytest.raises(InputError, match="must be static"):
        QuantizeActivations("blocks.0.mlp.act", "int8-tensor-sym")
    with pytest.raises(InputError, match="no number format"):
        QuantizeActivations("blocks.0.mlp.act", "integer")
    with pytest.raises(InputError, match="needs zero points"):
        QuantizeActivations("blocks.0.mlp.act", "int8-tensor", one)
    with pytest.raises(InputError, match="has no zero points"):
        QuantizeActivations("blocks.0.mlp.act", "int8-tensor-sym", one, one)
    with pytest.raises(InputError, match="must be positive"):
        QuantizeActivations("blocks.0.mlp.act", "int8-tensor-sym", one * 0)
    with pytest.raises(NonFiniteError):
        QuantizeActivations("blocks.0.mlp.act", "int8-tensor-sym", one * float("nan"))
    with pytest.raises(InputError, match="whole tensor"):
        QuantizeActivations("blocks.0.mlp.act", "nvfp4")
    with (
        pytest.raises(InputError, match="belongs to attn.pattern"),
        model.edit(QuantizeActivations("blocks.0.mlp.act", "log2-4")),
    ):
        pass
    with (
        pytest.raises(ShapeError, match="do not fit"),
        model.edit(QuantizeActivations("blocks.0.mlp.act", "int8-channel-sym", torch.ones(5))),
    ):
        pass
    with (
        pytest.raises(ShapeError, match="rows for 2 blocks"),
        model.edit(QuantizeActivations("blocks.*.mlp.act", "int8-channel-sym", torch.ones(2, 48))),
    ):
        pass
    with (
        pytest.raises(InputError, match="legal sizes"),
        model.edit(QuantizeActivations("blocks.0.mlp.act", "int8-g64")),
    ):
        pass
    with pytest.raises(InputError, match="groups"):
        static_quantizer("x", QuantSpec(8, group_size=16), torch.zeros(32), torch.ones(32))
