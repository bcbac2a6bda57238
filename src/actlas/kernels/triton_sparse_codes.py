# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, no-any-return"
"""Sparse codes on CUDA, in Triton: what `sparse_codes` and `row_steps` do there.

Not run on a GPU yet: no machine with one was at hand when this was written. They compile for CUDA (Triton
3.9, compute capability 8.0), and in Triton's interpreter on the CPU (`TRITON_INTERPRET=1`) they agree with
the PyTorch references; their speed is unknown. The tests in `tests/kernels/test_triton.py` run them
wherever there is CUDA. `ACTLAS_TRITON=0` switches them off.

Only `sparse_codes` and `row_steps` import this file, when a CUDA tensor arrives and Triton is installed.
No kernel uses atomics: entries are sorted by latent first, so the results are the same at every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _decode(indices, values, weight, out, k, d, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(k):
        latent = tl.load(indices + row * k + j)
        value = tl.load(values + row * k + j)
        total += value * tl.load(weight + latent * stride + column, mask=inside, other=0.0)
    tl.store(out + row * d + column, total, mask=inside)


@triton.jit
def _dot(indices, rows, weight, out, k, d, row_stride, weight_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    latent = tl.load(indices + row * k + j)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d
        x = tl.load(rows + row * row_stride + column, mask=inside, other=0.0)
        total += x * tl.load(weight + latent * weight_stride + column, mask=inside, other=0.0)
    tl.store(out + row * k + j, tl.sum(total, axis=0))


@triton.jit
def _outer(first, entry_row, coefficients, rows, out, d, row_stride, ADD: tl.constexpr, BLOCK: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if ADD:
        total += tl.load(out + latent * d + column, mask=inside, other=0.0)
    for entry in range(tl.load(first + latent), tl.load(first + latent + 1)):
        row = tl.load(entry_row + entry)
        c = tl.load(coefficients + entry)
        total += c * tl.load(rows + row * row_stride + column, mask=inside, other=0.0)
    tl.store(out + latent * d + column, total, mask=inside)


@triton.jit
def _adam(
    w, g, m, v, touched, d, rate, correction, beta1, beta2, eps, scale,
    MASKED: tl.constexpr, LAZY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    at = row * d + column
    has = inside
    if MASKED:
        has = tl.load(touched + row + 0 * column, mask=inside, other=0) != 0
        if LAZY:
            inside = has
    x = tl.load(g + at, mask=has, other=0.0) * scale
    first = tl.load(m + at, mask=inside, other=0.0) * beta1 + x * (1.0 - beta1)
    second = tl.load(v + at, mask=inside, other=0.0) * beta2 + x * x * (1.0 - beta2)
    weight = tl.load(w + at, mask=inside, other=0.0)
    weight -= rate * first / (tl.sqrt(second) * correction + eps)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(w + at, weight, mask=inside)


def _block(d: int) -> int:
    return min(1024, max(16, triton.next_power_of_2(d)))


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Do what `sparse_codes.sparse_decode` does, for float32 on CUDA."""
    (n, k), d = indices.shape, weight.shape[1]
    out = torch.empty(n, d, device=weight.device)
    if out.numel():
        grid = (n, triton.cdiv(d, _block(d)))
        _decode[grid](
            indices.contiguous(), values.contiguous(), weight, out, k, d, weight.stride(0), BLOCK=_block(d)
        )
    return out


def gather_dot(indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Do what `sparse_codes.gather_dot` does, for float32 on CUDA."""
    (n, k), d = indices.shape, rows.shape[1]
    out = torch.empty(n, k, device=rows.device)
    if out.numel():
        _dot[(n, k)](
            indices.contiguous(), rows, weight, out, k, d, rows.stride(0), weight.stride(0), BLOCK=_block(d)
        )
    return out


def scatter_outer(indices: Tensor, coefficients: Tensor, rows: Tensor, m: int, out: Tensor | None) -> Tensor:
    """Do what `sparse_codes.scatter_outer` does, for float32 on CUDA."""
    k, d = indices.shape[1], rows.shape[1]
    result = torch.empty(m, d, device=rows.device) if out is None else out
    # Entries of coefficient 0 are moved behind the last latent, where nobody looks.
    flat, c = indices.reshape(-1), coefficients.reshape(-1)
    flat = torch.where(c != 0, flat, m)
    latents, order = flat.sort(stable=True)
    first = torch.searchsorted(latents, torch.arange(m + 1, device=flat.device))
    entry_row = torch.div(order, max(k, 1), rounding_mode="floor")
    if result.numel():
        grid = (m, triton.cdiv(d, _block(d)))
        _outer[grid](
            first, entry_row, c[order].contiguous(), rows, result, d, rows.stride(0),
            ADD=out is not None, BLOCK=_block(d),
        )  # fmt: skip
    return result


def adam_rows(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    touched: Tensor | None,
    lazy: bool,
    constants: tuple[float, float, float, float, float, float],
) -> None:
    """Do what `row_steps.adam_rows` does, for contiguous float32 matrices on CUDA; see `adam_constants`."""
    rows, d = w.shape
    if not w.numel():
        return
    mask = w if touched is None else touched.view(torch.uint8)
    grid = (rows, triton.cdiv(d, _block(d)))
    _adam[grid](
        w, g, m, v, mask, d, *constants, MASKED=touched is not None, LAZY=lazy, BLOCK=_block(d)
    )  # fmt: skip
