"""The Triton kernels against the PyTorch references: on CUDA, or in Triton's interpreter if that is asked for.

TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton.py
"""

from __future__ import annotations

import os

import pytest
import torch

from actlas.kernels.row_steps import adam_constants, adam_rows, adam_rows_reference
from actlas.kernels.sparse_codes import (
    gather_dot,
    gather_dot_reference,
    scatter_outer,
    scatter_outer_reference,
    sparse_decode,
    sparse_decode_reference,
)
from tests.kernels.test_sparse_codes import generator, random_codes

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="there is no CUDA device")

SHAPES = [(7, 20, 37, 3), (5, 9, 1100, 2), (0, 4, 3, 2), (64, 300, 576, 32)]


def kernels():
    from actlas.kernels import triton_sparse_codes

    return triton_sparse_codes


@pytest.mark.parametrize("shape", SHAPES[: 3 if INTERPRETED else 4])
def test_codes(shape):
    n, m, d, k = shape
    indices, values = random_codes(n, m, k, 1)
    weight = torch.randn(m, 2 * d, generator=generator(2))[:, :d]
    rows = torch.randn(n, 2 * d, generator=generator(3))[:, d:]
    start = torch.randn(m, d, generator=generator(4))
    i, v, w, r = (t.to(DEVICE) for t in (indices, values, weight, rows))
    got = [
        kernels().sparse_decode(i, v, w),
        kernels().gather_dot(i, r, w),
        kernels().scatter_outer(i, v, r, m, None),
        kernels().scatter_outer(i, v, r, m, start.clone().to(DEVICE)),
    ]
    expected = [
        sparse_decode_reference(indices, values, weight),
        gather_dot_reference(indices, rows, weight),
        scatter_outer_reference(indices, values, rows, m),
        scatter_outer_reference(indices, values, rows, m, start.clone()),
    ]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_adam(masked, lazy):
    state = [torch.rand(30, 70, generator=generator(i)) for i in range(4)]
    touched = torch.rand(30, generator=generator(5)) > 0.5 if masked else None
    ours = [t.clone().to(DEVICE) for t in state]
    mask = None if touched is None else touched.to(DEVICE)
    kernels().adam_rows(*ours, mask, lazy, adam_constants(3, 0.1, 0.9, 0.99, 1e-8, 0.5))
    adam_rows_reference(
        *(state[i] for i in (0, 1, 2, 3)), step=3, lr=0.1, beta1=0.9, beta2=0.99, touched=touched, lazy=lazy,
        gradient_scale=0.5,
    )  # fmt: skip
    for a, b in zip(ours, state, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA device")
def test_cuda_tensors_take_triton_and_repeat_bit_for_bit(monkeypatch):
    from actlas.kernels import row_steps, sparse_codes

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the reference was used")

    for name in ("sparse_decode", "gather_dot", "scatter_outer"):
        monkeypatch.setattr(sparse_codes, f"{name}_reference", fail)
    monkeypatch.setattr(row_steps, "adam_rows_reference", fail)
    indices, values = (t.to(DEVICE) for t in random_codes(50, 40, 8, 6))
    weight, rows = torch.randn(40, 33, device=DEVICE), torch.randn(50, 33, device=DEVICE)
    sparse_decode(indices, values, weight)
    gather_dot(indices, rows, weight)
    first, second = (scatter_outer(indices, values, rows, 40) for _ in range(2))
    assert torch.equal(first, second)
    adam_rows(weight, first, torch.zeros_like(weight), torch.zeros_like(weight), step=1, lr=0.1)
