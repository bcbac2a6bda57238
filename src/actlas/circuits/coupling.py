"""Coupling: how far one feature vector's score foretells another's, from their angle and lengths alone.

    C(y1, y2) = y1 . y2 / |y1|^2                expected x.y2 per unit of x.y1
    bounds    = |y2| (k cos / |y1| +- sin sqrt(|x|^2 - k^2 / |y1|^2))        for any x with x.y1 = k

The expectation is over x spread evenly on the sphere of radius |x| cut by x.y1 = k: what lies across y1
averages to nothing. Activations with massive channels are not spread so; leave their rows out. Coupling is
not symmetric.

Source: Dunefsky and Cohan 2024, "Observable Propagation", section 4 (geometry derived anew).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.errors import InputError, ShapeError
from actlas.core.intervals import bootstrap_statistic, divide, finite_array
from actlas.core.measurement import Measurement

if TYPE_CHECKING:
    from actlas.circuits.propagate import FeatureVector


def coupling(y1: FeatureVector | Tensor, y2: FeatureVector | Tensor) -> float:
    """Return C(y1, y2): by how much x.y2 rises with each unit of x.y1, on average.

    Raises:
        ShapeError: vectors of different widths.
        InputError: y1 is zero, or the two live at different sites.
    """
    a, b = _both(y1, y2)
    return float(a @ b / (a @ a))


def coupling_bounds(
    y1: FeatureVector | Tensor, y2: FeatureVector | Tensor, k: float, radius: float
) -> tuple[float, float]:
    """Return the least and the greatest x.y2 that any x of length `radius` with x.y1 = k can have.

    Raises:
        InputError: no x of that length has x.y1 = k.
    """
    a, b = _both(y1, y2)
    left = radius**2 - k**2 / float(a @ a)
    if left < 0:
        raise InputError(
            f"no activation of length {radius:.4g} has x.y1 = {k:.4g}: at most {radius * float(a.norm()):.4g}"
        )
    cosine = float(torch.clamp(a @ b / (a.norm() * b.norm()).clamp_min(1e-300), -1, 1))
    middle = k * cosine / float(a.norm())
    reach = math.sqrt(1 - cosine**2) * math.sqrt(left)
    return float(b.norm()) * (middle - reach), float(b.norm()) * (middle + reach)


@dataclass(frozen=True)
class MeasuredCoupling:
    """How far the foretold coupling holds on real activations.

    Attributes:
        predicted: C(y1, y2).
        slope: least-squares slope of x.y2 on x.y1 (with an intercept).
        r2: share of the variance of x.y2 that this line explains.
        inside: share of rows within the bounds (1 always: it is geometry).
        n: rows.
    """

    predicted: float
    slope: float
    r2: float
    inside: float
    n: int


def measured_coupling(y1: FeatureVector | Tensor, y2: FeatureVector | Tensor, x: Tensor) -> MeasuredCoupling:
    """Compare coupling with the scores of activations.

    Args:
        y1, y2: two feature vectors of one site.
        x: activations `[n, d]`, rows of massive activations left out.

    Raises:
        ShapeError: activations of another width.
        InputError: fewer than 3 rows, or scores that do not vary.
    """
    a, b = _both(y1, y2)
    if x.ndim != 2 or x.shape[1] != len(a):
        raise ShapeError(f"activations are [n, {len(a)}], not {list(x.shape)}")
    if len(x) < 3:
        raise InputError(f"{len(x)} activations are too few for a slope; give at least 3")
    wide = x.double().cpu()
    s1, s2 = wide @ a, wide @ b
    d1, d2 = s1 - s1.mean(), s2 - s2.mean()
    if not float(d1 @ d1) > 0:
        raise InputError("the scores of y1 are all the same, so nothing can be foretold from them")
    slope = float(d1 @ d2 / (d1 @ d1))
    r2 = 1 - float((d2 - slope * d1).square().sum() / d2.square().sum().clamp_min(1e-300))
    cosine = float(torch.clamp(a @ b / (a.norm() * b.norm()).clamp_min(1e-300), -1, 1))
    middle = float(b.norm()) * cosine * s1 / a.norm()
    left = (wide.square().sum(1) - s1.square() / (a @ a)).clamp_min(0).sqrt()
    reach = float(b.norm()) * math.sqrt(1 - cosine**2) * left
    room = 1e-6 * (middle.abs() + reach) + 1e-9  # rounding, where the bound is reached
    inside = float(((s2 - middle).abs() <= reach + room).double().mean())
    return MeasuredCoupling(coupling(a, b), slope, r2, inside, len(x))


def coupling_agreement(found: list[MeasuredCoupling], *, seed: int = 0, **group: str) -> Measurement:
    """Return r2 of measured slopes against foretold couplings over several pairs of features.

    It is the r2 of the identity line, `1 - sum (slope - C)^2 / sum (slope - mean slope)^2`, so that a
    constant factor counts as a miss; the squared correlation stands in the details.

    Raises:
        InputError: fewer than 4 pairs.
    """
    if len(found) < 4:
        raise InputError(f"{len(found)} pairs of features are too few for an r2; give at least 4")
    c = finite_array([f.predicted for f in found], "couplings")
    s = finite_array([f.slope for f in found], "slopes")

    def r2(counts: Any) -> Any:
        total = counts.sum(1, keepdims=True)
        middle = counts @ s[:, None] / total
        miss = counts @ np.square(s - c)
        spread = (counts * np.square(s[None] - middle)).sum(1)
        return 1 - divide(miss, spread)

    value = float(r2(np.ones((1, len(s))))[0])
    low, high = bootstrap_statistic(r2, len(s), seed=seed)
    return Measurement(
        "coupling r2", value, "fraction", len(s), low, high, "bootstrap over features", seed, group=group,
        better="higher", note="slopes measured on real tokens against couplings foretold from weights",
        details={
            "squared correlation": float(np.corrcoef(c, s)[0, 1] ** 2),
            "predicted": c.tolist(),
            "slope": s.tolist(),
            "inside the bounds": float(np.mean([f.inside for f in found])),
        },
    )  # fmt: skip


def _both(y1: FeatureVector | Tensor, y2: FeatureVector | Tensor) -> tuple[Tensor, Tensor]:
    sites = [getattr(y, "site", None) for y in (y1, y2)]
    if None not in sites and sites[0] != sites[1]:
        raise InputError(f"the features read different sites, {sites[0]} and {sites[1]}; coupling needs one")
    a, b = (torch.as_tensor(getattr(y, "vector", y)).double().cpu() for y in (y1, y2))
    if a.ndim != 1 or a.shape != b.shape:
        raise ShapeError(f"two vectors of one width are needed, not {list(a.shape)} and {list(b.shape)}")
    if not float(a @ a) > 0:
        raise InputError("y1 is zero, so nothing can be foretold from it")
    return a, b
