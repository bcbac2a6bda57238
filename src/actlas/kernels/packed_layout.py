"""Where the codes of packed rows lie in memory: see `native/packed.hpp`.

bytes_of(codes [rows, columns], bits, group, scale, offset) <-> codes_of(...)
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.kernels.memory import in_large_pages

ROWS, RUN = 16, 32
#: Twice the values of the 16 codes of a float of 1 sign, 2 exponent and 1 mantissa bits.
FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def bytes_of(codes: Tensor, bits: int, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Return the bytes of a packed weight, uint8 `[bytes]`.

    Args:
        codes: uint8 `[rows, columns]`.
        bits: 8, 4, 3 or 2.
        scale: `[rows, groups]`, stored as float16.
        offset: the same, or `None`.
    """
    (rows, columns), groups = codes.shape, scale.shape[1]
    padding = (0, 0, 0, -rows % ROWS)
    q = torch.nn.functional.pad(codes, padding).view(-1, ROWS, columns // RUN, 8, 4)
    v = q.permute(0, 2, 3, 1, 4).reshape(q.shape[0], columns // RUN, 8, 64)  # [blocks, runs, vectors, 64]
    if bits == 8:
        planes = [v[:, :, i] for i in range(8)]
    elif bits == 4:
        planes = [v[:, :, i] | v[:, :, i + 4] << 4 for i in range(4)]
    else:
        low = v & 3
        planes = [
            low[:, :, i] | low[:, :, i + 1] << 2 | low[:, :, i + 2] << 4 | low[:, :, i + 3] << 6
            for i in (0, 4)
        ]
        if bits == 3:
            third = torch.zeros_like(planes[0])
            for i in range(8):
                third |= (v[:, :, i] >> 2) << i
            planes.append(third)
    body = torch.stack(planes, 2).view(len(q), groups, -1)
    parts = [body, *(_half_bytes(t, padding) for t in (scale, offset) if t is not None)]
    return in_large_pages(torch.cat(parts, -1).flatten().contiguous())


def codes_of(
    data: Tensor, rows: int, columns: int, bits: int, group: int, offset: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes uint8 `[rows, columns]`, scale and offset float32 `[rows, groups]`."""
    blocks, groups = -(-rows // ROWS), columns // group
    table = data.view(blocks, groups, -1)
    size = 2 * bits * group
    planes = table[..., :size].reshape(blocks, columns // RUN, -1, 64)
    if bits == 8:
        v = planes
    elif bits == 4:
        v = torch.cat([planes & 15, planes >> 4], 2)
    else:
        v = torch.stack([planes[:, :, i // 4] >> (2 * (i % 4)) & 3 for i in range(8)], 2)
        if bits == 3:
            v = v | torch.stack([(planes[:, :, 2] >> i & 1) << 2 for i in range(8)], 2)
    q = v.view(blocks, columns // RUN, 8, ROWS, 4).permute(0, 3, 1, 2, 4).reshape(-1, columns)[:rows]

    def halves(start: int) -> Tensor:
        part = table[..., start : start + 32].contiguous().view(torch.float16).float()
        return part.transpose(1, 2).reshape(blocks * ROWS, groups)[:rows]

    return q, halves(size), halves(size + 32) if offset else None


def nearest_float4(x: Tensor) -> Tensor:
    """Return the codes of the nearest values of `FLOAT4`, uint8 as `x`; ties go to the even code."""
    edges = torch.tensor([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0])
    size = x.abs().contiguous()
    code = torch.bucketize(size, edges)
    tied = size == torch.nn.functional.pad(edges, (0, 1), value=torch.inf)[code]
    code = code + (tied & (code % 2 == 1))
    return (code + 8 * (x < 0)).to(torch.uint8)


def _half_bytes(values: Tensor, padding: tuple[int, ...]) -> Tensor:
    """[rows, groups] -> float16 as uint8 [blocks, groups, 32]."""
    padded = torch.nn.functional.pad(values.half(), padding)
    return padded.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)
