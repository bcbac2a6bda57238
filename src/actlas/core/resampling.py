"""Bootstrap intervals for what core itself measures when it fits a lens.

Items that share a source (a pair, a document) are drawn together. The percentiles are widened for few
sources as in `actlas.measure.intervals` (Hesterberg 2015, "expanded percentile"), so that a probe's
interval and a card's mean the same. `actlas.measure` has the full set; it lies above this room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 1000
_Z = 1.959963984540054
_CHUNK = 2_000_000  # numbers of a resampling matrix that are held at once


def draws(groups: Sequence[Any] | NDArray[Any], seed: int) -> Iterator[Array]:
    """Yield how often each item is drawn, `[draws, n]`, whole groups together, in bounded blocks."""
    _, code = np.unique(np.asarray(groups), return_inverse=True)
    n = int(code.max()) + 1
    generator = np.random.default_rng(seed)
    block = max(1, min(RESAMPLES, _CHUNK // len(code)))
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        yield generator.multinomial(n, np.full(n, 1 / n), size).astype(np.float64)[:, code]


def percentiles(blocks: Iterable[Array], groups: Sequence[Any] | NDArray[Any]) -> tuple[float, float]:
    """Return the 95% interval of resampled values; `(nan, nan)` for fewer than two groups."""
    from scipy.special import ndtr, stdtrit

    values = np.concatenate(list(blocks))
    values = values[np.isfinite(values)]
    n = len(np.unique(np.asarray(groups)))
    if n < 2 or not len(values):
        return math.nan, math.nan
    tail = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.025)))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(values: Array, groups: Sequence[Any] | NDArray[Any], seed: int) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean of `values`, shape `[n]`."""
    return percentiles((d @ values / d.sum(1) for d in draws(groups, seed)), groups)


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of a rate over n independent items (Wilson 1927).

    It has a width at rates of 0 and 1 too, where a bootstrap has none.
    """
    shift = _Z * _Z / n
    centre = (rate + shift / 2) / (1 + shift)
    half = _Z * math.sqrt(rate * (1 - rate) / n + shift / (4 * n)) / (1 + shift)
    return max(0.0, centre - half), min(1.0, centre + half)
