"""Adam on rows and the fused step: native, reference, torch's own Adam and the separate pieces agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actlas.kernels import fused_step, row_steps
from actlas.kernels.fused_step import (
    fused_row_step,
    fused_row_step_reference,
    gradient_norm,
    gradient_norm_reference,
)
from actlas.kernels.row_steps import adam_rows, adam_rows_reference
from actlas.kernels.sparse_codes import scatter_outer
from actlas.kernels.statistics import native_available
from tests.kernels.test_sparse_codes import LEVELS, generator, random_codes

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")


def new_state(rows: int, d: int, seed: int) -> list[Tensor]:
    return [torch.randn(rows, d, generator=generator(seed)), torch.zeros(rows, d), torch.zeros(rows, d)]


def copies(state: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in state]


@pytest.mark.parametrize("do", [adam_rows, adam_rows_reference])
@pytest.mark.parametrize("shape", [(9, 37), (50,), (0, 4)])
def test_adam_rows_is_torchs_adam(do, shape):
    w = torch.randn(shape, generator=generator(0))
    m, v = torch.zeros(shape), torch.zeros(shape)
    peer = torch.nn.Parameter(w.double())
    optimizer = torch.optim.Adam([peer], lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    for step in range(1, 6):
        gradient = torch.randn(shape, generator=generator(step)) * 10.0 ** (step - 3)
        peer.grad = 0.5 * gradient.double()
        optimizer.step()
        do(w, gradient, m, v, step=step, lr=0.02, beta1=0.8, beta2=0.95, eps=1e-6, gradient_scale=0.5)
    torch.testing.assert_close(w.double(), peer.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("do", [adam_rows, adam_rows_reference])
@pytest.mark.parametrize("as_mask", [True, False])
def test_rows_that_were_not_touched_step_with_gradient_zero_or_not_at_all(do, as_mask):
    rows = torch.tensor([1, 4])
    touched = torch.zeros(6, dtype=torch.bool)
    touched[rows] = True
    gradient = torch.full((6, 5), float("nan"))  # what must not be read
    gradient[rows] = torch.randn(2, 5, generator=generator(1))
    w, m, v = torch.randn(6, 5, generator=generator(2)), torch.rand(6, 5), torch.rand(6, 5)
    exact, lazy, dense = ([t.clone() for t in (w, m, v)] for _ in range(3))
    given = touched if as_mask else rows
    do(exact[0], gradient, *exact[1:], step=3, lr=0.1, touched=given)
    do(lazy[0], gradient, *lazy[1:], step=3, lr=0.1, touched=given, lazy=True)
    do(dense[0], gradient.nan_to_num(0.0), *dense[1:], step=3, lr=0.1)
    for a, b, c, before in zip(exact, dense, lazy, (w, m, v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(c[touched], b[touched], rtol=1e-6, atol=1e-7)
        assert torch.equal(c[~touched], before[~touched])


def test_views_take_the_reference_and_are_changed_in_place():
    whole = torch.randn(6, 10, generator=generator(3))
    w = whole[:, ::2]
    before = w.clone()
    m, v = torch.zeros(6, 5), torch.zeros(6, 5)
    adam_rows(w, torch.ones(6, 5), m, v, step=1, lr=0.25)
    torch.testing.assert_close(whole[:, ::2], before - 0.25)


@pytest.mark.parametrize("do", [fused_row_step, fused_row_step_reference])
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 30), st.integers(2, 40), st.integers(1, 40), st.integers(1, 5)),
    seed=st.integers(0, 99),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_the_fused_step_is_its_pieces(do, shape, seed, flags):
    n, latents, d, k = shape
    lazy, remove_parallel, renormalise, with_extra = flags
    fused, pieces = (new_state(latents, d, seed) for _ in range(2))
    for step in (1, 2, 3):
        indices, values = random_codes(n, latents, k, seed + step)
        rows = torch.randn(n, d, generator=generator(seed + 50 + step))
        extra = (torch.tensor([0, latents - 1]), torch.randn(2, d, generator=generator(step)))
        settings_ = {"step": step, "lr": 0.05, "beta1": 0.7, "lazy": lazy, "gradient_scale": 0.3}
        # the pieces
        w, m, v = pieces
        g = scatter_outer(indices, values, rows, latents)
        touched = torch.zeros(latents, dtype=torch.bool)
        touched[indices[values != 0]] = True
        if with_extra:
            g[extra[0]] += extra[1]
            touched[extra[0]] = True
        if remove_parallel:
            g -= (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        norm = float(g.double().norm())
        adam_rows(w, g, m, v, touched=touched, **settings_)
        if renormalise:
            stepped = touched if lazy else torch.ones_like(touched)
            w[stepped] /= w[stepped].norm(dim=1, keepdim=True)
        # at once
        more = {"remove_parallel": remove_parallel, "extra": extra if with_extra else None}
        for of in (gradient_norm, gradient_norm_reference):
            assert of(fused[0], indices, values, rows, **more) == pytest.approx(norm, rel=1e-4, abs=1e-5)
        do(*fused, indices, values, rows, renormalise=renormalise, **more, **settings_)
        if (
            d > 1 or not remove_parallel
        ):  # what is parallel in one dimension is everything: only noise is left
            for a, b in zip(fused, pieces, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        fused = copies(pieces)  # small differences must not grow over the steps


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_steps_alike(level):
    from actlas.kernels import _native

    indices, values = random_codes(60, 30, 4, 1)
    rows = torch.randn(60, 35, generator=generator(2))
    one, two = new_state(30, 35, 3), new_state(30, 35, 3)
    constants = row_steps.adam_constants(1, 0.1, 0.9, 0.999, 1e-8, 1.0)
    arrays = [t.numpy() for t in (*one, indices, values, rows)]
    _native.fused_row_step(*arrays, None, None, False, True, True, *constants, 1, level)
    fused_row_step_reference(
        *two, indices, values, rows, step=1, lr=0.1, remove_parallel=True, renormalise=True
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_native
def test_threads_change_no_bit():
    from actlas.kernels import _native

    indices, values = random_codes(500, 300, 16, 4)
    rows = torch.randn(500, 64, generator=generator(5))
    constants = row_steps.adam_constants(2, 0.1, 0.9, 0.999, 1e-8, 0.7)
    results, norms = [], set()
    for threads in (1, 2, 5):
        state = new_state(300, 64, 6)
        codes = [t.numpy() for t in (indices, values, rows)]
        norms.add(_native.fused_square_norm(state[0].numpy(), *codes, None, None, True, threads))
        arrays = [t.numpy() for t in state]
        _native.fused_row_step(*arrays, *codes, None, None, False, True, True, *constants, threads)
        results.append(state)
    assert len(norms) == 1
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_native_is_what_float32_takes(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the reference was used")

    monkeypatch.setattr(row_steps, "adam_rows_reference", fail)
    monkeypatch.setattr(fused_step, "fused_row_step_reference", fail)
    monkeypatch.setattr(fused_step, "gradient_norm_reference", fail)
    state = new_state(5, 4, 0)
    indices, values = random_codes(3, 5, 2, 0)
    adam_rows(state[0], torch.ones(5, 4), *state[1:], step=1, lr=0.1)
    fused_row_step(*state, indices, values, torch.ones(3, 4), step=2, lr=0.1)
    gradient_norm(state[0], indices, values, torch.ones(3, 4))


def test_without_the_native_module_the_references_are_used(monkeypatch):
    monkeypatch.setattr(row_steps, "_native", lambda: None)
    monkeypatch.setattr(fused_step, "_native", lambda: None)
    w, m, v = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    adam_rows(w, torch.ones(3, 2), m, v, step=1, lr=0.5)
    torch.testing.assert_close(w, torch.full((3, 2), -0.5))
    indices, values = torch.tensor([[2]]), torch.tensor([[2.0]])
    assert gradient_norm(w, indices, values, torch.ones(1, 2)) == pytest.approx(8**0.5)
    fused_row_step(w, m, v, indices, values, torch.ones(1, 2), step=2, lr=0.5)
    assert float(w[2, 0]) < float(w[0, 0]) < -0.5


STATE = (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))
CODES = (torch.tensor([[0]]), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (
            lambda: adam_rows(STATE[0], torch.ones(3, 1), *STATE[1:], step=1, lr=1.0),
            r"gradient must be \[3, 2\]",
        ),
        (lambda: adam_rows(*STATE, torch.ones(2, 2), step=1, lr=1.0), r"v must be \[3, 2\]"),
        (lambda: adam_rows(*STATE, STATE[0], step=0, lr=1.0), "step counts from 1, not 0"),
        (lambda: adam_rows(*STATE, STATE[0], step=1, lr=1.0, touched=torch.tensor([3])), "0 ... 2"),
        (lambda: adam_rows(*STATE, STATE[0], step=1, lr=1.0, touched=torch.ones(3)), "touched must be bool"),
        (lambda: adam_rows(*[torch.zeros(1, 1, 1)] * 4, step=1, lr=1.0), "parameter must be float"),
        (lambda: fused_row_step(*STATE, *CODES, torch.ones(1, 3), step=1, lr=1.0), r"rows must be \[n, 2\]"),
        (lambda: fused_row_step(*STATE, *CODES, torch.ones(2, 2), step=1, lr=1.0), r"rows must be \[1, d\]"),
        (lambda: fused_row_step(*STATE, CODES[0] + 3, CODES[1], torch.ones(1, 2), step=1, lr=1.0), "not 3"),
        (lambda: fused_row_step(*STATE, *CODES, torch.ones(1, 2), step=0, lr=1.0), "step counts from 1"),
        (
            lambda: gradient_norm(
                STATE[0], *CODES, torch.ones(1, 2), extra=(torch.tensor([1, 1]), torch.ones(2, 2))
            ),
            "without repeats",
        ),
        (
            lambda: gradient_norm(
                STATE[0], *CODES, torch.ones(1, 2), extra=(torch.tensor([1]), torch.ones(2, 2))
            ),
            "extra gradient",
        ),
        (
            lambda: gradient_norm(
                STATE[0], *CODES, torch.ones(1, 2), extra=(torch.tensor([7]), torch.ones(1, 2))
            ),
            "up to 7",
        ),
    ],
)
def test_what_does_not_fit_is_refused(do, words):
    with pytest.raises(ValueError, match=words):
        do()
