"""Pursuits against brute force, against scikit-learn, and on problems whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from torch import Tensor
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries.evaluation import UnitDirections
from actlas.dictionaries.solvers import gradient_pursuit, orthogonal_matching_pursuit, pursue


def problem(n: int = 40, d: int = 12, m: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(m, d, generator=g, dtype=torch.float64), dim=1)
    return torch.randn(n, d, generator=g, dtype=torch.float64), atoms


def slow_gradient_pursuit(x: np.ndarray, atoms: np.ndarray, steps: int) -> np.ndarray:
    """One row, dense, as the equations stand."""
    w = np.zeros(len(atoms))
    for _ in range(steps):
        r = x - w @ atoms
        inner = atoms @ r
        if inner.max() <= 0:
            break
        support = w != 0
        support[inner.argmax()] = True
        g = np.where(support, inner, 0)
        c = g @ atoms
        w = np.maximum(0, w + (c @ r) / (c @ c) * g)
    return w


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradient_pursuit_is_the_dense_iteration(scale):
    x, atoms = problem()
    atoms = atoms * scale
    l0 = torch.arange(len(x)) % 9
    codes = gradient_pursuit(x, atoms, l0)
    slow = np.stack(
        [slow_gradient_pursuit(r, atoms.numpy(), int(k)) for r, k in zip(x.numpy(), l0, strict=True)]
    )
    np.testing.assert_allclose(codes.dense().numpy(), slow, atol=1e-12)
    assert (codes.l0 <= l0).all() and (codes.values >= 0).all()
    assert int(codes.l0[8]) > 4  # it does use its steps


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_more_steps_never_reconstruct_worse(seed, k):
    x, atoms = problem(n=8, seed=seed)
    error = [
        (x - gradient_pursuit(x, atoms, steps).dense() @ atoms).square().sum(1) for steps in (0, k, k + 1)
    ]
    assert (error[1] <= error[0] + 1e-9).all()
    w = orthogonal_matching_pursuit(x, atoms, k).dense() @ atoms
    more = orthogonal_matching_pursuit(x, atoms, k + 1).dense() @ atoms
    assert ((x - more).square().sum(1) <= (x - w).square().sum(1) + 1e-9).all()


def test_gradient_pursuit_finds_a_planted_code_over_orthogonal_atoms():
    atoms = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    planted = torch.zeros(5, 10, dtype=torch.float64)
    planted[torch.arange(5), torch.arange(5)] = 2.0
    planted[torch.arange(5), torch.arange(5) + 3] = 0.5
    codes = gradient_pursuit(planted @ atoms, atoms, 40 // 4)
    torch.testing.assert_close(codes.dense(), planted, atol=1e-3, rtol=0)
    nothing = gradient_pursuit(-planted @ atoms, atoms, 4)  # no atom points that way
    assert not bool(nothing.values.any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orthogonal_matching_pursuit_is_scikit_learns(dtype):
    x, atoms = problem(n=30)
    codes = orthogonal_matching_pursuit(x.to(dtype), atoms.to(dtype), 6)
    reference = orthogonal_mp(atoms.numpy().T, x.numpy().T, n_nonzero_coefs=6).T
    np.testing.assert_allclose(
        codes.dense().double().numpy(), reference, atol=1e-9 if dtype == torch.float64 else 1e-4
    )


def test_orthogonal_matching_pursuit_stops_when_nothing_is_left():
    x, atoms = problem(n=3, d=6, m=20)
    target = atoms[[4, 7, 9]] * torch.tensor([[2.0], [-3.0], [0.5]], dtype=torch.float64)
    codes = orthogonal_matching_pursuit(torch.cat([target, x, torch.zeros(1, 6).double()]), atoms, 6)
    assert codes.l0[:3].tolist() == [1, 1, 1] and int(codes.l0[-1]) == 0
    torch.testing.assert_close(codes.dense() @ atoms, torch.cat([target, x, torch.zeros(1, 6).double()]))
    twice = torch.cat([atoms, atoms])  # an atom in the span of the chosen ones is never of use
    again = orthogonal_matching_pursuit(x, twice, 6).dense() @ twice
    torch.testing.assert_close(again, x)


def test_atoms_of_any_length_and_numbers_of_atoms_by_row():
    x, atoms = problem(n=6)
    lengths = torch.linspace(0.5, 4, len(atoms), dtype=torch.float64)[:, None]
    k = torch.tensor([0, 1, 2, 3, 4, 5])
    plain = orthogonal_matching_pursuit(x, atoms, k)
    scaled = orthogonal_matching_pursuit(x, atoms * lengths, k)
    assert plain.l0.tolist() == k.tolist()
    torch.testing.assert_close(scaled.dense() @ (atoms * lengths), plain.dense() @ atoms)


def test_chunks_change_nothing(monkeypatch):
    x, atoms = problem()
    whole = [f(x, atoms, 5).dense() for f in (gradient_pursuit, orthogonal_matching_pursuit)]
    monkeypatch.setattr("actlas.dictionaries.solvers._NUMBERS", 90)
    again = [f(x, atoms, 5).dense() for f in (gradient_pursuit, orthogonal_matching_pursuit)]
    for a, b in zip(whole, again, strict=True):
        torch.testing.assert_close(a, b)
    assert gradient_pursuit(x[:0], atoms, 3).shape == (0,)


def test_a_dictionary_is_pursued_around_its_offset_at_its_own_l0():
    x, atoms = problem(n=20)
    lens = UnitDirections(site="s", directions=atoms.float(), centre=torch.full((12,), 3.0), k=4)
    rows = (x + 3).float()
    codes = pursue(lens, rows)
    torch.testing.assert_close(codes.dense(), gradient_pursuit(x.float(), atoms.float(), lens.encode(rows).l0).dense(), atol=1e-5, rtol=1e-4)  # fmt: skip
    assert (codes.l0 <= lens.encode(rows).l0).all()
    assert (rows - lens.decode(codes)).square().sum() < (rows - 3).square().sum()


def test_bad_input():
    x, atoms = problem()
    with pytest.raises(ShapeError, match=r"atoms \[m, d\]"):
        gradient_pursuit(x, atoms[:, :5], 3)
    with pytest.raises(InputError, match="31 of 30 atoms"):
        gradient_pursuit(x, atoms, 31)
    with pytest.raises(InputError, match="cannot have -1"):
        orthogonal_matching_pursuit(x, atoms, -1)
    with pytest.raises(InputError, match="12 channels need no more"):
        orthogonal_matching_pursuit(x, atoms, 13)
    with pytest.raises(InputError, match="atom 2 is zero"):
        orthogonal_matching_pursuit(x, atoms * (torch.arange(30) != 2)[:, None], 3)
    lens = UnitDirections(site="s", directions=atoms.float(), centre=torch.zeros(12), k=4)
    with pytest.raises(ShapeError, match="rows"):
        pursue(lens, x.float().reshape(2, 20, 12))
