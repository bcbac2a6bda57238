"""LogNP polishing: bend numbers so that even steps are fine near 0 and coarse in the tails, and back.

    Phi(x) = sign(x) (log2(|x| + a) - log2 a),      Phi^-1(u) = sign(u) a (2^|u| - 1)

Phi is nearly linear where |x| is below the knee a and logarithmic above it (QuartDepth, Shen et al. 2025).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from actlas.core.errors import InputError

_MOST = 1 << 14
_LN2 = 0.6931471805599453


def polish(x: Tensor, knee: Tensor) -> Tensor:
    """Return Phi(x) = sign(x) (log2(|x| + a) - log2 a) for knees a > 0 that broadcast against x."""
    return x.sign() * torch.log2(x.abs() / knee + 1)


def depolish(u: Tensor, knee: Tensor) -> Tensor:
    """Return Phi^-1(u) = sign(u) a (2^|u| - 1), the inverse of `polish`."""
    return u.sign() * knee * torch.expm1(u.abs() * _LN2)


def knee_of(x: Float[Tensor, "channels n"], percentile: float = 95.0) -> Tensor:
    """Return the knees a, `[channels]`: a percentile of |x| of each channel; 1 for channels that are always
    0.
    """
    if not 0 < percentile <= 100:
        raise InputError(f"the knee is a percentile above 0 and up to 100, not {percentile}")
    size = x.detach().abs().float()
    if size.shape[1] > _MOST:
        size = size[:, :: size.shape[1] // _MOST + 1]
    a = torch.quantile(size, percentile / 100, dim=1)
    a = torch.where(a > 0, a, size.mean(1))
    return torch.where(a > 0, a, torch.ones_like(a))
