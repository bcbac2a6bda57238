"""Principal directions: along what do the differences, or the activations, vary most?

    pca_diff     v_1 = argmax_{|v| = 1}  sum_i ((p_i - n_i) . v)^2          c = s |m| v_1
    pca_pooled   v_1 of all p_i and n_i about their common mean             c = s |m| v_1

with m = mean_i (p_i - n_i) and the sign s that makes `c . m` positive: a component has no sign of its own.

`centre=True` subtracts m from the differences first, as scikit-learn's PCA does. What is left varies among
the pairs and has no reason to look like what they have in common (the cosine with m can be near 0), so it
is off here; the released code of representation engineering for reasoning has it on.

Source: Zou et al. 2023, "Representation Engineering", section 3.1; Hojer et al. 2025, section 3
("PCA-contrast", rescaled to the norm of the mean).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.steering.fits import as_float64, check_length, direction_fit

Rescale = Literal["mean_norm", "projection", "unit"]


@direction_fit(
    "pca_diff", data="pairs", aligned=True, summary="the first principal component of the differences"
)
def pca_diff(
    positive: Tensor, negative: Tensor, *, centre: bool = False, rescale: Rescale = "mean_norm"
) -> Tensor:
    """Return the first principal component of the differences, `[d]`.

    Args:
        positive, negative: `[n, d]`.
        centre: subtract the mean difference first (the released code); see the module docstring.
        rescale: length of the result: the mean difference's (`"mean_norm"`), that of the mean's
            projection on it (`"projection"`), or 1 (`"unit"`).

    Raises:
        InputError: an unknown `rescale`, or differences that do not vary.
    """
    p, n = as_float64(positive, negative)
    difference = p - n
    m = difference.mean(0)
    return _scaled(_first(difference - m if centre else difference), m, rescale)


@direction_fit("pca_pooled", data="pairs", summary="the first principal component of both sides together")
def pca_pooled(positive: Tensor, negative: Tensor, *, rescale: Rescale = "mean_norm") -> Tensor:
    """Return the first principal component of all activations about their mean, `[d]`.

    It does not use which texts are pairs, only, for its sign and length, which side they are on.
    """
    p, n = as_float64(positive, negative)
    rows = torch.cat([p, n])
    return _scaled(_first(rows - rows.mean(0)), p.mean(0) - n.mean(0), rescale)


def _first(rows: Tensor) -> Tensor:
    """Return the right singular vector of the largest singular value, `[d]`."""
    _, size, right = torch.linalg.svd(rows, full_matrices=False)
    if not float(size[0]) > 1e-9 * max(float(rows.abs().max()), 1e-30):
        raise InputError(
            f"the {len(rows)} rows do not vary, so they have no principal component; give more pairs, "
            "or centre=False"
        )
    first: Tensor = right[0]
    return first


def _scaled(component: Tensor, m: Tensor, rescale: str) -> Tensor:
    cosine = component @ m
    sign = 1.0 if float(cosine) >= 0 else -1.0
    lengths = {"mean_norm": m.norm(), "projection": cosine.abs(), "unit": torch.ones(())}
    if rescale not in lengths:
        raise InputError(f"rescale is {rescale!r}; it must be one of {', '.join(lengths)}")
    return check_length(sign * lengths[rescale] * component)
