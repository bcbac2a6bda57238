"""Differences: whether two runs over the same items, or several groups of items, really differ.

Paired bootstrap and permutation tests, Holm's correction, and the largest gap between groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actlas.core.errors import InputError
from actlas.core.intervals import (
    CHUNK,
    Array,
    Estimate,
    by_cluster,
    divide,
    finite_array,
    percentiles,
    resample_counts,
)

Alternative = Literal["two-sided", "less", "greater"]


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    weights_a: ArrayLike | None = None,
    weights_b: ArrayLike | None = None,
    *,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    transform: Callable[[Array], Array] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Estimate:
    """Return `T(mean of b) - T(mean of a)` for two runs over the same items.

    Items are drawn for both runs together, so what the items have in common cancels. For rates this
    is the interval that goes with McNemar's test. `p` is the sign-flip permutation test: in each
    permutation the two runs of each item (or cluster) are swapped with probability one half.

    Args:
        a, b: one number an item in the first and the second run, shape [n].
        weights_a, weights_b: weights in each run; `weights_b` defaults to `weights_a`.
        clusters: label of each item's source.
        transform: `T`, e.g. `np.exp` for perplexities; the identity if missing.
    """
    x = finite_array(a, "a")
    y = finite_array(b, "b", len(x))
    wx = np.ones_like(x) if weights_a is None else finite_array(weights_a, "weights_a", len(x))
    wy = wx if weights_b is None else finite_array(weights_b, "weights_b", len(x))
    t = transform or (lambda v: v)
    parts = [by_cluster(v, clusters) for v in (x * wx, wx, y * wy, wy)]
    num_a, den_a, num_b, den_b = parts
    n = len(num_a)

    def differences(blocks: Iterator[Array], swap: bool) -> Array:
        out = []
        for c in blocks:
            one, other = (c, 1 - c) if swap else (c, c * 0)
            first = divide(one @ num_a + other @ num_b, one @ den_a + other @ den_b)
            second = divide(one @ num_b + other @ num_a, one @ den_b + other @ den_a)
            out.append(t(second) - t(first))
        return np.concatenate(out)

    value = float(differences(iter([np.ones((1, n))]), swap=False)[0])
    if n < 2:
        return Estimate(value, math.nan, math.nan, len(x), "one item: no interval")
    low, high = percentiles(differences(resample_counts(n, resamples, seed), False), n, level)
    null = differences(_coin_flips(n, resamples, seed + 1), True)
    return Estimate(value, low, high, len(x), p=_p_value(np.abs(null), abs(value)))


def permutation_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    paired: bool = False,
    alternative: Alternative = "two-sided",
    seed: int = 0,
    resamples: int = 9999,
) -> float:
    """Return the p-value of "the means of a and b do not differ"; exact where the sample is small.

    `alternative="greater"` asks whether the mean of `a` is greater. Computed by
    `scipy.stats.permutation_test`.
    """
    from scipy import stats

    x, y = finite_array(a, "a"), finite_array(b, "b")
    if paired and len(x) != len(y):
        raise InputError(f"paired samples must be of one length, not {len(x)} and {len(y)}")
    if len(x) + len(y) < 3 or not (len(x) and len(y)):
        return math.nan

    def statistic(u: Array, v: Array, axis: int = -1) -> Any:
        return np.mean(u, axis=axis) - np.mean(v, axis=axis)

    result = stats.permutation_test(
        (x, y),
        statistic,
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, CHUNK // (len(x) + len(y))),
        alternative=alternative,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: ArrayLike) -> Array:
    """Return Holm's adjusted p-values (Holm 1979); `nan`s stay and are not counted as tests."""
    p = np.asarray(p_values, dtype=np.float64)
    if ((p < 0) | (p > 1)).any():
        raise InputError(f"p-values lie between 0 and 1, not {p[(p < 0) | (p > 1)][0]}")
    out = np.full(p.shape, math.nan)
    here = np.flatnonzero(np.isfinite(p))
    order = here[np.argsort(p[here], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    out[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return out


class Gap(NamedTuple):
    """The largest difference between groups, and which groups make it."""

    estimate: Estimate
    lowest: str
    highest: str


def largest_gap(
    values: ArrayLike, groups: Sequence[str], *, min_n: int = 30, seed: int = 0, resamples: int = 1000
) -> Gap:
    """Return the greatest minus the least group mean, over groups with at least `min_n` items.

    The interval is a bootstrap within the two groups that were found; `p` is a permutation test of
    "no group differs" with the gap itself as the statistic, so that choosing the two extreme groups
    is paid for (card practice of Mitchell et al. 2019, section 4.7).
    """
    x = finite_array(values, "values")
    labels = np.asarray(groups, dtype=str)
    if len(labels) != len(x):
        raise InputError(f"there are {len(x)} values but {len(labels)} group labels")
    names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    large = np.flatnonzero(sizes >= min_n)
    if len(large) < 2:
        note = f"fewer than two groups of at least {min_n} items"
        return Gap(Estimate(math.nan, math.nan, math.nan, len(x), note), "", "")
    keep = np.isin(codes, large)
    kept, code = x[keep], np.searchsorted(large, codes[keep])
    count = sizes[large].astype(np.float64)

    def means(v: Array) -> Array:
        return np.bincount(code, weights=v, minlength=len(large)) / count

    observed = means(kept)
    least, most = int(observed.argmin()), int(observed.argmax())
    value = float(observed[most] - observed[least])
    generator = np.random.default_rng(seed)
    null = np.array([np.ptp(means(generator.permutation(kept))) for _ in range(resamples)])
    draws = [
        np.concatenate([c @ v / len(v) for c in resample_counts(len(v), resamples, seed + 1 + i)])
        for i, v in enumerate((kept[code == least], kept[code == most]))
    ]
    low, high = percentiles(draws[1] - draws[0], int(min(count[least], count[most])))
    estimate = Estimate(value, low, high, int(keep.sum()), p=_p_value(null, value))
    return Gap(estimate, str(names[large[least]]), str(names[large[most]]))


def _coin_flips(n: int, resamples: int, seed: int) -> Iterator[Array]:
    generator = np.random.default_rng(seed)
    block = max(1, CHUNK // n)
    for start in range(0, resamples, block):
        yield generator.integers(0, 2, (min(block, resamples - start), n)).astype(np.float64)


def _p_value(null: Array, observed: float) -> float:
    """`(1 + how many are at least as extreme) / (1 + draws)`, which is never 0 (Phipson, Smyth 2010)."""
    null = null[np.isfinite(null)]
    tolerance = 1e-12 * max(1.0, abs(observed))
    return float((1 + np.count_nonzero(null >= observed - tolerance)) / (1 + len(null)))
