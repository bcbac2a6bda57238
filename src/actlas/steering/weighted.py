"""Label-weighted means: the covariance of activation and number, for entropies, lengths, risks.

    u = (1/Z) sum_i y_i (z_i - zbar),    Z = sum_i |y_i|

Because the z_i - zbar sum to 0, a constant added to y changes only Z: u is the covariance of activation
and number, `sum (y - ybar)(z - zbar) / Z`. With y = 1 and 0 it is half the difference of means (for sides
of equal size).

Entropic activation steering weights the activations of logged prompts by the entropy of the action
distribution that each leads to. Its reading notes leave open whether the mean is taken over all prompts or
within an episode; `group` gives the latter.

Source: Rahn et al. 2024, "Controlling Large Language Model Agents with Entropic Activation Steering"
(EAST), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.steering.fits import as_float64, check_length, direction_fit


@direction_fit("cov", data="numbers", summary="activations weighted by a number for each text (EAST)")
def cov(x: Tensor, y: Tensor, *, group: Sequence[Any] | None = None) -> Tensor:
    """Return the covariance of activations and numbers, `[d]`, divided by `mean |y|`.

    Args:
        x: `[n, d]`.
        y: `[n]`, e.g. action entropies.
        group: an episode for each row; activations are then centred within their episode.

    Raises:
        InputError: numbers that are all equal, or groups that do not go with the rows.
    """
    x, y = as_float64(x, y)
    if len(y.unique()) < 2:
        raise InputError(f"every number is {float(y[0]):g}; cov needs numbers that differ")
    centred = x - (x.mean(0) if group is None else _group_means(x, group))
    return check_length(y @ centred / y.abs().sum())


def _group_means(x: Tensor, group: Sequence[Any]) -> Tensor:
    if len(group) != len(x):
        raise InputError(f"there are {len(x)} texts but {len(group)} groups")
    names = {name: i for i, name in enumerate(dict.fromkeys(group))}
    code = torch.tensor([names[name] for name in group])
    sums = torch.zeros(len(names), x.shape[1], dtype=x.dtype).index_add_(0, code, x)
    return (sums / code.bincount().unsqueeze(1))[code]
