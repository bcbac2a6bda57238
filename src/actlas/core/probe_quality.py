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
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(seed)
    groups = np.unique(test.group)
    members = {g: np.flatnonzero(test.group == g) for g in groups}
    draws = []
    for _ in range(_RESAMPLES):
        index = np.concatenate([members[g] for g in generator.choice(groups, len(groups))])
        if 0 < test.y[index].mean() < 1:
            draws.append(roc_auc_score(test.y[index], scores[index]))
    interval = (float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975)))
    found = report("probe AUC", float(roc_auc_score(test.y, scores)), interval, BOOTSTRAP)
    return replace(found, unit="AUC")


def _interval(values: Array, test: Examples, seed: int) -> tuple[float, float]:
    """Return a percentile bootstrap interval of the mean, whole groups drawn together."""
    _, code = np.unique(test.group, return_inverse=True)
    total, size = np.bincount(code, values), np.bincount(code).astype(np.float64)
    n = len(total)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES)
    means = (draws @ total) / (draws @ size)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _wilson(successes: int, n: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _mean(values: Array) -> float:
    return float(values.mean())
