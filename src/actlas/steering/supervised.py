"""Directions of linear probes: the weight that tells the sides apart, or predicts a number.

    logistic   w of L2-regularised logistic regression        c = w (w . m) / |w|^2
    ridge      w of least squares with an L2 penalty          pairs: the same; numbers: w std(y) / |w|^2

The probe reads best what a difference of means may steer better (Marks and Tegmark 2023): a weight also
serves to cancel what is correlated with the label. `c` covers what the mean difference m has along w, so
that strengths of all fits mean the same. Fitting and standardisation are those of `core.probe`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.probe import _fit, _penalty
from actlas.core.probe_data import Examples
from actlas.steering.fits import along, as_float64, check_length, direction_fit


@direction_fit("logistic", data="pairs", summary="the weight of a logistic probe of the two sides")
def logistic(
    positive: Tensor,
    negative: Tensor,
    *,
    regularisation: float | None = None,
    standardise: bool = True,
) -> Tensor:
    """Return the displacement along a logistic probe's weight, `[d]`.

    Args:
        positive, negative: `[n, d]`.
        regularisation: L2 penalty; default 1.
        standardise: divide each channel by its standard deviation first.
    """
    p, n = as_float64(positive, negative)
    x, y = torch.cat([p, n]), torch.cat([torch.ones(len(p)), torch.zeros(len(n))])
    weight = _weight(x, y, "logistic", regularisation, standardise)
    return along(weight, p.mean(0) - n.mean(0))


@direction_fit("ridge", data="numbers", summary="the weight of a ridge regression of a number")
def ridge(x: Tensor, y: Tensor, *, regularisation: float | None = None, standardise: bool = True) -> Tensor:
    """Return the displacement along a ridge regression's weight, `[d]`.

    At strength 1 the predicted number rises by one standard deviation of `y`, and from one side's mean to
    the other's if `y` is 0 and 1.

    Args:
        x: `[n, d]`.
        y: `[n]`.
        regularisation: L2 penalty; default d.
        standardise: divide each channel by its standard deviation first.

    Raises:
        InputError: numbers that are all equal.
    """
    x, y = as_float64(x, y)
    if len(y.unique()) < 2:
        raise InputError(f"every number is {float(y[0]):g}; ridge needs numbers that differ")
    weight = _weight(x, y, "ridge", regularisation, standardise)
    if bool(((y == 0) | (y == 1)).all()):
        return along(weight, x[y == 1].mean(0) - x[y == 0].mean(0))
    return check_length(weight * y.std(correction=0) / (weight @ weight).clamp_min(1e-300))


def _weight(x: Tensor, y: Tensor, kind: str, regularisation: float | None, standardise: bool) -> Tensor:
    examples = Examples(x.numpy(), y.double().numpy(), np.arange(len(y)))
    penalty = _penalty(regularisation, kind, x.shape[1])
    return torch.from_numpy(_fit(examples, kind, standardise, penalty).weight)
