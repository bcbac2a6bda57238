"""How much of what is known about a text the single features of a model or a dictionary know.

For a property that is true or false at each token (a capital letter, inside quotes), and feature values
z_i, a feature with a threshold is a classifier: z_i > t.

    coverage        per property the best F1 over features i and thresholds t >= 0; the mean over properties
    reconstruction  per property the F1 of "some feature fires that told it with precision 0.95"; the mean

Feature and threshold are chosen on some documents and judged on others, so that the best of many thousand
classifiers is not rewarded for being the best of many. Shuffled properties, searched in the same way, are
the control. A wider layer still has more to choose from: compare layers at an equal number of features
(`features[:, chosen]`).

Source: Karvonen et al. 2024, "Measuring Progress in Dictionary Learning for Language Model Interpretability
with Board Game Models", section 3, as used by MoE-X (2025); there thresholds are tenths of a feature's
maximum and coverage is not held out. Here every threshold is tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.intervals import Array, bootstrap_statistic
from actlas.core.measurement import Measurement

_CHUNK = 2_000_000  # numbers that are sorted at a time


@dataclass(frozen=True)
class Best:
    """The feature and threshold that tell a property best on the choosing documents.

    Attributes:
        feature, threshold: it fires where the feature is above the threshold.
        chosen_f1: F1 on the documents that chose it.
        f1, precision, recall: on the others.
    """

    feature: int
    threshold: float
    chosen_f1: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Coverage:
    """What `feature_coverage` found: two measurements, their controls inside, and each property's best."""

    coverage: Measurement
    reconstruction: Measurement
    best: Mapping[str, Best]


def feature_coverage(
    features: Tensor | Codes,
    properties: Mapping[str, Any],
    *,
    documents: Sequence[Any] | None = None,
    holdout: float = 0.5,
    precision: float = 0.95,
    least_fires: int = 10,
    seed: int = 0,
    group: Mapping[str, str] | None = None,
) -> Coverage:
    """Measure coverage and reconstruction of properties with known truth.

    Args:
        features: values of m features at n tokens, `[n, m]` or Codes of n rows.
        properties: name -> which tokens have it, bool `[n]`.
        documents: the document of each token; whole documents choose or judge, and are what the interval
            draws. Default: blocks of 64 tokens.
        holdout: share of the documents that judge.
        precision, least_fires: what a feature needs on the choosing documents to take part in the
            reconstruction.
        seed: of the split, the control and the bootstrap.
        group: labels of the measurements.

    Raises:
        InputError: lengths that differ, no property, or one that never or always holds on either side.
        NonFiniteError: a feature value is NaN or infinite.
    """
    z = features.dense() if isinstance(features, Codes) else features
    if z.ndim != 2 or not len(z):
        raise InputError(f"features must be [tokens, features] with at least one token, not {list(z.shape)}")
    z = z.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(z).all()):
        raise NonFiniteError("the features hold NaN or infinity; leave those tokens out")
    y = _truths(properties, len(z))
    units = _units(documents, len(z))
    judging = _split(units, holdout, seed)
    for name, truth in zip(properties, y.T, strict=True):
        for side, rows in (("choose", ~judging), ("judge", judging)):
            n = int(truth[rows].sum())
            if n in (0, int(rows.sum())):
                said = "never" if n == 0 else "always"
                raise InputError(
                    f"{name!r} {said} holds in the documents that {side}; give more text or leave it out"
                )
    found = _search(z, y, judging, precision, least_fires)
    generator = torch.Generator().manual_seed(seed)
    shuffled = y.clone()
    for rows in (~judging, judging):
        where = rows.nonzero().squeeze(1)
        shuffled[where] = y[where[torch.randperm(len(where), generator=generator)]]
    control = _search(z, shuffled, judging, precision, least_fires)
    names = list(properties)
    best = {}
    for p, name in enumerate(names):
        has, fires = y[judging, p], found.fires[:, p]
        hit = float((has & fires).sum())
        best[name] = Best(
            found.feature[p],
            found.threshold[p],
            found.chosen[p],
            _f1(has, fires),
            hit / max(1.0, float(fires.sum())),
            hit / float(has.sum()),
        )
    made = {}
    for name, fires, against in (
        ("feature coverage", found.fires, control.fires),
        ("feature reconstruction", found.any, control.any),
    ):
        base = _measurement(
            f"{name}, shuffled properties", shuffled[judging], against, units[judging], seed, group
        )
        details = {
            "properties": {n: round(_f1(y[judging, p], fires[:, p]), 4) for p, n in enumerate(names)},
            "features": z.shape[1],
        }
        made[name] = _measurement(
            name, y[judging], fires, units[judging], seed, group, baseline=base, details=details
        )
    return Coverage(made["feature coverage"], made["feature reconstruction"], best)


@dataclass(frozen=True, eq=False)
class _Found:
    feature: list[int]
    threshold: list[float]
    chosen: list[float]
    fires: Tensor  # bool [judging tokens, properties], the best classifier's answers
    any: Tensor  # bool, the answers of all precise features together


