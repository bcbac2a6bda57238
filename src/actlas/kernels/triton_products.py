# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, no-any-return"
"""Packed, column and look-up products on CUDA, in Triton.

They read the same bytes as the kernels for the CPU (`native/packed.hpp`, `columns.hpp`, `lookup.hpp`), with
addresses worked out for each code, and leave activations as they are: floats. Not run on a GPU yet: no
machine with one was at hand when this was written. They compile for CUDA (Triton 3.9, compute capability
8.0), and in Triton's interpreter on the CPU (`TRITON_INTERPRET=1`) they agree with the PyTorch references;
their speed is unknown. `ACTLAS_TRITON=0` switches them off.

Only `packed`, `columns` and `binary_coded`, which have the same functions, import this file, when a CUDA
tensor arrives and Triton is installed. No kernel uses atomics, so results are the same at every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from actlas.kernels.binary_coded import BinaryCoded
    from actlas.kernels.columns import PackedColumns
    from actlas.kernels.packed import Packed


@triton.jit
def _packed(
    data, x, bias, out, rows, columns, groups, group_bytes,
    BITS: tl.constexpr, RUNS: tl.constexpr, MIDDLE: tl.constexpr, FLOAT4: tl.constexpr, OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, 16)
    c = tl.arange(0, 32)
    i = c // 4  # the vector of an input
    inside = 4 * r[:, None] + (c % 4)[None, :]
    total = tl.zeros([16], dtype=tl.float32)
    for g in range(groups):
        start = data + (block * groups + g) * group_bytes
        part = tl.zeros([16], dtype=tl.float32)
        seen = 0.0
        for k in range(RUNS):
            p = start + k * 64 * BITS
            if BITS == 8:
                q = tl.load(p + (64 * i)[None, :] + inside).to(tl.int32)
            elif BITS == 4:
                q = (
                    tl.load(p + (64 * (i % 4))[None, :] + inside).to(tl.int32) >> (4 * (i // 4))[None, :]
                ) & 15
            else:
                q = (
                    tl.load(p + (64 * (i // 4))[None, :] + inside).to(tl.int32) >> (2 * (i % 4))[None, :]
                ) & 3
                if BITS == 3:
                    third = tl.load(p + 128 + inside + 0 * i[None, :]).to(tl.int32) >> i[None, :]
                    q += (third & 1) << 2
            if FLOAT4:
                size = q & 7
                # 0 1 2 3 4 6 8 12
                large = tl.where(size == 5, 6, tl.where(size == 6, 8, 12))
                value = tl.where(size < 5, size, large).to(tl.float32)
                value = tl.where(q > 7, -value, value)
            else:
                value = (q - MIDDLE).to(tl.float32)
            v = tl.load(x + token * columns + (g * RUNS + k) * 32 + c)
            part += tl.sum(value * v[None, :], axis=1)
            seen += tl.sum(v, axis=0)
        halves = (start + RUNS * 64 * BITS).to(tl.pointer_type(tl.float16))
        scale = tl.load(halves + r).to(tl.float32)
        total += scale * part
        if OFFSET == 1:
            total += tl.load(halves + 16 + r).to(tl.float32) * seen
        if OFFSET == 2:
            total -= scale * tl.load(halves + 16 + r).to(tl.float32) * seen
    row = block * 16 + r
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0)
    tl.store(out + token * rows + row, total, mask=row < rows)


@triton.jit
def _columns(
    data, scales, active, count, x, out, rows, padded, columns, stride, scale_groups, GROUP: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    total = tl.zeros([BLOCK], dtype=tl.float32)
    # Where the code of a row lies within its column; see native/columns.hpp.
    if BITS <= 8:
        tile = 512 // BITS
        s = r % 64
        byte = r // tile * 64 + 16 * (s % 16 // 4) + 4 * (s // 16) + s % 4
        shift = r % tile // 64 * BITS
    for a in range(count):
        j = tl.load(active + a).to(tl.int64)
        v = tl.load(x + token * columns + j)
        if BITS == 32:
            total += v * tl.load(
                data.to(tl.pointer_type(tl.float32)) + j * (stride // 4) + r, mask=inside, other=0.0
            )
        elif BITS == 16:
            w = tl.load(data.to(tl.pointer_type(tl.bfloat16)) + j * (stride // 2) + r, mask=inside, other=0.0)
            total += v * w.to(tl.float32)
        else:
            q = (tl.load(data + j * stride + byte, mask=inside, other=0).to(tl.int32) >> shift) & (
                (1 << BITS) - 1
            )
            g = j // GROUP
            scale = tl.load(scales + g * padded + r, mask=inside, other=0.0).to(tl.float32)
            if BITS == 8:
                total += v * scale * (q - 128).to(tl.float32)
            else:
                minimum = tl.load(scales + (scale_groups + g) * padded + r, mask=inside, other=0.0).to(
                    tl.float32
                )
                total += v * (scale * q.to(tl.float32) + minimum)
    tl.store(out + token * rows + r, total, mask=inside)


@triton.jit
def _lookup(
    signs, alpha, tables, out, rows, eighths, groups,
    EACH: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for g in range(groups):
        for bit in range(BITS):
            part = tl.zeros([BLOCK], dtype=tl.float32)
            for e in range(EACH):
                at = g * EACH + e
                key = tl.load(signs + (bit * rows + r) * eighths + at, mask=inside, other=0).to(tl.int32)
                part += tl.load(tables + (token * eighths + at) * 256 + key, mask=inside, other=0.0)
            total += part * tl.load(alpha + (bit * rows + r) * groups + g, mask=inside, other=0.0).to(
                tl.float32
            )
    tl.store(out + token * rows + r, total, mask=inside)


def packed_product(w: Packed, x: Tensor) -> Tensor:
    """Do what `packed.packed_product` does for integer formats and f4, with float activations, on CUDA."""
    from actlas.kernels.packed import BITS

    tokens, bits = len(x), BITS[w.format]
    out = torch.empty(tokens, w.rows, device=x.device)
    data = w.data.to(x.device)
    offset = {"none": 0, "minimum": 1, "integer": 2}[w.kind]
    middle = 2 ** (bits - 1) if w.kind == "none" else 0
    group_bytes = 2 * bits * w.group + (64 if offset else 32)
    bias = out if w.bias is None else w.bias.to(x.device)
    if out.numel():
        _packed[(triton.cdiv(w.rows, 16), tokens)](
            data, x.float().contiguous(), bias, out, w.rows, w.columns, w.columns // w.group, group_bytes,
            BITS=bits, RUNS=w.group // 32, MIDDLE=middle, FLOAT4=w.format == "f4", OFFSET=offset,
            BIAS=w.bias is not None,
        )  # fmt: skip
    return out


def column_products(w: PackedColumns, x: Tensor) -> Tensor:
    """Do what `columns.column_products` does, with float activations, on CUDA."""
    bits = {"f32": 32, "bf16": 16, "q8": 8, "q4": 4, "q2": 2}[w.format]
    unit = 512 // bits if bits <= 8 else 1
    padded = triton.cdiv(w.rows, unit) * unit
    stride = (triton.cdiv(padded * bits // 8, 64) | 1) * 64
    data = w.data.to(x.device)
    scales = data[w.columns * stride :].view(torch.float16) if bits <= 8 else data
    active = x.ne(0).any(0).nonzero().flatten().to(torch.int32)
    out = torch.zeros(len(x), w.rows, device=x.device)
    block = min(128, max(16, triton.next_power_of_2(w.rows)))
    if out.numel() and len(active):
        _columns[(triton.cdiv(w.rows, block), len(x))](
            data, scales, active, len(active), x.float().contiguous(), out, w.rows, padded, w.columns, stride,
            w.columns // w.group, GROUP=w.group, BITS=bits, BLOCK=block,
        )  # fmt: skip
    return out


def lookup_product(w: BinaryCoded, x: Tensor) -> Tensor:
    """Do what `binary_coded.lookup_product` does on CUDA, with tables of 256 sums for eight inputs."""
    keys = torch.arange(256, device=x.device)
    signs = 2.0 * (keys.unsqueeze(0) >> torch.arange(8, device=x.device).unsqueeze(1) & 1) - 1  # [8, 256]
    tables = (x.float().view(len(x), -1, 8) @ signs).contiguous()
    out = torch.empty(len(x), w.rows, device=x.device)
    block = min(128, max(16, triton.next_power_of_2(w.rows)))
    if out.numel():
        _lookup[(triton.cdiv(w.rows, block), len(x))](
            w.signs.to(x.device).contiguous(), w.alpha.to(x.device).contiguous(), tables, out, w.rows,
            w.columns // 8, w.alpha.shape[2], EACH=w.group // 8, BITS=w.bits, BLOCK=block,
        )  # fmt: skip
    if w.offset is not None:
        out += x.float().view(len(x), -1, w.group).sum(-1) @ w.offset.to(x.device).float().T
    return out
