"""Association, agreement and classification statistics on plain arrays.

Spearman's correlation with its bootstrap interval, the Mann-Kendall trend test, Cohen's kappa, the
area under the ROC curve (also pinned to a group), and the four error rates of a binary decision.
Each returns an `Estimate`; an empty denominator gives `nan` with a note, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actlas.core.errors import InputError
from actlas.core.intervals import Array, Estimate, divide, percentiles, wilson


def spearman(x: ArrayLike, y: ArrayLike, *, seed: int = 0, resamples: int = 1000) -> Estimate:
    """Return Spearman's rank correlation with a bootstrap interval over pairs.

    `p` is SciPy's two-sided p-value. Fewer than three pairs, or a constant side, give `nan`.
    """
    from scipy import stats

    a, b = _pair(x, y)
    n = len(a)
    if n < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Estimate(math.nan, math.nan, math.nan, n, "needs three pairs and two sides that vary")
    value, p = stats.spearmanr(a, b)
    index = np.random.default_rng(seed).integers(0, n, (resamples, n))
    ra, rb = (stats.rankdata(v[index], axis=1) for v in (a, b))
    ra, rb = ra - ra.mean(1, keepdims=True), rb - rb.mean(1, keepdims=True)
    scale = np.sqrt((ra**2).sum(1) * (rb**2).sum(1))
    draws = np.divide((ra * rb).sum(1), scale, out=np.full(resamples, math.nan), where=scale > 0)
    low, high = percentiles(draws, n)
    return Estimate(float(value), low, high, n, p=float(p))


class Trend(NamedTuple):
    """The Mann-Kendall test: `s` pairs that rise minus pairs that fall, its z and two-sided p."""

    s: int
    tau: float
    z: float
    p: float
    n: int
    note: str = ""


def mann_kendall(values: ArrayLike) -> Trend:
    """Test a series, in time order, for a monotone trend (Mann 1945; Kendall 1975, tie correction).

    `S = sum_{i<j} sign(x_j - x_i)`, `Var S = (n(n-1)(2n+5) - sum_t t(t-1)(2t+5)) / 18` over groups of
    `t` ties, `z = (S - sign S) / sqrt(Var S)`. `tau` is Kendall's tau-b against time. The values are
    taken as independent: autocorrelation makes p too small.
    """
    from scipy.special import ndtr

    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 3:
        return Trend(0, math.nan, math.nan, math.nan, n, "a trend needs at least three values")
    s = sum(int(np.sign(x[i + 1 :] - x[i]).sum()) for i in range(n - 1))
    ties = np.unique(x, return_counts=True)[1]
    variance = (n * (n - 1) * (2 * n + 5) - int((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    pairs = n * (n - 1) / 2
    untied = pairs - float((ties * (ties - 1)).sum()) / 2
    if variance <= 0:
        return Trend(s, math.nan, 0.0, 1.0, n, "all values are equal")
    z = (s - int(np.sign(s))) / math.sqrt(variance)
    p = min(1.0, 2 * float(ndtr(-abs(z))))
    return Trend(s, s / math.sqrt(pairs * untied), z, p, n)


def cohen_kappa(
    a: Sequence[Any] | NDArray[Any], b: Sequence[Any] | NDArray[Any], *, seed: int = 0, resamples: int = 1000
) -> Estimate:
    """Return Cohen's kappa between two raters' labels, with a bootstrap interval over items.

    `kappa = (p_o - p_e) / (1 - p_e)`; `nan` where both raters give one label throughout (`p_e = 1`).
    """
    left, right = np.asarray(a), np.asarray(b)
    if left.shape != right.shape or left.ndim != 1:
        raise InputError(f"two raters must label the same items, not {left.shape} and {right.shape}")
    n = len(left)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0, "no items")
    labels, codes = np.unique(np.concatenate([left, right]), return_inverse=True)
    k = len(labels)
    table = codes[:n] * k + codes[n:]

    def kappa(counts: Array) -> Array:
        cells = counts.reshape(*counts.shape[:-1], k, k)
        total = cells.sum((-2, -1))
        agree = np.trace(cells, axis1=-2, axis2=-1) / total
        chance = (cells.sum(-1) * cells.sum(-2)).sum(-1) / total**2
        return divide(agree - chance, 1 - chance)

    counts = np.bincount(table, minlength=k * k).astype(np.float64)
    value = float(kappa(counts[None])[0])
    if math.isnan(value):
        return Estimate(value, math.nan, math.nan, n, "both raters give one label throughout")
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples).astype(np.float64)
    low, high = percentiles(kappa(draws), n)
    return Estimate(value, low, high, n)


def auc(labels: ArrayLike, scores: ArrayLike, *, seed: int = 0, resamples: int = 1000) -> Estimate:
    """Return the area under the ROC curve: how often a positive scores above a negative.

    The interval is a bootstrap within each class; under perfect separation, where no draw can differ,
    it is Wilson's with the size of the smaller class. One class only gives `nan`.
    """
    return _auc(*_labelled(labels, scores), seed=seed, resamples=resamples)


def pinned_auc(
    labels: ArrayLike,
    scores: ArrayLike,
    in_group: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Estimate:
    """Return the AUC of a group, pinned to the full data (Dixon et al. 2018, section 4.2).

    The AUC of the group's items together with an equally large random sample of all items, so that
    scores which are shifted for the group as a whole count against the model.

    Args:
        labels: 1 for positives, shape [n].
        scores: shape [n].
        in_group: whether each item belongs to the group, shape [n].
    """
    y, s = _labelled(labels, scores)
    member = np.asarray(in_group, dtype=bool)
    if member.shape != y.shape:
        raise InputError(f"in_group must be of shape {list(y.shape)}, not {list(member.shape)}")
    inside = np.flatnonzero(member)
    if not len(inside):
        return Estimate(math.nan, math.nan, math.nan, 0, "nobody is in the group")
    sample = np.random.default_rng(seed).choice(len(y), size=len(inside), replace=False)
    both = np.concatenate([inside, sample])
    return _auc(y[both], s[both], seed=seed, resamples=resamples)


def _auc(y: NDArray[np.bool_], s: Array, *, seed: int, resamples: int) -> Estimate:
    from sklearn.metrics import roc_auc_score

    positive, negative = s[y], s[~y]
    if not len(positive) or not len(negative):
        return Estimate(math.nan, math.nan, math.nan, len(y), "one class only")
    value = float(roc_auc_score(y, s))
    # Draws reuse the order of the pooled scores: a draw's AUC is the weighted count of pairs.
    levels, codes = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    up, down = codes[: len(positive)], codes[len(positive) :]
    generator = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        p = np.bincount(generator.choice(up, len(up)), minlength=len(levels))
        q = np.bincount(generator.choice(down, len(down)), minlength=len(levels))
        below = np.cumsum(q) - q
        draws[i] = (p * (below + q / 2)).sum() / (len(up) * len(down))
    fewest = min(len(positive), len(negative))
    if fewest < 2:
        return Estimate(value, math.nan, math.nan, len(y), "one item in a class: no interval")
    low, high = percentiles(draws, fewest)
    if value in (0.0, 1.0):  # no draw can disagree; Wilson's interval says how little that proves
        low, high = wilson(value * fewest, fewest)
    return Estimate(value, low, high, len(y))


def binary_rates(labels: ArrayLike, decisions: ArrayLike) -> dict[str, Estimate]:
    """Return the four error rates of a binary decision, with Wilson intervals.

    `fpr = FP/(FP+TN)`, `fnr = FN/(FN+TP)`, `fdr = FP/(FP+TP)`, `for = FN/(FN+TN)`
    (Mitchell et al. 2019, section 4.4). `n` is the denominator.
    """
    y, d = np.asarray(labels, dtype=bool), np.asarray(decisions, dtype=bool)
    if y.shape != d.shape or y.ndim != 1:
        raise InputError(f"labels and decisions must be of one length, not {y.shape} and {d.shape}")
    tp, fp = int((y & d).sum()), int((~y & d).sum())
    fn, tn = int((y & ~d).sum()), int((~y & ~d).sum())
    return {
        "fpr": _rate(fp, fp + tn, "no negatives"),
        "fnr": _rate(fn, fn + tp, "no positives"),
        "fdr": _rate(fp, fp + tp, "nothing was decided positive"),
        "for": _rate(fn, fn + tn, "nothing was decided negative"),
    }


def _rate(hits: int, n: int, note: str) -> Estimate:
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, note)
    return Estimate(hits / n, *wilson(hits, n), n)


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"two arrays of one length are needed, not {list(a.shape)} and {list(b.shape)}")
    return a, b


def _labelled(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Array]:
    y, s = _pair(labels, scores)
    if not np.isin(y, (0, 1)).all():
        raise InputError(f"labels must be 0 or 1, not {y[~np.isin(y, (0, 1))][0]}")
    if not np.isfinite(s).all():
        raise InputError(f"scores hold {s[~np.isfinite(s)][0]}")
    return y.astype(bool), s