def _search(z: Tensor, y: Tensor, judging: Tensor, precision: float, least: int) -> _Found:
    """Find for each property the best feature and threshold, and all precise ones."""
    choose, judge, truth = z[~judging], z[judging], y[~judging]
    n, m = choose.shape
    positives = truth.sum(0)
    count = y.shape[1]
    best = [(-1.0, 0, 0.0)] * count
    any_fires = torch.zeros(len(judge), count, dtype=torch.bool)
    size = max(1, _CHUNK // max(n, 1))
    rank = torch.arange(1, n + 1).unsqueeze(1)
    for start in range(0, m, size):
        values, order = choose[:, start : start + size].sort(dim=0, descending=True)
        below = torch.cat([values[1:], torch.full_like(values[:1], -torch.inf)]).clamp(min=0)
        cut = values > below  # between two different values, or between a positive value and 0
        tested = judge[:, start : start + size]
        for p in range(count):
            hits = truth[:, p][order].cumsum(0)
            f1 = torch.where(cut, 2 * hits / (rank + positives[p]), -1.0)
            top, at = f1.max(0)
            i = int(top.argmax())
            if float(top[i]) > best[p][0]:
                best[p] = (float(top[i]), start + i, float(_between(values[at[i], i], below[at[i], i])))
            good = cut & (hits >= precision * rank) & (hits >= least)
            last = torch.where(good, rank, 0).max(0).values  # the most tokens at that precision
            some = last.nonzero().squeeze(1)
            if len(some):
                limit = _between(values[last[some] - 1, some], below[last[some] - 1, some])
                any_fires[:, p] |= (tested[:, some] > limit).any(1)
    fires = torch.stack(
        [judge[:, i] > t if f >= 0 else torch.zeros(len(judge), dtype=torch.bool) for f, i, t in best], 1
    )
    return _Found(
        [i for _, i, _ in best], [t for _, _, t in best], [max(f, 0.0) for f, _, _ in best], fires, any_fires
    )


def _between(high: Tensor, low: Tensor) -> Tensor:
    """Return a threshold that tells two values apart: 0 if the lower one is, else halfway."""
    middle = low + (high - low) / 2
    return torch.where((low == 0) | (middle >= high), low, middle)


def _measurement(
    name: str,
    truth: Tensor,
    fires: Tensor,
    units: Array,
    seed: int,
    group: Mapping[str, str] | None,
    *,
    baseline: Measurement | None = None,
    details: Mapping[str, Any] | None = None,
) -> Measurement:
    """Return the mean F1 over properties with its bootstrap interval over documents."""
    _, code = np.unique(units, return_inverse=True)
    documents = int(code.max()) + 1
    counts = []
    for t, f in zip(truth.T.numpy(), fires.T.numpy(), strict=True):
        counts.append(
            [np.bincount(code, weights=w.astype(np.float64), minlength=documents) for w in (t & f, t, f)]
        )
    table = np.array(counts)  # [properties, (hits, truths, fires), documents]

    def mean_f1(drawn: Array) -> Array:
        hits, truths, fired = (drawn @ table[:, i].T for i in range(3))  # [draws, properties]
        f1: Array = (2 * hits / np.maximum(truths + fired, 1)).mean(1)
        return f1

    low, high = bootstrap_statistic(mean_f1, documents, seed=seed)
    return Measurement(
        name,
        float(mean_f1(np.ones((1, documents)))[0]),
        "F1",
        documents,
        None if np.isnan(low) else low,
        None if np.isnan(high) else high,
        "bootstrap over documents",
        seed,
        group=dict(group or {}),
        better=None if baseline is None else "higher",
        note="chosen and judged on different documents",
        baseline=baseline,
        details=dict(details or {}),
    )


def _truths(properties: Mapping[str, Any], n: int) -> Tensor:
    if not properties:
        raise InputError("no property was given; give {name: bool for each token}")
    columns = []
    for name, truth in properties.items():
        column = torch.as_tensor(truth)
        if column.shape != (n,):
            raise InputError(f"{name!r} has shape {list(column.shape)}; there are {n} tokens")
        columns.append(column.to("cpu").bool())
    return torch.stack(columns, 1)


def _units(documents: Sequence[Any] | None, n: int) -> Array:
    if documents is None:
        return (np.arange(n) // 64).astype(np.float64)
    if len(documents) != n:
        raise InputError(f"there are {n} tokens but {len(documents)} document labels")
    return np.unique(np.asarray(documents), return_inverse=True)[1].astype(np.float64)


def _split(units: Array, holdout: float, seed: int) -> Tensor:
    """Return which tokens judge; whole documents go to one side."""
    known = np.unique(units)
    judging = round(holdout * len(known))
    if not 0 < judging < len(known):
        raise InputError(
            f"holdout={holdout:g} of {len(known)} documents leaves none to choose or none to judge"
        )
    drawn = np.random.default_rng(seed).permutation(known)[:judging]
    return torch.from_numpy(np.isin(units, drawn))


def _f1(truth: Tensor, said: Tensor) -> float:
    return float(2 * (truth & said).sum() / (truth.sum() + said.sum()).clamp(min=1))
