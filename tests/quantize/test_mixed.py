"""Row groups, training with rounding, and bits by sharpness on a small model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.errors import InputError
from actlas.core.numbers import QuantSpec, quantize
from actlas.core.quant_edit import QuantEdit
from actlas.quantize.hessian_bits import block_sharpness, fit_hessian_bits
from actlas.quantize.row_groups import group_params, round_rows, row_group_edit, row_group_training
from tests.core.tiny import TEXTS, tiny


def test_row_groups_share_scales_over_whole_rows() -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    params = group_params(weight, 4, 3)
    assert params.scale.shape == (12, 1)
    for run in range(4):
        rows = weight[3 * run : 3 * run + 3]
        scale = (rows.max().clamp_min(0) - rows.min().clamp_max(0)) / 7
        assert torch.allclose(params.scale[3 * run : 3 * run + 3], scale.expand(3, 1))
    want = quantize(weight, QuantSpec(3, granularity="channel"), params)
    assert torch.equal(round_rows(weight, 4, 3), want)
    assert torch.equal(round_rows(weight, 12, 3), quantize(weight, QuantSpec(3, granularity="channel")))
    with pytest.raises(InputError, match="legal are 1, 2, 3, 4, 6, 12"):
        group_params(weight, 5, 3)


def test_more_groups_less_error() -> None:
    weight = (
        torch.randn(48, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 48)[:, None]
    )
    errors = [float((round_rows(weight, g, 2) - weight).square().sum()) for g in (1, 12, 48)]
    assert errors[0] > errors[1] > errors[2]


def test_training_with_rounding_lowers_the_loss_and_can_be_stored() -> None:
    model = tiny()
    module = model.module
    before = {n: p.clone() for n, p in module.named_parameters()}
    bits = {n: 2 for n, m in module.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    x = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    with row_group_training(module.train(), bits, 4) as layers:
        optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
        losses = []
        for _ in range(25):
            optimiser.zero_grad()
            loss = module(input_ids=x, labels=x).loss
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        module.eval()
        with torch.no_grad():
            inside = module(input_ids=x).logits
        edit = row_group_edit(model, layers)
    assert losses[-1] < 0.8 * losses[0]
    assert type(module.model.layers[0].mlp.up_proj) is nn.Linear
    with model.edit(edit), torch.no_grad():
        outside = module(input_ids=x).logits
    assert torch.allclose(inside, outside, atol=0.02 * float(inside.abs().max()))  # scales in 16 bits
    assert any(not torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_bits_follow_the_sharpness() -> None:
    model = tiny()
    sharp = block_sharpness(model, TEXTS, shards=2, shard_tokens=24, iterations=10)
    assert list(sharp) == ["0", "1", "2"]
    edit = fit_hessian_bits(
        model, TEXTS * 4, choices=(2, 4), budget=2.7, group_size=16, shard_tokens=24, context=32, evaluate=0
    )
    assert isinstance(edit, QuantEdit)
    got = {b: edit.modules[f"model.layers.{b}.mlp.up_proj"].spec.bits for b in sharp}
    assert sorted(got.values()) == [2, 2, 4]
    order = sorted(sharp, key=lambda b: sharp[b].omega)
    assert got[order[-1]] == 4
    assert "bits by block: " in edit.describe()
    assert all(p.requires_grad for p in model.module.parameters())


def test_bad_input() -> None:
    model = tiny()
    with pytest.raises(InputError, match="below the least choice"):
        fit_hessian_bits(model, TEXTS * 4, choices=(3, 4), budget=2.0, context=32)
    with (
        pytest.raises(InputError, match="no linear layer"),
        row_group_training(model.module, {"lm_hea": 2}, 2),
    ):
        pass
