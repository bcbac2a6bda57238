"""Disaggregated evaluation: a metric for each group and each combination of groups, with intervals.

    result = evaluate(model, task("sentiment", model.tokenizer, n=200), "accuracy", factors=["polarity"])
    result.overall, result.cells, result.gaps          # Measurements
    print(result.gap_line())                           # the largest gap, and whether it may be chance

Source: *Model Cards for Model Reporting* (Mitchell et al. 2019), sections 4.3, 4.4 and 4.7: unitary
results (one factor), intersectional results (combinations), the four error rates of a decision, AUC
pinned to a group. Choose thresholds before looking at groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.errors import InputError
from actlas.core.measurement import Better, Measurement
from actlas.measure.statistics import (
    auc,
    holm,
    mean_measurement,
    paired_difference,
    pinned_auc,
    rate_measurement,
)
from actlas.report.content import Table, plain, show_number
from actlas.report.gaps import group_gap
from actlas.report.predictions import Scores, data_hash, scores_of

Factor = str | tuple[str, Callable[[Any], str]]
MIN_GAP_N = 30
TOO_SMALL = "n too small"


@dataclass(frozen=True)
class Evaluation:
    """A metric by group.

    Attributes:
        overall: the metric over all items.
        cells: one measurement a group: first each factor alone, then combinations.
        gaps: the largest gap for each factor and combination, most certain first.
        n: number of items.
        hidden: per factor (or combination), how many items are in cells too small to show.
        notes: what a reader must know.
    """

    overall: Measurement
    cells: tuple[Measurement, ...]
    gaps: tuple[Measurement, ...]
    n: int
    hidden: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def measurements(self) -> list[Measurement]:
        """Overall, cells and gaps, in this order."""
        return [self.overall, *self.cells, *self.gaps]

    @property
    def largest(self) -> Measurement | None:
        """The gap with the smallest corrected p-value that could be computed, or `None`."""
        return self.gaps[0] if self.gaps and math.isfinite(self.gaps[0].value) else None

    def gap_line(self) -> str:
        """One sentence about the largest gap between groups."""
        gap = self.largest
        if gap is None:
            return f"No gap between groups was computed: it needs two groups of at least {MIN_GAP_N} items."
        d = gap.details
        p = d["p_holm"]
        verdict = "unlikely to be chance" if p < 0.05 else "may be chance"
        highest, lowest = (
            spoken(d[k], alone="=" in d[k] and " and " not in d[k]) for k in ("highest", "lowest")
        )
        return (
            f"Largest gap over {d['factor']}: {show_number(gap.value)} {gap.unit} between {highest} "
            f"(highest) and {lowest} (lowest); {verdict} (p = {p:.2g} after Holm's correction)."
        )

    def table(self, title: str = "Results by group") -> Table:
        """Return overall and cells as a table of text."""
        rows = []
        for m in (self.overall, *self.cells):
            who = ", ".join(f"{k}={v}" for k, v in m.group.items()) or "all"
            value = TOO_SMALL if math.isnan(m.value) else show_number(m.value)
            known = m.low is not None and m.high is not None and not math.isnan(m.value)
            interval = f"{show_number(m.low or 0.0)} to {show_number(m.high or 0.0)}" if known else ""
            rows.append((who, value, interval, f"{m.n:,}"))
        return Table(title, ("Group", self.overall.name, "95% interval", "n"), tuple(rows))


def spoken(cell: str, *, alone: bool = False) -> str:
    """Return a cell's name for a sentence: "template ABBA", or "ABBA" alone where the factor is known."""
    return cell.partition("=")[2] if alone else cell.replace("=", " ")


