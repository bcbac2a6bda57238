"""Directions that are means of activations.

    mean        c = mean_i p_i                  "Reading": what solved or wanted texts have in common
    mean_diff   c = mean_i (p_i - n_i)          "Reading-contrast": what tells them from the others

The difference of means is the direction that steers best in most comparisons (Marks and Tegmark 2023;
Im and Li 2025). Without negatives, most of the mean is what all texts share, so that adding it mainly
rescales the activation.

Source: Hojer et al. 2025, "Improving Reasoning Performance in Large Language Models via Representation
Engineering", section 3; Turner et al. 2023; Rimsky et al. 2024.
"""

from __future__ import annotations

from torch import Tensor

from actlas.steering.fits import as_float64, check_length, direction_fit


@direction_fit("mean", data="pairs", summary="the mean of the positive side alone")
def mean(positive: Tensor, negative: Tensor) -> Tensor:
    """Return `mean_i p_i`, `[d]`; the negative side is not used."""
    (p,) = as_float64(positive)
    return check_length(p.mean(0))


@direction_fit("mean_diff", data="pairs", summary="the difference of the two sides' means")
def mean_diff(positive: Tensor, negative: Tensor) -> Tensor:
    """Return `mean_i (p_i - n_i)`, `[d]`; the sides may have different numbers of rows."""
    p, n = as_float64(positive, negative)
    return check_length(p.mean(0) - n.mean(0), p.mean(0))
