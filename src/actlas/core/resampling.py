"""Bootstrap draws in which items that share a source (a pair, a document) go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actlas.core import intervals
from actlas.core.intervals import Array, resample_counts

RESAMPLES = 1000


def draws(groups: Sequence[Any] | NDArray[Any], seed: int) -> Iterator[Array]:
    """Yield how often each item is drawn, `[draws, n]`, whole groups together, in bounded blocks."""
    _, code = np.unique(np.asarray(groups), return_inverse=True)
    for counts in resample_counts(int(code.max()) + 1, RESAMPLES, seed):
        yield counts[:, code]


def percentiles(blocks: Iterable[Array], groups: Sequence[Any] | NDArray[Any]) -> tuple[float, float]:
    """Return the 95% interval of resampled values; `(nan, nan)` for fewer than two groups."""
    return intervals.percentiles(np.concatenate(list(blocks)), len(np.unique(np.asarray(groups))))


def mean_interval(values: Array, groups: Sequence[Any] | NDArray[Any], seed: int) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean of `values`, shape `[n]`."""
    return percentiles((d @ values / d.sum(1) for d in draws(groups, seed)), groups)
