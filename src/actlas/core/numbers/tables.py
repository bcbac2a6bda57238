"""Levels that are not evenly spaced: NF4, powers of two, and sums of signs.

NF4 (Dettmers et al. 2023, QLoRA) has the 16 levels at quantiles of a Gaussian, with an exact 0. Multi-basis
binary coding writes a group as `sum_i alpha_i b_i` with signs b; the greedy fit takes one sign at a time,
with alpha the mean of what is left.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def nf4_levels() -> Tensor:
    """Return NF4's 16 levels in [-1, 1], float64: quantiles of a Gaussian at even steps of probability.

    Eight positive and seven negative ones and 0, normalised to 1; the outermost probability is the mean of
    `1 - 1/32` and `1 - 1/30`, as in QLoRA's code.
    """
    outer = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))

    def quantile(p: Tensor) -> Tensor:
        return 2**0.5 * torch.erfinv(2 * p - 1)

    positive = quantile(torch.linspace(outer, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(outer, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return levels / levels.abs().max()


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest of sorted levels, the lower one at a tie."""
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.searchsorted(middles.to(x), x.contiguous())


def log2_codes(p: Tensor, bits: int) -> Tensor:
    """Return `round(-log2 p)` of values in [0, 1], clipped at 0; `2^bits` stands for an exact 0."""
    zero = 1 << bits
    code = (-torch.log2(p.clamp_min(torch.finfo(torch.float32).tiny))).round().clamp(0, zero)
    return code.to(torch.uint8)


def log2_values(codes: Tensor, bits: int) -> Tensor:
    """Return `2^-code`, and 0 for the code `2^bits`."""
    values = torch.exp2(-codes.float())
    return torch.where(codes == (1 << bits), torch.zeros_like(values), values)


def greedy_signs(groups: Tensor, bases: int) -> tuple[Tensor, Tensor]:
    """Return alpha `[rows, groups, bases]` and codes `[rows, groups, entries]` of the greedy binary fit.

    Bit i of a code is 1 where the i-th sign is +1; the sign of 0 is +1.
    """
    rest, codes, alphas = groups.clone(), torch.zeros_like(groups, dtype=torch.uint8), []
    for i in range(bases):
        positive = rest >= 0
        alpha = rest.abs().mean(-1, keepdim=True)
        rest = rest - torch.where(positive, alpha, -alpha)
        codes |= positive.to(torch.uint8) << i
        alphas.append(alpha)
    return torch.cat(alphas, -1), codes


def code_signs(groups: Tensor, alpha: Tensor) -> Tensor:
    """Return the codes of the nearest signed sums of given scales `alpha` `[rows, groups, bases]`."""
    bases = alpha.shape[-1]
    sums = signed_sums(alpha)  # [rows, groups, 2^bases]
    order = sums.argsort(-1)
    sorted_sums = sums.gather(-1, order)
    middles = (sorted_sums[..., 1:] + sorted_sums[..., :-1]) / 2
    index = torch.searchsorted(middles.contiguous(), groups.contiguous()) if bases else groups
    return order.gather(-1, index).to(torch.uint8)


def signed_sums(alpha: Tensor) -> Tensor:
    """Return what each code `0 ... 2^bases - 1` stands for, `[rows, groups, 2^bases]`."""
    bases = alpha.shape[-1]
    code = torch.arange(1 << bases, device=alpha.device)
    signs = torch.stack([((code >> i) & 1) * 2 - 1 for i in range(bases)]).to(alpha)
    return alpha @ signs
