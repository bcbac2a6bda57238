"""Codes of 1 to 8 bits packed into bytes, in the order of the entries, low bits first.

Eight codes of b bits make b bytes, so 3-bit codes really take 3 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.core.errors import InputError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (uint8, each below `2^bits`) as bytes, uint8 `[ceil(n / 8) * bits]`.

    Raises:
        InputError: bits beyond 8, or a code that does not fit.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"codes of 1 to 8 bits can be packed, not {bits}")
    flat = codes.flatten().to(torch.uint8)
    if bits == 8:
        return flat
    if flat.numel() and int(flat.max()) >= 1 << bits:
        raise InputError(f"a code of {int(flat.max())} does not fit into {bits} bits")
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    if bits in (1, 2, 4):
        per = 8 // bits
        parts = flat.view(-1, per)
        out = parts[:, 0].clone()
        for i in range(1, per):
            out |= parts[:, i] << (i * bits)
        return out
    word = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    for i in range(8):
        word |= flat[:, i].long() << (i * bits)
    return torch.stack([(word >> (8 * i)) & 255 for i in range(bits)], 1).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Return the codes, uint8 of a shape.

    Raises:
        InputError: there are not as many bytes as the shape needs.
    """
    n = 1
    for size in shape:
        n *= size
    want = n if bits == 8 else -(-n // 8) * bits
    if packed.numel() != want:
        raise InputError(f"{n} codes of {bits} bits take {want} bytes, and there are {packed.numel()}")
    if bits == 8:
        return packed.reshape(shape)
    if bits in (1, 2, 4):
        mask = (1 << bits) - 1
        parts = torch.stack([(packed >> (i * bits)) & mask for i in range(8 // bits)], 1)
        return parts.flatten()[:n].reshape(shape)
    bytes_ = packed.view(-1, bits).long()
    word = torch.zeros(len(bytes_), dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= bytes_[:, i] << (8 * i)
    mask = (1 << bits) - 1
    codes = torch.stack([(word >> (i * bits)) & mask for i in range(8)], 1)
    return codes.flatten()[:n].to(torch.uint8).reshape(shape)
