"""How good a probe is: held-out numbers with intervals, beside the same fit on shuffled labels.

A probe with as many channels as examples can find a direction for any labels. The control says how
much of a number comes from that: the whole procedure (split, fit, test) is repeated with labels that
carry nothing, and the difference is reported with a bootstrap interval over held-out groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.errors import InputError
from actlas.core.intervals import wilson
from actlas.core.measurement import Measurement
from actlas.core.probe_data import Examples
from actlas.core.resampling import draws, mean_interval, percentiles

Array = NDArray[np.float64]
Scorer = Callable[[Array], Array]
BOOTSTRAP = "bootstrap over held-out texts"


def split(examples: Examples, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices for fitting and for testing; groups stay whole, classes keep their shares.

    Raises:
        InputError: too few groups, or a class that one of the parts would lack.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    if not isinstance(fraction, (int, float)) or not 0.05 <= fraction <= 0.5:
        raise InputError(f"the held-out fraction is {fraction!r}; it must lie between 0.05 and 0.5")
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

    def report(what: str, values: Array, **more: Any) -> Measurement:
        low, high = mean_interval(values, test.group, seed)
        fields: dict[str, Any] = {"unit": unit, "low": low, "high": high, "interval": BOOTSTRAP, **more}
        return Measurement(
            name=what,
            value=float(values.mean()),
            n=len(values),
            seed=seed,
            group=group,
            better="higher",
            details=about,
            **fields,
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
        control = report(f"{name}, shuffled labels", mean, note=f"mean of {controls} fits to shuffled labels")
        found += [control, report(f"{name} above shuffled labels", good - mean)]
    if classify:
        area = float(auc(test.y, scores, np.ones((1, len(scores))))[0])
        resampled = (auc(test.y, scores, weights) for weights in draws(test.group, seed))
        low, high = percentiles(resampled, test.group)
        found.append(replace(report("probe AUC", good, unit="AUC"), value=area, low=low, high=high))
    exact: dict[str, Any] = {}
    if classify:
        n = len(np.unique(test.group))
        low, high = wilson(float(good.mean()) * n, n)
        exact = {"low": low, "high": high, "interval": "wilson over held-out texts or pairs"}
    return scorer, (report(name, good, baseline=control, samples=good, **exact), *found)


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
