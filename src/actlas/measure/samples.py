"""From per-item values to a Measurement: the interval is computed and the items are kept.

A measure that has one number an item (a document, a prompt, an image) hands them over here. The
items stay on the Measurement as `samples` and `weights`, so that `compare` can pair two runs.
Where the reported value is a function of the mean (a perplexity is `exp` of the mean), its name in
`TRANSFORMS` is kept in `details["transform"]`, the source of each item in `details["clusters"]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actlas.core.errors import InputError
from actlas.core.intervals import Array, bootstrap_ratio, finite_array, wilson
from actlas.core.measurement import Better, Measurement

TRANSFORMS: dict[str, Callable[[Array], Array]] = {"exp": np.exp}


def mean_measurement(
    name: str,
    unit: str,
    samples: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    seed: int = 0,
    over: str = "documents",
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    transform: str | None = None,
    better: Better | None = None,
    group: Mapping[str, str] | None = None,
    note: str = "",
    details: Mapping[str, Any] | None = None,
    resamples: int = 1000,
) -> Measurement:
    """Return the weighted mean of the samples (or a function of it) with its bootstrap interval.

    Args:
        name, unit, better, group, note, details: see `Measurement`.
        samples: one number an item, shape [n]. An empty array gives a `nan` measurement.
        weights: weight of each item, shape [n]; items of weight 0 do not count.
        over: what the items are, for the interval's description.
        clusters: label of each item's source; whole sources are drawn then, and `n` counts them.
        transform: a name in `TRANSFORMS` that is applied to the mean.
        seed, resamples: of the bootstrap.

    Raises:
        InputError: samples that are not finite, weights that do not fit.
    """
    if transform is not None and transform not in TRANSFORMS:
        raise InputError(f"unknown transform {transform!r}: one of {', '.join(TRANSFORMS)}")
    if not np.size(samples):
        return missing(name, unit, note or f"no {over}", group=group)
    x = finite_array(samples, name)
    w = np.ones_like(x) if weights is None else finite_array(weights, f"weights of {name}", len(x))
    if w.sum() <= 0:
        return missing(name, unit, note or "all weights are 0", group=group)
    apply = TRANSFORMS[transform] if transform else None
    mean = np.asarray((x @ w) / w.sum())
    low, high = bootstrap_ratio(x * w, w, clusters=clusters, transform=apply, seed=seed, resamples=resamples)
    extra: dict[str, Any] = {"transform": transform} if transform else {}
    n = int(np.count_nonzero(w))
    if clusters is not None:
        codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
        extra["clusters"], n = codes.tolist(), int(codes.max()) + 1
    return Measurement(
        name=name,
        value=float(mean if apply is None else apply(mean)),
        unit=unit,
        n=n,
        low=None if math.isnan(low) else low,
        high=None if math.isnan(high) else high,
        interval=f"bootstrap over {over}",
        seed=seed,
        better=better,
        group=dict(group or {}),
        note=note or (f"one of {over}: no interval" if math.isnan(low) else ""),
        details={**(details or {}), **extra},
        samples=x,
        weights=None if weights is None else w,
    )


def rate_measurement(
    name: str,
    hits: ArrayLike,
    *,
    unit: str = "fraction",
    seed: int | None = None,
    better: Better | None = None,
    group: Mapping[str, str] | None = None,
    note: str = "",
    details: Mapping[str, Any] | None = None,
) -> Measurement:
    """Return the share of hits among independent items with Wilson's interval.

    Args:
        hits: whether each item is a hit, shape [n]. An empty array gives a `nan` measurement.
        seed: the seed that drew the items, for the record (Wilson's interval needs none).
        name, unit, better, group, note, details: see `Measurement`.
    """
    h = np.asarray(hits)
    if h.ndim != 1 or not np.isin(h, (0, 1)).all():
        raise InputError(f"{name}: hits must be a list of true or false, not of shape {list(h.shape)}")
    x = h.astype(np.float64)
    n = len(x)
    low, high = wilson(float(x.sum()), n)
    return Measurement(
        name=name,
        value=float(x.mean()) if n else math.nan,
        unit=unit,
        n=n,
        low=low if n else None,
        high=high if n else None,
        interval="wilson",
        seed=seed,
        better=better,
        group=dict(group or {}),
        note=note or ("" if n else "no items"),
        details=dict(details or {}),
        samples=x,
    )


def missing(name: str, unit: str, note: str, *, group: Mapping[str, str] | None = None) -> Measurement:
    """Return a `nan` measurement that says why there is no number."""
    return Measurement(name=name, value=math.nan, unit=unit, n=0, note=note, group=dict(group or {}))
