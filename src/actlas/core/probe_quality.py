"""How good a probe is: held-out numbers with intervals, beside the same fit on shuffled labels.

A probe with as many channels as examples can find a direction for any labels. The control says how
much of a number comes from that: the whole procedure (split, fit, test) is repeated with labels that
carry nothing, and the difference is reported with a bootstrap interval over held-out groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.probe_data import Examples

Array = NDArray[np.float64]
Scorer = Callable[[Array], Array]
_RESAMPLES = 1000
BOOTSTRAP = "bootstrap over held-out texts"


def split(examples: Examples, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices for fitting and for testing; groups stay whole, classes keep their shares.

    Raises:
        InputError: too few groups, or a class that one of the parts would lack.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    if not 0.05 <= fraction <= 0.5:
        raise InputError(f"the held-out fraction is {fraction}; it must lie between 0.05 and 0.5")
    folds = max(2, round(1 / fraction))
    groups = len(np.unique(examples.group))
    if groups < folds:
        raise InputError(f"{groups} different texts cannot be split for testing; give at least {folds}")
    if examples.binary and not examples.paired:
        fewest = min(len(np.unique(examples.group[examples.y == label])) for label in (0.0, 1.0))
        if fewest < folds:
            raise InputError(f"one label has only {fewest} different texts; give at least {folds} of each")
        folder: Any = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    else:
        folder = GroupKFold(folds, shuffle=True, random_state=seed)
    fit, test = next(iter(folder.split(examples.x, examples.y, examples.group)))
    return fit, test


def judge(
    fit: Callable[[Examples], Scorer],
    examples: Examples,
    parts: tuple[NDArray[np.int64], NDArray[np.int64]],
    *,
    classify: bool,
    controls: int,
    seed: int,
    about: dict[str, Any],
    group: dict[str, str],
) -> tuple[Scorer, tuple[Measurement, ...]]:
    """Fit on one part, test on the other, do the same with shuffled labels, and report.

    Args:
        fit: takes examples and returns a scorer `[n, d] -> [n]` (logits, or predicted numbers).
        examples: all of them.
        parts: indices for fitting and testing.
        classify: accuracy and AUC instead of R^2.
        controls: runs with shuffled labels; 0 leaves the control out.
        seed: of shuffles and bootstrap.
        about: details to record with each measurement.
        group: labels of the measurements.

    Returns:
        The fitted scorer and the measurements, the main one first.
    """
    scorer = fit(examples.at(parts[0]))
    test = examples.at(parts[1])
    scores = scorer(test.x)
    good = _per_item(test.y, scores, classify)
    name, unit = ("probe accuracy", "fraction") if classify else ("probe R2", "R2")

    def report(what: str, value: float, interval: tuple[float, float], how: str, **more: Any) -> Measurement:
        return Measurement(
            name=what,
            value=value,
            unit=unit,
            n=len(test.y),
            low=interval[0],
            high=interval[1],
            interval=how,
            seed=seed,
            group=group,
            better="higher",
            details=about,
            **more,
        )

    noise: list[Array] = []
    generator = np.random.default_rng(seed)
    for _ in range(controls):
        fooled = fit(examples.at(parts[0]).shuffled(generator))
        blank = test.shuffled(generator)
        noise.append(_per_item(blank.y, fooled(blank.x), classify))
    found: list[Measurement] = []
    control = None
    if noise:
        mean = np.mean(noise, axis=0)
        note = f"mean of {controls} fits to shuffled labels"
        control = report(
            f"{name}, shuffled labels", _mean(mean), _interval(mean, test, seed), BOOTSTRAP, note=note
        )
        found.append(control)
        over = good - mean
        found.append(
            report(f"{name} above shuffled labels", _mean(over), _interval(over, test, seed), BOOTSTRAP)
        )
    if classify:
        found.append(_auc(test, scores, seed, report))
    if classify and len(np.unique(test.group)) == len(test.y):
        interval, how = _wilson(int(good.sum()), len(good)), "wilson"
    else:
        interval, how = _interval(good, test, seed), BOOTSTRAP
    main = report(name, _mean(good), interval, how, baseline=control, samples=good)
    return scorer, (main, *found)


def _per_item(y: Array, scores: Array, classify: bool) -> Array:
    """Return per-item values whose mean is the accuracy, or R^2 = mean(1 - error^2 / variance)."""
    if classify:
        right: Array = ((scores > 0) == (y > 0.5)).astype(np.float64)
        return right
    variance = float(np.var(y))
    if variance == 0:
        raise InputError("the held-out labels are all equal, so there is nothing to predict; give more data")
    per_item: Array = 1 - (y - scores) ** 2 / variance
    return per_item


def _auc(test: Examples, scores: Array, seed: int, report: Callable[..., Measurement]) -> Measurement:
    interval = _percentiles(auc(test.y, scores, draws) for draws in _draws(test, seed))
    value = float(auc(test.y, scores, np.ones((1, len(scores))))[0])
    return replace(report("probe AUC", value, interval, BOOTSTRAP), unit="AUC")


def auc(y: Array, scores: Array, weights: Array) -> Array:
    """Return the area under the ROC curve for each row of weights: P(positive > negative) + P(equal) / 2.

    Args:
        y: labels 0 and 1, `[n]`.
        scores: `[n]`.
        weights: how often each item counts, `[draws, n]`; a draw without both classes gives NaN.
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counted = weights[:, order]
    positive = np.add.reduceat(counted * (y[order] > 0.5), first, axis=1)
    negative = np.add.reduceat(counted * (y[order] <= 0.5), first, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        areas: Array = (positive * below).sum(1) / pairs
    return areas


def _draws(test: Examples, seed: int) -> Iterator[Array]:
    """Yield how often each item is drawn, `[draws, n]`, whole groups together, in blocks."""
    _, code = np.unique(test.group, return_inverse=True)
    n = int(code.max()) + 1
    generator = np.random.default_rng(seed)
    block = max(1, min(_RESAMPLES, 2_000_000 // len(code)))
    for start in range(0, _RESAMPLES, block):
        size = min(block, _RESAMPLES - start)
        yield generator.multinomial(n, np.full(n, 1 / n), size).astype(np.float64)[:, code]


def _percentiles(blocks: Iterable[Array]) -> tuple[float, float]:
    values = np.concatenate(list(blocks))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def _interval(values: Array, test: Examples, seed: int) -> tuple[float, float]:
    """Return a percentile bootstrap interval of the mean, whole groups drawn together."""
    return _percentiles(draws @ values / draws.sum(1) for draws in _draws(test, seed))


def _wilson(successes: int, n: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _mean(values: Array) -> float:
    return float(values.mean())