def evaluate(
    subject: Any,
    data: Iterable[Any],
    metric: str | Callable[[Any, Any], float] = "accuracy",
    factors: Sequence[Factor] = (),
    intersections: int = 2,
    *,
    threshold: float = 0.5,
    minimum: int = 5,
    cluster: Factor | None = None,
    weights: Sequence[float] | None = None,
    name: str = "",
    unit: str = "",
    better: Better | None = None,
    group: Mapping[str, str] | None = None,
    seed: int = 0,
    trained_on: str | Iterable[str] = (),
    force: bool = False,
) -> Evaluation:
    """Measure a metric for all items, for each group and for each combination of groups.

    Args:
        subject: a Model, a function `item -> prediction`, or the predictions, one an item.
        data: the items: a Task, Corpus or ImageSet, or any sequence of objects or dictionaries with a
            `label` (or `answer`) and the factors as keys, attributes or entries of `.group`.
        metric: `"accuracy"`, `"error rate"`; `"fpr"`, `"fnr"`, `"fdr"`, `"for"` (binary labels; a
            prediction is a decision or a score that is compared with `threshold`); `"auc"`,
            `"pinned auc"`; `"mean"` (of the predictions); `"loss per byte"` (a Model on a Corpus);
            or a function `(prediction, item) -> float`.
        factors: names of labels, or (name, function of an item).
        intersections: up to how many factors are combined.
        threshold: decides a score; choose it before looking at groups.
        minimum: cells with fewer items are hidden (and one more, where a single hidden cell could be
            computed from the total). 1 shows everything.
        cluster: what marks items that share a source; sources are resampled whole then.
        weights: weight of each item, for weighted means.
        name, unit, better: of the measurements, where the metric does not say it.
        group: labels that every measurement gets.
        seed: of bootstrap and permutations.
        trained_on: SHA-256 of data the model was trained on; the same data is refused.
        force: measure on training data anyway, and say so.

    Returns:
        An `Evaluation`. An empty denominator gives `nan` and "n too small", never 0.

    Raises:
        InputError: no items, predictions or weights of another length, an unknown metric or factor,
            or data whose hash is in `trained_on`.
    """
    items = list(data)
    if not items:
        raise InputError("there is nothing to evaluate: the data has no items")
    if intersections < 1:
        raise InputError(f"intersections={intersections} makes no groups; 1 is single factors, 2 also pairs")
    note = refuse_training_data(data, trained_on, force)
    scores = scores_of(subject, data, items, metric, threshold=threshold, weights=weights, seed=seed)
    scores = replace(
        scores, name=name or scores.name, unit=unit or scores.unit, better=better or scores.better
    )
    labels = {_name(f): np.array([factor_value(item, f) for item in items]) for f in factors}
    clusters = None if cluster is None else np.array([factor_value(item, cluster) for item in items])
    base = dict(group or {})
    everyone = np.ones(len(items), dtype=bool)
    overall = _cell(scores, everyone, base, clusters, seed, note)
    cells: list[Measurement] = []
    gaps: list[Measurement] = []
    hidden: dict[str, int] = {}
    for size in range(1, min(intersections, len(labels)) + 1):
        for names in combinations(labels, size):
            joint = " x ".join(names)
            keys = list(zip(*(labels[n] for n in names), strict=True))
            sizes = {key: keys.count(key) for key in sorted(set(keys))}
            shown = _visible(sizes, minimum)
            hidden_n = sum(n for key, n in sizes.items() if key not in shown)
            if hidden_n:
                hidden[joint] = hidden_n
            where = np.array([" and ".join(f"{n}={v}" for n, v in zip(names, k, strict=True)) for k in keys])
            for key in shown:
                mask = np.array([k == key for k in keys])
                cell_group = {**base, **dict(zip(names, map(str, key), strict=True))}
                cells.append(_cell(scores, mask, cell_group, clusters, seed, note))
            visible = np.array([k in shown for k in keys])
            gaps.append(_gap(scores, visible, where, joint, base, clusters, seed, note))
    gaps = correct_gaps(gaps)
    notes = [note] if note else []
    if hidden:
        notes.append(f"Cells with fewer than {minimum} items are not shown.")
    return Evaluation(overall, tuple(cells), tuple(gaps), len(items), hidden, tuple(notes))


def changes(before: Evaluation, after: Evaluation, *, seed: int = 0) -> list[Measurement]:
    """Return the paired difference (after minus before) for all items and for each group.

    An edit that helps on average and hurts one group shows here.

    Raises:
        InputError: the two evaluations are not over the same items and groups.
    """
    if before.n != after.n or len(before.cells) != len(after.cells):
        raise InputError("the two evaluations must be over the same items and groups")
    out = []
    for a, b in zip((before.overall, *before.cells), (after.overall, *after.cells), strict=True):
        if dict(a.group) != dict(b.group) or a.samples is None or b.samples is None:
            raise InputError(f"the groups {dict(a.group)} and {dict(b.group)} cannot be paired item by item")
        if len(a.samples) != len(b.samples) or not len(a.samples):
            continue
        e = paired_difference(a.samples, b.samples, a.weights, b.weights, seed=seed)
        out.append(
            Measurement(
                f"change of {b.name}",
                e.value,
                b.unit,
                e.n,
                None if math.isnan(e.low) else e.low,
                None if math.isnan(e.high) else e.high,
                "paired bootstrap",
                seed,
                b.under,
                b.group,
                b.better,
                e.note,
                baseline=a,
                details={"p": e.p},
            )
        )
    return out


def refuse_training_data(data: Any, trained_on: str | Iterable[str], force: bool) -> str:
    """Return a note for the card if the data is training data and `force` is set, else an empty text.

    Raises:
        InputError: the data is training data and `force` is not set.
    """
    known = {trained_on} if isinstance(trained_on, str) else set(trained_on)
    known = {h.strip().lower() for h in known if h.strip()}
    if not known or data_hash(data) not in known:
        return ""
    if not force:
        raise InputError(
            f"the data {getattr(data, 'name', 'to evaluate on')!r} has the hash of the training data; "
            "evaluate on held-out data, or pass force=True"
        )
    return "Measured on the training data: it says nothing about new data."


