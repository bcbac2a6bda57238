"""Floating-point grids of few bits: levels, rounding to nearest even, and codes.

With a sign, E bits of exponent, M bits of mantissa and bias b the levels are

    subnormal   2^(1-b) m / 2^M                   (exponent field 0)
    normal      2^(e-b) (1 + m / 2^M)

The bias is 2^(E-1) - 1. All codes are numbers, as in the OCP formats e2m1, e2m3, e3m2, except in e4m3, whose
largest code is NaN (largest level 448), and e5m2, which keeps IEEE infinities (57344). A code is the sign
above the bits of exponent and mantissa, which are in the order of the levels.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_RESERVED = {(4, 3): 1, (5, 2): 4}


@cache
def float_levels(exp_bits: int, man_bits: int) -> Tensor:
    """Return the levels that are not negative, in the order of their codes, float64 `[n]`."""
    bias = 2 ** (exp_bits - 1) - 1
    found = []
    for e in range(2**exp_bits):
        for m in range(2**man_bits):
            part = m / 2**man_bits
            found.append(2.0 ** (1 - bias) * part if e == 0 else 2.0 ** (e - bias) * (1 + part))
    kept = len(found) - _RESERVED.get((exp_bits, man_bits), 0)
    return torch.tensor(found[:kept], dtype=torch.float64)


def largest(exp_bits: int, man_bits: int) -> float:
    """Return the largest level."""
    return float(float_levels(exp_bits, man_bits)[-1])


def round_to_float(x: Tensor, exp_bits: int, man_bits: int) -> Tensor:
    """Return x (float32 or wider) on the grid, ties to even; values beyond the largest level become it."""
    bias = 2 ** (exp_bits - 1) - 1
    most = largest(exp_bits, man_bits)
    exponent = torch.frexp(x).exponent - 1  # of the leading bit; exact, unlike a logarithm
    step = torch.ldexp(torch.ones_like(x), exponent.clamp_min(1 - bias) - man_bits)
    return ((x / step).round() * step).clamp(-most, most)


def float_codes(on_grid: Tensor, exp_bits: int, man_bits: int) -> Tensor:
    """Return the codes of values that lie on the grid, uint8."""
    levels = float_levels(exp_bits, man_bits).to(on_grid)
    index = torch.searchsorted(levels, on_grid.abs().contiguous())
    sign = (on_grid < 0) | ((on_grid == 0) & torch.signbit(on_grid))
    return (index + (sign.long() << (exp_bits + man_bits))).to(torch.uint8)


def float_values(codes: Tensor, exp_bits: int, man_bits: int) -> Tensor:
    """Return the levels of codes, float32."""
    levels = float_levels(exp_bits, man_bits).float().to(codes.device)
    top = 1 << (exp_bits + man_bits)
    wide = codes.long()
    values = levels[(wide & (top - 1)).clamp_max(len(levels) - 1)]
    return torch.where(wide >= top, -values, values)
