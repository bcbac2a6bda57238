"""Excess kurtosis against scipy, and the released script's variant against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis

from actlas.core.errors import InputError
from actlas.measure.kurtosis import excess_kurtosis


def test_it_is_scipys() -> None:
    x = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)).exp()
    np.testing.assert_allclose(excess_kurtosis(x).numpy(), kurtosis(x.double().numpy(), axis=-1), rtol=1e-9)


def test_the_released_formula_differs_where_the_mean_is_not_zero() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    a = x.numpy()
    want = (a**4).mean(1) / a.std(1, ddof=1) ** 4 - 3
    np.testing.assert_allclose(excess_kurtosis(x, official=True).numpy(), want, rtol=1e-12)
    assert float((excess_kurtosis(x, official=True) - excess_kurtosis(x)).min()) > 50
    flat = torch.tensor([[-1.0, 1.0, -1.0, 1.0]])
    assert (
        float(excess_kurtosis(flat)) == pytest.approx(-2) and float(excess_kurtosis(flat, official=True)) == 0
    )


def test_limits() -> None:
    assert bool(torch.isnan(excess_kurtosis(torch.ones(2, 8))).all())
    with pytest.raises(InputError, match="two channels"):
        excess_kurtosis(torch.ones(3, 1))
