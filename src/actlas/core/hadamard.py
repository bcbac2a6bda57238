"""Block Hadamard rotations: mix neighbours so that no channel sticks out, in n log n additions.

    y = block_hadamard(x, 64)            # the last axis in blocks of 64, each times H / sqrt(64)

H is symmetric and orthogonal, so applying it twice gives x back. Sizes are powers of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.core.errors import InputError


def largest_block(width: int, most: int = 128) -> int:
    """Return the largest power of two, at most `most`, that divides a width."""
    block = 1
    while block * 2 <= most and width % (block * 2) == 0:
        block *= 2
    return block


def block_hadamard(x: Tensor, size: int) -> Tensor:
    """Return x with every block of `size` entries of the last axis rotated.

    Raises:
        InputError: size is no power of two, or does not divide the axis.
    """
    if size < 1 or size & (size - 1):
        raise InputError(f"a Hadamard block has a power of two entries, not {size}")
    if x.shape[-1] % size:
        raise InputError(
            f"{x.shape[-1]} entries cannot be cut into blocks of {size}; "
            f"the largest is {largest_block(x.shape[-1])}"
        )
    shape, half = x.shape, 1
    out = x.reshape(-1, size)
    plain = not (torch.is_grad_enabled() and x.requires_grad)
    while half < size:
        pairs = out.view(-1, size // (2 * half), 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        if plain:  # the same numbers, written once
            new = torch.empty_like(pairs)
            torch.add(a, b, out=new[:, :, 0])
            torch.sub(a, b, out=new[:, :, 1])
        else:
            new = torch.stack([a + b, a - b], 2)
        out = new.view(-1, size)
        half *= 2
    rotated: Tensor = (out * size**-0.5).reshape(shape)
    return rotated


def random_hadamard(width: int, seed: int = 0, block: int | None = None) -> Tensor:
    """Return an orthogonal matrix `[width, width]`, float64: random signs, then Hadamard blocks."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    return block_hadamard(torch.diag(signs), block or largest_block(width, 1 << 20))
