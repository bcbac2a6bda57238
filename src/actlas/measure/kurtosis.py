"""Excess kurtosis of hidden states: how much a few channels stick out.

    k(x) = mean((x - mean x)^4) / (mean (x - mean x)^2)^2 - 3        over the channels of one token

0 for Gaussian values, thousands where one channel holds most of the length. It depends on the basis: a random
rotation takes it to about 0. `token-kurtosis` measures it on a model, layer by layer (`measure.residual`).

`official=True` is what the released script of outlier-safe pre-training computes for a token: the uncentred
fourth moment over the fourth power of the centred (sample) deviation, less 3, and 0 where that is negative.
The script also feeds every token as a sequence of its own, so that each is a first token and sees no other.

Source: "Outlier-Safe Pre-Training" (Park et al. 2025), `evaluate_kurtosis.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.core.calibration.accumulators import row_excess_kurtosis
from actlas.core.errors import InputError


def excess_kurtosis(x: Tensor, *, official: bool = False) -> Tensor:
    """Return the excess kurtosis of each row of `[..., channels]`, float64 `[...]`; NaN for constant rows.

    Args:
        x: hidden states.
        official: the released script's formula.

    Raises:
        InputError: fewer than two channels.
    """
    if x.ndim < 1 or x.shape[-1] < 2:
        raise InputError(f"kurtosis needs at least two channels, not {list(x.shape)}")
    if not official:
        return row_excess_kurtosis(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])
    wide = x.double()
    fourth, deviation = wide.pow(4).mean(-1), wide.std(-1)
    found: Tensor = torch.where(deviation > 0, fourth / deviation.pow(4) - 3, torch.nan)
    return found.clamp_min(0)
