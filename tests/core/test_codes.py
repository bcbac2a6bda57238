"""Sparse codes agree with the dense tensor they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actlas.core.codes import Codes
from actlas.core.errors import InputError, ShapeError


def some(seed: int = 0, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(*(shape or (4, 3, 11)), generator=g)
    return torch.where(torch.rand(z.shape, generator=g) < 0.3, z, torch.zeros_like(z))


@given(st.integers(0, 1000))
def test_dense_and_back(seed: int) -> None:
    z = some(seed)
    codes = Codes.from_dense(z)
    assert torch.equal(codes.dense(), z)
    assert torch.equal(codes.l0, (z != 0).sum(-1))
    assert torch.equal(codes.counts(), (z != 0).sum((0, 1)))
    for f in range(11):
        assert torch.equal(codes.of(f), z[..., f])


def test_only_and_without_are_complements() -> None:
    z = some()
    codes = Codes.from_dense(z)
    kept, rest = codes.only([2, 5]), codes.without([2, 5])
    assert torch.equal(kept.dense() + rest.dense(), z)
    assert torch.equal(kept.dense()[..., [2, 5]], z[..., [2, 5]])
    assert not rest.dense()[..., [2, 5]].any()


def test_k_keeps_the_largest_magnitudes() -> None:
    z = torch.tensor([[0.0, -3.0, 1.0, 2.0]])
    assert Codes.from_dense(z, k=2).dense().tolist() == [[0.0, -3.0, 0.0, 2.0]]


def test_shapes_rows_and_joining() -> None:
    z = some()
    codes = Codes.from_dense(z)
    assert codes.shape == (4, 3) and codes.flatten().shape == (12,) and len(codes) == 4
    assert torch.equal(codes.flatten().reshape(4, 3).dense(), z)
    assert torch.equal(codes[1:3].dense(), z[1:3])
    wide = Codes.from_dense(torch.ones(2, 3, 11))
    assert torch.equal(Codes.cat([codes, wide]).dense(), torch.cat([z, torch.ones(2, 3, 11)]))


def test_no_active_feature_at_all() -> None:
    codes = Codes.from_dense(torch.zeros(2, 5))
    assert codes.places == 1 and not codes.dense().any() and codes.l0.tolist() == [0, 0]


def test_bad_codes() -> None:
    codes = Codes.from_dense(some())
    with pytest.raises(ShapeError, match="one shape"):
        Codes(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4), 5)
    with pytest.raises(InputError, match="no feature 11; there are 0 to 10"):
        codes.of(11)
    with pytest.raises(InputError, match="of one token"):
        Codes(torch.tensor([1]), torch.tensor([1.0]), 5)[0]
    with pytest.raises(InputError, match="one dictionary"):
        Codes.cat([codes, Codes.from_dense(torch.ones(1, 1, 3))])
