"""The largest gap between groups, also for weighted means and for items that share a source."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.intervals import Estimate, percentiles, resample_counts
from actlas.measure.statistics import Gap, largest_gap


def group_gap(
    values: NDArray[np.float64],
    groups: NDArray[Any],
    *,
    weights: NDArray[np.float64] | None = None,
    clusters: NDArray[Any] | None = None,
    min_n: int = 30,
    seed: int = 0,
    resamples: int = 1000,
) -> Gap:
    """Return the greatest minus the least group mean, over groups with at least `min_n` items.

    Without weights and clusters this is `actlas.measure.statistics.largest_gap`. Otherwise a group's
    mean is `sum(w x) / sum(w)`, and items of one source and group are drawn and permuted together.

    Args:
        values: one number an item, shape [n].
        groups: the group of each item, shape [n].
        weights: weight of each item, shape [n].
        clusters: source of each item, shape [n].
        min_n: groups with fewer items do not take part.
        seed: of bootstrap and permutations.
        resamples: how many of each.
    """
    nan = math.nan
    if not len(values):
        return Gap(Estimate(nan, nan, nan, 0, "no items"), "", "")
    if weights is None and clusters is None:
        return largest_gap(values, list(groups), min_n=min_n, seed=seed, resamples=resamples)
    names, sizes = np.unique(groups, return_counts=True)
    names = names[sizes >= min_n]
    if len(names) < 2:
        note = f"fewer than two groups of at least {min_n} items"
        return Gap(Estimate(nan, nan, nan, len(values), note), "", "")
    w = np.ones(len(values)) if weights is None else weights
    sources = np.arange(len(values)) if clusters is None else clusters
    numerators, denominators, codes = [], [], []
    for number, name in enumerate(names):
        here = groups == name
        _, source = np.unique(sources[here], return_inverse=True)
        numerators.append(np.bincount(source, weights=values[here] * w[here]))
        denominators.append(np.bincount(source, weights=w[here]))
        codes.append(np.full(len(numerators[-1]), number))
    num, den, code = np.concatenate(numerators), np.concatenate(denominators), np.concatenate(codes)

    def means(order: NDArray[np.int64]) -> NDArray[np.float64]:
        top = np.bincount(code, weights=num[order], minlength=len(names))
        bottom = np.bincount(code, weights=den[order], minlength=len(names))
        return np.divide(top, bottom, out=np.full(len(names), nan), where=bottom > 0)

    observed = means(np.arange(len(num)))
    if not np.isfinite(observed).all():
        return Gap(Estimate(nan, nan, nan, len(values), "a group has no weight"), "", "")
    least, most = int(observed.argmin()), int(observed.argmax())
    value = float(observed[most] - observed[least])
    generator = np.random.default_rng(seed)
    null = np.array([np.ptp(means(generator.permutation(len(num)))) for _ in range(resamples)])
    null = null[np.isfinite(null)]
    p = (1 + np.count_nonzero(null >= value - 1e-12 * max(1.0, value))) / (1 + len(null))
    draws = []
    for i, group in enumerate((least, most)):
        a, b = num[code == group], den[code == group]
        blocks = [
            (c @ a) / np.maximum(c @ b, 1e-300) for c in resample_counts(len(a), resamples, seed + 1 + i)
        ]
        draws.append(np.concatenate(blocks))
    smallest = min(int((code == least).sum()), int((code == most).sum()))
    low, high = percentiles(draws[1] - draws[0], smallest)
    kept = int(np.isin(groups, names).sum())
    return Gap(Estimate(value, low, high, kept, p=float(p)), str(names[least]), str(names[most]))
