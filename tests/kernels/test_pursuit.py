"""Matching pursuit: native, reference and a residual-by-residual float64 pursuit agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actlas.kernels import pursuit
from actlas.kernels.pursuit import matching_pursuit, matching_pursuit_reference
from actlas.kernels.statistics import native_available
from tests.kernels.test_sparse_codes import LEVELS, generator

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")


def unit_rows(m: int, d: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(m, d, generator=generator(seed)), dim=1)


def residuals(x: Tensor, atoms: Tensor, k: int) -> tuple[list[list[int]], Tensor]:
    """Picks and dense codes, as the definition says it."""
    r, atoms = x.double(), atoms.double()
    codes, picks = torch.zeros(len(x), len(atoms), dtype=torch.float64), []
    for _ in range(k):
        c = r @ atoms.T
        j = c.abs().argmax(1)
        step = c.gather(1, j[:, None])
        codes.scatter_add_(1, j[:, None], step)
        r = r - step * atoms[j]
        picks.append(j)
    return torch.stack(picks, 1).tolist(), codes


def dense(indices: Tensor, values: Tensor, m: int) -> Tensor:
    return torch.zeros(len(indices), m, dtype=values.dtype).scatter_add_(1, indices, values)


@pytest.mark.parametrize("do", [matching_pursuit, matching_pursuit_reference])
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 80), st.integers(2, 30)),
    k=st.integers(1, 9),
    seed=st.integers(0, 99),
    with_gram=st.booleans(),
)
def test_it_is_the_pursuit_of_residuals(do, shape, k, seed, with_gram):
    n, m, d = shape
    x, atoms = torch.randn(n, d, generator=generator(seed)), unit_rows(m, d, seed + 100)
    indices, values = do(x, atoms, k, atoms @ atoms.T if with_gram else None)
    _, codes = residuals(x, atoms, k)
    # Where two atoms correlate almost equally, float32 may pick the other; the error is what counts.
    ours = (x.double() - dense(indices, values, m).double() @ atoms.double()).norm(dim=1)
    theirs = (x.double() - codes @ atoms.double()).norm(dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for row, value in zip(indices.tolist(), values.tolist(), strict=True):
        used = [i for i, v in zip(row, value, strict=True) if v != 0]
        assert len(set(used)) == len(used)  # merged


def test_picks_and_values_are_those_of_the_definition():
    x, atoms = torch.randn(30, 40, generator=generator(1)), unit_rows(90, 40, 2)
    picks, codes = residuals(x, atoms, 5)
    for do in (matching_pursuit, matching_pursuit_reference):
        indices, values = do(x, atoms, 5)
        torch.testing.assert_close(dense(indices, values, 90).double(), codes, rtol=1e-4, atol=1e-5)
        assert indices[:, 0].tolist() == [p[0] for p in picks]


@pytest.mark.parametrize("do", [matching_pursuit, matching_pursuit_reference])
def test_an_atom_picked_twice_is_merged_and_ties_go_to_the_first(do):
    # Two atoms at 60 degrees: pursuit comes back to the first.
    atoms = torch.tensor([[1.0, 0.0], [0.5, 3**0.5 / 2], [1.0, 0.0]])
    x = torch.tensor([[-2.0, 1.0]])
    indices, values = do(x, atoms, 4)
    assert indices.tolist() == [[0, 1, 0, 0]] and values[0, 2:].tolist() == [0.0, 0.0]
    _, codes = residuals(x, atoms, 4)
    torch.testing.assert_close(dense(indices, values, 3).double(), codes, rtol=1e-5, atol=1e-6)
    assert float(values[0, 0]) < 0  # signed


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", [1, 7, 64, 101])
def test_every_instruction_set_and_number_of_threads_agree(level, m):
    from actlas.kernels import _native

    x, atoms = torch.randn(400, 20, generator=generator(3)), unit_rows(m, 20, 4)
    gram, expected = atoms @ atoms.T, None
    for threads in (1, 2, 5):
        picks, steps = torch.empty(400, 8, dtype=torch.int64), torch.empty(400, 8)
        correlations = x @ atoms.T
        _native.pursue(correlations.numpy(), gram.numpy(), picks.numpy(), steps.numpy(), threads, level)
        expected = expected or (picks, steps)
        assert torch.equal(picks, expected[0]) and torch.equal(steps, expected[1])
    error = x - torch.zeros(400, m).scatter_add_(1, *expected) @ atoms
    _, codes = residuals(x, atoms, 8)
    torch.testing.assert_close(
        error.double().norm(), (x.double() - codes @ atoms.double()).norm(), rtol=1e-4, atol=0
    )


def test_views_of_larger_buffers_chunks_and_no_rows(monkeypatch):
    x, buffer = torch.randn(25, 12, generator=generator(5)), torch.zeros(50, 12)
    buffer[:30] = unit_rows(30, 12, 6)
    gram = buffer @ buffer.T
    expected = matching_pursuit_reference(x, buffer[:30], 4)
    monkeypatch.setattr(pursuit, "_CHUNK", 30 * 4)
    indices, values = matching_pursuit(x, buffer[:30], 4, gram[:30, :30])
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(values, expected[1], rtol=1e-4, atol=1e-5)
    indices, values = matching_pursuit(x[:0], buffer[:30], 4)
    assert indices.shape == values.shape == (0, 4)


def test_nan_shows_in_its_row_only():
    x, atoms = torch.randn(4, 6, generator=generator(7)), unit_rows(20, 6, 8)
    clean = matching_pursuit(x, atoms, 3)
    x[2, 1] = float("nan")
    indices, values = matching_pursuit(x, atoms, 3)
    assert values[2].isnan().any()
    for row in (0, 1, 3):
        assert torch.equal(indices[row], clean[0][row]) and torch.equal(values[row], clean[1][row])


def test_float64_and_a_missing_module_take_the_reference(monkeypatch):
    x, atoms = torch.randn(3, 5, generator=generator(9)), unit_rows(9, 5, 10)
    assert matching_pursuit(x.double(), atoms, 2)[1].dtype == torch.float64
    expected = matching_pursuit(x, atoms, 2)
    monkeypatch.setattr(pursuit, "_native", lambda: None)
    indices, values = matching_pursuit(x, atoms, 2)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(values, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(2, 3), torch.eye(3), 0), "k must be at least 1, not 0"),
        ((torch.ones(2, 3), torch.eye(4), 1), r"atoms must be float \[m, 3\]"),
        ((torch.ones(2, 3), torch.empty(0, 3), 1), "m >= 1"),
        ((torch.ones(2, 3), 2 * torch.eye(3), 1), "unit norm; one is off by 1"),
        ((torch.ones(2, 3), torch.full((1, 3), float("nan")), 1), "unit norm"),
        ((torch.ones(2, 3), torch.eye(3), 1, torch.eye(2)), r"gram must be torch.float32 \[3, 3\]"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.eye(3), 1), "x must be float32"),
    ],
)
@pytest.mark.parametrize("do", [matching_pursuit, matching_pursuit_reference])
def test_what_does_not_fit_is_refused(do, arguments, words):
    with pytest.raises(ValueError, match=words):
        do(*arguments)
