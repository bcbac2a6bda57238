"""The Frechet distance against closed forms and scipy's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actlas.core.errors import InputError, NonFiniteError
from actlas.measure.frechet import frechet_distance, frechet_floor, frechet_measurement


def test_against_the_formula() -> None:
    from scipy.linalg import sqrtm

    torch.manual_seed(0)
    a = torch.randn(200, 5) @ torch.randn(5, 5) + 1
    b = torch.randn(300, 5) @ torch.randn(5, 5)
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = float((a.mean(0) - b.mean(0)).square().sum())
    want = gap + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet_distance(a, b, ridge=0.0) == pytest.approx(want, rel=1e-4)


def test_shift_and_scale() -> None:
    torch.manual_seed(0)
    a = torch.randn(100, 1, 2, 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 0.5) == pytest.approx(4 * 0.25, rel=1e-4)
    assert frechet_distance(a, torch.flip(a, [0])) == pytest.approx(0, abs=1e-6)
    variance = float(torch.cov(a.flatten(1).T.double()).trace())
    want = variance + float((2 * a.mean(0)).square().sum())  # 3 a: (3 - 1)^2 of the spread and of the mean
    assert frechet_distance(a, 3 * a, ridge=0.0) == pytest.approx(4 * variance + want - variance, rel=1e-4)


def test_measurement_has_a_floor_and_an_interval() -> None:
    torch.manual_seed(0)
    real, good, bad = torch.randn(400, 4), torch.randn(300, 4), torch.randn(300, 4) + 1
    m, worse = frechet_measurement(good, real), frechet_measurement(bad, real)
    assert m.baseline is not None and m.low is not None and m.high is not None and worse.low is not None
    assert m.low <= m.value <= m.high < worse.low
    assert 0 < m.baseline.value < 0.2


def test_constant_pixels_and_bad_input() -> None:
    x = torch.randn(50, 3)
    x[:, 1] = 0
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="two or more samples"):
        frechet_distance(x[:1], x)
    with pytest.raises(InputError, match="3 and 2 features"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(NonFiniteError):
        frechet_distance(x * torch.nan, x)
    with pytest.raises(InputError, match="4 or more"):
        frechet_floor(x[:3])
