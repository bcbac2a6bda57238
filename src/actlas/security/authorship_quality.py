"""How good an attribution is, on prompts that it has not seen, beside what else could explain the number.

* accuracy with groups kept whole, with a random split (the same prompt on both sides), with authors
  shuffled inside each group, and from the text's length alone;
* calibration: expected calibration error over ten bins, before and after the temperature, which is
  fitted on the other folds;
* an unseen author: each author in turn is left out of the fit; how often is it named all the same, and
  does confidence (the greatest probability, before the temperature) tell it from known authors?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actlas.core.measurement import Measurement
from actlas.core.probe_quality import auc
from actlas.core.resampling import draws, mean_interval, percentiles
from actlas.measure.samples import missing
from actlas.security.authorship_features import Array, Extractor, Index

_OVER = "bootstrap over held-out groups"


@dataclass(frozen=True)
class Setting:
    """What a cross-validation needs; `y` are numbers of authors, `groups` of prompts."""

    extractor: Extractor
    y: Index
    groups: Index
    authors: int
    classifier: str
    folds: int
    accepted: float
    seed: int

    def classify(self, x: Array, y: Index) -> tuple[Array, Array]:
        """Fit the linear classifier; return weight `[authors, features]` and bias `[authors]`."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC

        made: Any = (
            LogisticRegression(C=10.0, max_iter=3000) if self.classifier == "logistic" else LinearSVC(C=1.0)
        )
        made.fit(x, y)
        known = made.classes_
        weight, bias = made.coef_, made.intercept_
        if len(known) == 2 and len(weight) == 1:
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        whole, offsets = np.zeros((self.authors, x.shape[1])), np.full(self.authors, -1e3)
        whole[known], offsets[known] = weight, bias
        return whole, offsets

    def split(self, grouped: bool = True) -> list[tuple[Index, Index]]:
        """Return the folds, by group or at random."""
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

        kind: Any = StratifiedGroupKFold if grouped else StratifiedKFold
        made = kind(self.folds, shuffle=True, random_state=self.seed)
        return list(made.split(self.y, self.y, self.groups if grouped else None))

    def out_of_fold(self, y: Index, grouped: bool = True, leave_out: int | None = None) -> Array:
        """Return each text's logits by a classifier that has not seen its fold, `[n, authors]`."""
        out = np.zeros((len(y), self.authors))
        for fit, test in self.split(grouped):
            kept = fit if leave_out is None else fit[y[fit] != leave_out]
            fitted = self.extractor.fit(kept)
            weight, bias = self.classify(fitted.x, y[kept])
            out[test] = self.extractor.of(fitted, test) @ weight.T + bias
        return out


def judge(
    setting: Setting, texts: Sequence[str], names: Sequence[str], kept: Sequence[int], given: int
) -> tuple[tuple[Measurement, ...], Array, float]:
    """Return the measurements, the out-of-fold logits and the threshold for naming an author.

    `kept` are the numbers of the texts among the `given` ones, before repeated ones were dropped.
    """
    y, groups = setting.y, setting.groups
    logits = setting.out_of_fold(y)
    guess = logits.argmax(1)
    right = (guess == y).astype(np.float64)
    table = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(table, (y, guess), 1)
    most = float(np.bincount(y).max() / len(y))
    about = {
        "authors": list(names),
        "confusion (rows: true)": table.tolist(),
        "chance": most,
        "texts": list(map(int, kept)),
        "texts dropped as repeated": given - len(kept),
        "groups": int(groups.max()) + 1,
    }
    report = _reporter(groups, setting.seed)
    said = f"the largest class is {most:.0%} of the texts"
    out = [report("authorship accuracy", right, details=about, note=said, samples=right)]
    loose = (setting.out_of_fold(y, grouped=False).argmax(1) == y).astype(np.float64)
    blank = _shuffled(y, groups, setting.seed)
    fooled = (setting.out_of_fold(blank).argmax(1) == blank).astype(np.float64)
    sizes = np.array([[len(t)] for t in texts], dtype=np.float64)
    short = replace(setting, extractor=Extractor(texts, sizes, 1), classifier="logistic")
    by_length = (short.out_of_fold(y).argmax(1) == y).astype(np.float64)
    out += [
        report("authorship accuracy, random split", loose),
        report("random split above grouped split", loose - right),
        report("authorship accuracy, shuffled authors", fooled),
        report("authorship accuracy above shuffled authors", right - fooled),
        report("authorship accuracy, length only", by_length),
        report("authorship accuracy above length only", right - by_length),
    ]
    fold = np.zeros(len(y), dtype=int)
    for number, (_, test) in enumerate(setting.split()):
        fold[test] = number
    scaled = logits.copy()
    for number in range(setting.folds):
        scaled[fold == number] /= temperature_of(logits[fold != number], y[fold != number])
    for name, values in (("before", logits), ("after", scaled)):
        error = calibration_error(softmax(values), y, np.ones((1, len(y))))
        drawn = np.concatenate(
            [calibration_error(softmax(values), y, w) for w in draws(groups, setting.seed)]
        )
        out.append(_interval(f"calibration error {name} temperature", error[0], drawn, setting, "fraction"))
    threshold = float(np.quantile(softmax(logits).max(1), 1 - setting.accepted))
    return (*out, *_unseen(setting, names)), logits, threshold


