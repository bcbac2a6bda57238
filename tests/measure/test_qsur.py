"""QSUR against its definition on data whose covariance is known."""

from __future__ import annotations

import math

import pytest
import torch

from actlas.core.errors import InputError, NonFiniteError
from actlas.measure.qsur import log_qsur, qsur
from tests.core.tiny import TEXTS, tiny


def _gauss(n: int, scales: list[float]) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, len(scales), generator=g, dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T  # covariance exactly 1
    return white * torch.tensor(scales, dtype=torch.float64)


def test_a_ball_in_its_cube() -> None:
    # a disc of radius r in a square of edge 2r: pi / 4
    x = _gauss(500, [2.0, 2.0])
    assert log_qsur(x) == pytest.approx(math.log(math.pi / 4) / 2, abs=1e-9)
    x = _gauss(500, [1.0, 1.0, 1.0])
    assert log_qsur(x) == pytest.approx(math.log(math.pi / 6) / 3, abs=1e-9)


def test_stretching_one_channel_costs_what_the_formula_says() -> None:
    x = _gauss(500, [10.0, 1.0])  # an ellipse of axes 10 and 1 in a square of edge 20
    want = math.log(math.pi * 10 / 20**2) / 2
    assert log_qsur(x) == pytest.approx(want, abs=1e-9)
    assert log_qsur(x, edge="top") == pytest.approx(want, abs=1e-9)
    half = math.sqrt(0.5)
    turned = x @ torch.tensor([[half, half], [-half, half]], dtype=torch.float64)
    assert log_qsur(turned) > log_qsur(x) + 0.3
    assert log_qsur(turned, edge="top") == pytest.approx(want + math.log(math.sqrt(2)), abs=1e-9)
    assert log_qsur(x / x.std(0)) > log_qsur(turned)


def test_many_channels_do_not_underflow_and_range_counts_the_extremes() -> None:
    x = torch.randn(2000, 600, generator=torch.Generator().manual_seed(1))
    assert math.isfinite(log_qsur(x))
    spoiled = x.clone()
    spoiled[0, 0] = 1e3
    assert log_qsur(spoiled, edge="range") < log_qsur(x, edge="range") - 3


def test_the_measure_sees_an_installed_rotation() -> None:
    from actlas.core.transforms import rotate_residual
    from actlas.quantize.transform_set import mixing

    model = tiny("llama")
    before = qsur(model, TEXTS * 2, tokens=400, context=64, sites="blocks.0.attn_norm")
    with model.edit(rotate_residual(model, mixing(32), untie=True).edit()):
        after = qsur(model, TEXTS * 2, tokens=400, context=64, sites="blocks.0.attn_norm")
    assert before[0].value != after[0].value and before[0].low < before[0].value < before[0].high
    assert before[0].group == {"site": "blocks.0.attn_norm"}


def test_bad_input() -> None:
    with pytest.raises(InputError, match="more rows than channels"):
        log_qsur(torch.randn(4, 8))
    with pytest.raises(InputError, match="constant"):
        log_qsur(torch.ones(9, 2))
    with pytest.raises(NonFiniteError):
        log_qsur(torch.full((9, 2), float("nan")))
    with pytest.raises(InputError, match="edge"):
        log_qsur(torch.randn(9, 2), edge="middle")
