"""Binary coding: fits, exact conversion, the layer and the edit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.numbers import QuantSpec, quantize
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.quantize.bcq import fit_bcq, fit_signs, least_squares, to_bcq
from actlas.quantize.bcq_linear import BCQLinear
from tests.core.tiny import tiny


def _error(weight: torch.Tensor, **options: object) -> float:
    return float((fit_signs(weight, **options).dequantised() - weight).square().mean())  # type: ignore[arg-type]


def test_rounds_beat_rounding_which_beats_greedy() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    rounded = float((quantize(weight, QuantSpec.parse("int3-g64")) - weight).square().mean())
    greedy, refined = _error(weight, rounds=0), _error(weight, rounds=15)
    assert refined < rounded < greedy
    assert _error(weight, rounds=15) <= _error(weight, rounds=1) + 1e-6


def test_one_bit_is_the_mean_and_the_sign() -> None:
    weight = torch.randn(3, 16)
    w = fit_signs(weight, bits=1, group_size=8, dtype=torch.float32)
    groups = weight.view(3, 2, 8)
    want = groups.abs().mean(-1, keepdim=True) * torch.where(groups >= 0, 1.0, -1.0)
    torch.testing.assert_close(w.dequantised(), want.view(3, 16), rtol=1e-5, atol=1e-6)


def test_alphas_are_those_of_least_squares_in_float64() -> None:
    g = torch.Generator().manual_seed(1)
    groups = torch.randn(2, 3, 64, generator=g)
    signs = torch.where(torch.rand(2, 3, 3, 64, generator=g) < 0.5, -1.0, 1.0)
    care = torch.rand(2, 3, 64, generator=g)
    found = least_squares(groups, signs, care)
    for r in range(2):
        for k in range(3):
            a = signs[r, k].double().T * care[r, k].double().sqrt().unsqueeze(-1)
            b = groups[r, k].double() * care[r, k].double().sqrt()
            want = (
                torch.linalg.lstsq(a, b.unsqueeze(-1)).solution.flatten().abs().sort(descending=True).values
            )
            torch.testing.assert_close(found[r, k].double(), want, rtol=1e-4, atol=1e-4)
    same = signs[:, :, :1].expand(-1, -1, 3, -1)  # coinciding signs: the ridge keeps it solvable
    assert bool(least_squares(groups, same).isfinite().all())


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    importance = torch.ones(128)
    importance[::4] = 30.0
    plain, weighted = (
        (fit_signs(weight, importance=i).dequantised() - weight).square()[:, ::4].mean() for i in (None, importance)
    )  # fmt: skip
    assert weighted < plain


def test_constant_and_zero_groups_and_bad_input() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 0.5
    assert torch.allclose(fit_signs(weight).dequantised(), weight, atol=1e-3)
    with pytest.raises(InputError, match="multiple of 8 that divides them does: 8, 16"):
        fit_signs(torch.ones(2, 48), group_size=20)
    with pytest.raises(InputError, match="1 to 8 bits"):
        fit_signs(weight, bits=9)
    with pytest.raises(InputError, match="NaN"):
        fit_signs(torch.full((2, 64), torch.nan))
    with pytest.raises(InputError, match="importance must be"):
        fit_signs(weight, importance=torch.ones(3))


@pytest.mark.parametrize("format", ["int3-g32", "int4-g64-float", "int2-g32-sym", "int4-channel"])
def test_integers_become_signs_without_loss(format: str) -> None:
    linear = nn.Linear(64, 24)
    layer = QuantLinear.of(linear, QuantSpec.parse(format))
    edit = to_bcq(QuantEdit({"layer": layer}))
    found = edit.modules["layer"]
    assert isinstance(found, BCQLinear)
    torch.testing.assert_close(
        found.weight, layer.weight, rtol=0, atol=2e-3 * float(layer.weight.abs().max())
    )
    for x in (torch.randn(2, 64), torch.randn(3, 5, 64)):  # looked up; multiplied
        torch.testing.assert_close(found(x), layer(x), rtol=0, atol=2e-2)
    with pytest.raises(InputError, match="evenly spaced"):
        to_bcq(QuantEdit({"layer": QuantLinear.of(linear, QuantSpec.parse("nf4-g64"))}))


def test_a_model_is_fitted_saved_and_returns_bit_for_bit(tmp_path: Path) -> None:
    model = tiny()
    edit = fit_bcq(model, bits=3, group_size=16, evaluate=0)
    assert isinstance(edit, QuantEdit)
    inputs = model.encode(["ab cd"])
    before = model.forward(inputs).logits
    with model.edit(edit):
        changed = model.forward(inputs).logits
    assert not torch.equal(changed, before)
    assert torch.equal(model.forward(inputs).logits, before)
    assert 3 < edit.bits_per_weight < 8
    with model.edit(Edit.load(edit.save(tmp_path / "edit", model), model)):
        assert torch.equal(model.forward(inputs).logits, changed)