def factor_value(item: Any, factor: Factor) -> str:
    """Return an item's value of a factor as text.

    Raises:
        InputError: the item has no such label.
    """
    if isinstance(factor, tuple):
        return plain(factor[1](item))
    for holder in (getattr(item, "group", None), item):
        if isinstance(holder, Mapping) and factor in holder:
            return plain(holder[factor])
    value = getattr(item, factor, None)
    if value is None:
        group = getattr(item, "group", item if isinstance(item, Mapping) else {})
        known = ", ".join(map(str, group)) if isinstance(group, Mapping) else ""
        raise InputError(f"an item has no factor {factor!r}; it has {known or 'no labels'}")
    return plain(value)


def _name(factor: Factor) -> str:
    return factor if isinstance(factor, str) else factor[0]


def _visible(sizes: Mapping[tuple[str, ...], int], minimum: int) -> list[tuple[str, ...]]:
    """Cells to show. One hidden cell alone could be had by subtraction, so the next smallest goes too."""
    small = [key for key, n in sizes.items() if n < minimum]
    if len(small) == 1 and len(sizes) > 1:
        small.append(min((k for k in sizes if k not in small), key=lambda k: sizes[k]))
    return [key for key in sizes if key not in small]


def _cell(
    s: Scores,
    mask: NDArray[np.bool_],
    group: Mapping[str, str],
    clusters: NDArray[Any] | None,
    seed: int,
    note: str,
) -> Measurement:
    if s.labels is not None:
        estimate = pinned_auc if s.name == "pinned auc" else None
        e = (
            estimate(s.labels, s.values, mask, seed=seed)
            if estimate and not mask.all()
            else auc(s.labels[mask], s.values[mask], seed=seed)
        )
        return Measurement(
            s.name, e.value, s.unit, int(mask.sum()),
            None if math.isnan(e.low) else e.low, None if math.isnan(e.high) else e.high,
            "bootstrap over items", seed, s.under, group, s.better,
            _notes(note, f"{TOO_SMALL}: {e.note}" if math.isnan(e.value) else ""),
        )  # fmt: skip
    keep = mask & s.counted
    if not keep.any() or (s.weights is not None and s.weights[keep].sum() <= 0):
        reason = f"{TOO_SMALL}: {s.empty}"
        return Measurement(s.name, math.nan, s.unit, 0, group=group, better=s.better,
                           note=_notes(note, reason),
                           under=s.under, samples=np.zeros(0))  # fmt: skip
    if s.binary and s.weights is None and clusters is None:
        m = rate_measurement(s.name, s.values[keep], unit=s.unit, seed=seed, better=s.better, group=group)
    else:
        m = mean_measurement(
            s.name,
            s.unit,
            s.values[keep],
            None if s.weights is None else s.weights[keep],
            seed=seed,
            over=s.over if clusters is None else "sources",
            clusters=None if clusters is None else clusters[keep],
            better=s.better,
            group=group,
        )
    return replace(m, under=s.under, note=_notes(note, m.note))


def _gap(
    s: Scores,
    visible: NDArray[np.bool_],
    where: NDArray[Any],
    joint: str,
    group: Mapping[str, str],
    clusters: NDArray[Any] | None,
    seed: int,
    note: str,
) -> Measurement:
    if s.labels is not None:
        return Measurement(f"largest gap in {s.name}", math.nan, s.unit, len(where), group=group,
                           note="not computed for AUC", details={"factor": joint})  # fmt: skip
    keep = visible & s.counted
    gap = group_gap(
        s.values[keep],
        where[keep],
        weights=None if s.weights is None else s.weights[keep],
        clusters=None if clusters is None else clusters[keep],
        min_n=MIN_GAP_N,
        seed=seed,
    )
    e = gap.estimate
    details = {"factor": joint, "lowest": gap.lowest, "highest": gap.highest, "p": e.p, "p_holm": e.p}
    named = f"{gap.lowest} lowest, {gap.highest} highest" if gap.lowest else e.note
    return Measurement(
        f"largest gap in {s.name} over {joint}",
        e.value,
        s.unit,
        e.n,
        None if math.isnan(e.low) else e.low,
        None if math.isnan(e.high) else e.high,
        "bootstrap within the two groups",
        seed,
        s.under,
        group,
        "lower",
        _notes(note, named),
        details=details,
    )


def correct_gaps(gaps: list[Measurement]) -> list[Measurement]:
    """Apply Holm's correction over all gaps that were looked at, and sort by it, then by size."""
    p = np.array([m.details.get("p", math.nan) for m in gaps], dtype=float)
    corrected = holm(p) if len(p) else p
    done = [
        replace(m, details={**m.details, "p_holm": float(c)}) if math.isfinite(m.value) else m
        for m, c in zip(gaps, corrected, strict=True)
    ]
    worst = math.inf
    return sorted(
        done,
        key=lambda m: (m.details.get("p_holm", worst), -m.value) if math.isfinite(m.value) else (worst, 0.0),
    )


def _notes(*parts: str) -> str:
    return "; ".join(filter(None, parts))