def _unseen(setting: Setting, names: Sequence[str]) -> list[Measurement]:
    """Leave each author out in turn and see whether its texts are named."""
    if setting.authors < 3:
        note = "an author can be left out of three or more"
        return [
            missing(f"unseen author {what}", "fraction", note) for what in ("named", "told by confidence")
        ]
    y, out, rows = setting.y, [], []
    for left, name in enumerate(names):
        logits = setting.out_of_fold(y, leave_out=left)
        known = y != left
        kept = [i for i in range(setting.authors) if i != left]
        confident = softmax(logits[:, kept]).max(1)
        threshold = float(np.quantile(confident[known], 1 - setting.accepted))
        named = (confident[~known] >= threshold).astype(np.float64)
        report = _reporter(setting.groups[~known], setting.seed)
        out.append(report("unseen author named", named, group={"author": name}))
        labels = known.astype(np.float64)
        area = float(auc(labels, confident, np.ones((1, len(y))))[0])
        drawn = np.concatenate([auc(labels, confident, w) for w in draws(setting.groups, setting.seed)])
        made = _interval("unseen author told by confidence", area, drawn, setting, "AUC")
        rows.append(replace(made, group={"author": name}))
    return out + rows


def softmax(logits: Array) -> Array:
    """Return probabilities `[n, k]`."""
    z = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(z / z.sum(1, keepdims=True))


def temperature_of(logits: Array, y: Index) -> float:
    """Return the temperature that makes `softmax(logits / T)` likeliest for labels y (Guo et al. 2017).

    At least a quarter: where nothing is wrong the likeliest is 0.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        p = softmax(logits / np.exp(log_t))
        return -float(np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.25), 4.0), method="bounded").x))


def calibration_error(p: Array, y: Index, weights: Array, bins: int = 10) -> Array:
    """Return the expected calibration error for each row of weights: mean |accuracy - confidence| of bins."""
    confident, right = p.max(1), (p.argmax(1) == y).astype(np.float64)
    where = np.minimum((confident * bins).astype(int), bins - 1)
    member = np.eye(bins)[where]
    gap = weights @ (member * (right - confident)[:, None])
    return np.asarray(np.abs(gap).sum(1) / weights.sum(1))


def _shuffled(y: Index, groups: Index, seed: int) -> Index:
    """Return authors permuted inside each group, so that prompts tell as much as before; over all texts where
    most groups hold one author, whose permutation would change nothing."""
    generator = np.random.default_rng(seed)
    mixed = [len(np.unique(y[groups == g])) > 1 for g in np.unique(groups)]
    if np.mean(mixed) < 0.5:
        return generator.permutation(y)
    out = y.copy()
    for group in np.unique(groups):
        inside = np.flatnonzero(groups == group)
        out[inside] = generator.permutation(y[inside])
    return out


def _reporter(groups: Index, seed: int) -> Callable[..., Measurement]:
    def report(name: str, values: Array, **more: Any) -> Measurement:
        low, high = mean_interval(values, groups, seed)
        n = len(values)
        return Measurement(
            name, float(values.mean()), "fraction", n, low, high, _OVER, seed, **more
        )  # fmt: skip

    return report


def _interval(name: str, value: float, drawn: Array, setting: Setting, unit: str) -> Measurement:
    low, high = percentiles([drawn], setting.groups)
    n = len(setting.y)
    return Measurement(name, float(value), unit, n, low, high, _OVER, setting.seed)
