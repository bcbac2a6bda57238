"""Intervals: how sure we are of a number.

Everything here works on plain arrays, one value an item (a document, a prompt, an image), and
returns an `Estimate`: the value with its 95% interval. Rates get Wilson's interval, everything else
a percentile bootstrap over items, or over clusters where items share a source. The bootstrap
percentiles are widened for small samples (Hesterberg 2015, section 3.2.2, "expanded percentile"):
`alpha/2` becomes `Phi(-sqrt(n/(n-1)) * t_{1-alpha/2, n-1})`, because the plain percentile interval
is too narrow by that factor (5 items: 70% as wide as it should be).

What SciPy or scikit-learn do is not written again; both are imported when first used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actlas.core.errors import InputError

Array = NDArray[np.float64]
CHUNK = 4_000_000  # numbers of a resampling matrix that are held at once


class Estimate(NamedTuple):
    """A value with its interval; `nan` with a note where there was nothing to estimate.

    `p` is the p-value of the test that goes with it, where there is one.
    """

    value: float
    low: float
    high: float
    n: int
    note: str = ""
    p: float = math.nan


def bootstrap_mean(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the bootstrap interval of the (weighted) mean.

    Args:
        values: one number an item, shape [n].
        weights: weight of each item (e.g. its tokens), shape [n]; equal if missing.
        clusters: label of each item's source, shape [n]; whole sources are drawn then.
        seed: seed of the draws.
        resamples: how many draws.
        level: coverage of the interval.

    Returns:
        `(low, high)`; `(nan, nan)` for fewer than two items (or clusters).

    Raises:
        InputError: no items, lengths that differ, or a value that is not finite.
    """
    x = finite_array(values, "values")
    w = np.ones_like(x) if weights is None else finite_array(weights, "weights", len(x))
    return bootstrap_ratio(x * w, w, clusters=clusters, seed=seed, resamples=resamples, level=level)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    transform: Callable[[Array], Array] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the bootstrap interval of `transform(sum(numerators) / sum(denominators))`.

    Numerator and denominator of an item are drawn together, so tokens of one document stay together
    (the ratio estimator). Draws whose denominator is zero are left out.

    Args:
        numerators, denominators: shape [n].
        transform: a monotone function of the ratio, e.g. `np.exp` for a perplexity.
        clusters, seed, resamples, level: see `bootstrap_mean`.
    """
    num = finite_array(numerators, "numerators")
    den = finite_array(denominators, "denominators", len(num))
    num, den = by_cluster(num, clusters), by_cluster(den, clusters)
    if len(num) < 2:
        return math.nan, math.nan
    draws = np.concatenate([divide(c @ num, c @ den) for c in resample_counts(len(num), resamples, seed)])
    return percentiles(draws if transform is None else transform(draws), len(num), level)


def bootstrap_statistic(
    statistic: Callable[[Array], Array],
    n: int,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the bootstrap interval of any statistic of `n` items.

    Args:
        statistic: maps how often each item is drawn, shape [draws, n], to one value a draw.
        n: how many items there are.
        seed, resamples, level: see `bootstrap_mean`.
    """
    if n < 2:
        return math.nan, math.nan
    draws = np.concatenate([statistic(counts) for counts in resample_counts(n, resamples, seed)])
    return percentiles(draws, n, level)


def resample_counts(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often each of `n` items is drawn, in blocks of shape [draws, n] (bounded memory)."""
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}")
    generator = np.random.default_rng(seed)
    block = max(1, CHUNK // max(n, 1))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield generator.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)


def percentiles(draws: Array, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the expanded percentile interval of bootstrap draws from `n` items (module docstring)."""
    from scipy.special import ndtr, stdtrit

    draws = draws[np.isfinite(draws)]
    if n < 2 or not len(draws):
        return math.nan, math.nan
    tail = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - level) / 2)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a rate (Wilson 1927); `(nan, nan)` for `n == 0`.

    Raises:
        InputError: not `0 <= successes <= n`.
    """
    if not 0 <= successes <= n:
        raise InputError(f"wilson: successes must lie between 0 and n={n}, not {successes}")
    if n == 0:
        return math.nan, math.nan
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    rate, shift = successes / n, z * z / n
    centre = (rate + shift / 2) / (1 + shift)
    half = z * math.sqrt(rate * (1 - rate) / n + shift / (4 * n)) / (1 + shift)
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exactly, not to rounding
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def finite_array(values: ArrayLike, what: str, length: int | None = None) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise InputError(f"{what} must be one-dimensional, not of shape {list(x.shape)}")
    if not len(x):
        raise InputError(f"{what} are empty: at least one item is needed")
    if length is not None and len(x) != length:
        raise InputError(f"{what} must hold {length} numbers, not {len(x)}")
    if not np.isfinite(x).all():
        raise InputError(f"{what} hold {x[~np.isfinite(x)][0]} at item {int(np.argmin(np.isfinite(x)))}")
    return x


def by_cluster(x: Array, clusters: Sequence[Any] | NDArray[Any] | None) -> Array:
    if clusters is None:
        return x
    if len(clusters) != len(x):
        raise InputError(f"there are {len(x)} items but {len(clusters)} cluster labels")
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(codes, weights=x).astype(np.float64)


def divide(num: Array, den: Array) -> Array:
    out: Array = np.full(num.shape, math.nan)
    return np.divide(num, den, out=out, where=den != 0)
