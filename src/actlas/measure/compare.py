"""Compare variants of one model: every measure on the same data, and the paired differences.

    comparison = compare(model, {"base": [], "steered": [edit]}, ["perplexity", "task-accuracy"])
    comparison.table()        # one line a measure and variant, with the difference from "base"

The difference of a variant is its value minus the first variant's. Where a measure keeps its per-item
values, items are paired: the interval is a paired bootstrap over items and `p` a sign-flip permutation
test, so what an item has in common under both variants cancels. With several seeds the values of each
seed are paired instead. All p-values of one comparison are also given with Holm's correction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement, format_number
from actlas.measure.differences import holm, paired_difference
from actlas.measure.runner import measure
from actlas.measure.samples import TRANSFORMS, mean_measurement

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Row:
    """One measure under one variant.

    Attributes:
        variant: the variant's name.
        measurement: its value.
        difference: value minus the first variant's; `None` for the first variant itself.
    """

    variant: str
    measurement: Measurement
    difference: Measurement | None = None

    @property
    def key(self) -> Key:
        """Name and group, the same for every variant."""
        return self.measurement.name, tuple(sorted(self.measurement.group.items()))


@dataclass(frozen=True)
class Comparison:
    """Measures of several variants of one model.

    Attributes:
        variants: their names; the first is the base.
        rows: for each measure and group, one row a variant.
        seeds: what was measured with.
    """

    variants: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0,)

    def __getitem__(self, name: str) -> list[Row]:
        """Return the rows of one measure (all groups and variants)."""
        found = [row for row in self.rows if row.measurement.name == name]
        if not found:
            known = dict.fromkeys(row.measurement.name for row in self.rows)
            raise InputError(f"this comparison has no {name!r}; it has {', '.join(known)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "variants": list(self.variants),
            "seeds": list(self.seeds),
            "rows": [
                {
                    "variant": row.variant,
                    "measurement": row.measurement.to_json(),
                    "difference": row.difference.to_json() if row.difference else None,
                }
                for row in self.rows
            ],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Comparison:
        """Rebuild a comparison from `to_json`'s dictionary."""
        rows = tuple(
            Row(
                r["variant"],
                Measurement.from_json(r["measurement"]),
                Measurement.from_json(r["difference"]) if r["difference"] else None,
            )
            for r in record["rows"]
        )
        return cls(tuple(record["variants"]), rows, tuple(record["seeds"]))

    def table(self) -> list[dict[str, str]]:
        """Return one dictionary of texts a row: measure, group, variant, value, difference, p, n, unit."""
        return [
            {
                "measure": row.measurement.name,
                "group": ", ".join(f"{k}={v}" for k, v in row.measurement.group.items()),
                "variant": row.variant,
                "value": _with_interval(row.measurement),
                "difference": "" if row.difference is None else _with_interval(row.difference, sign=True),
                "p": "" if row.difference is None else _p_text(row.difference),
                "n": f"{row.measurement.n:,}",
                "unit": row.measurement.unit,
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        lines = self.table()
        if not lines:
            return "nothing was compared"
        columns = list(lines[0])
        widths = [max(len(c), *(len(line[c]) for line in lines)) for c in columns]
        texts = [columns, *([line[c] for c in columns] for line in lines)]
        padded = ([t.ljust(w) for t, w in zip(ts, widths, strict=True)] for ts in texts)
        return "\n".join("  ".join(row).rstrip() for row in padded)


def compare(
    model: Model,
    variants: Mapping[str, Sequence[Edit]],
    names: Sequence[str] | str | None = None,
    data: Any = None,
    *,
    seed: int | Sequence[int] = 0,
    quick: bool = True,
    tokens: int | None = None,
    resamples: int = 1000,
    **options: Any,
) -> Comparison:
    """Run every measure on the same data for every variant.

    Args:
        model: the model; edits installed on it already stay under every variant.
        variants: name to edits; the first is what the others are compared with.
        names, data, quick, tokens, options: see `actlas.measure.measure`.
        seed: one seed, or several: then each variant is measured once for each, the values are the
            means over seeds, and differences are paired by seed.
        resamples: draws of the paired bootstrap and of the permutation test.

    Raises:
        InputError: fewer than two variants, or what `measure` raises.
    """
    if len(variants) < 2:
        raise InputError(
            f"a comparison needs at least two variants, not {len(variants)}: "
            "for example {'base': [], 'edited': [edit]}"
        )
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    if not seeds:
        raise InputError("at least one seed is needed")
    found: dict[str, dict[Key, Measurement]] = {}
    for variant, edits in variants.items():
        runs = [
            measure(model, names, data, edits=_edits(edits), seed=s, quick=quick, tokens=tokens, **options)
            for s in seeds
        ]
        found[variant] = _keyed(runs[0]) if len(seeds) == 1 else _over_seeds(runs, seeds)
    first, *others = variants
    keys = list(dict.fromkeys(key for of in found.values() for key in of))
    rows: list[Row] = []
    for key in keys:
        base = found[first].get(key)
        if base is not None:
            rows.append(Row(first, base))
        for variant in others:
            own = found[variant].get(key)
            if own is not None:
                rows.append(Row(variant, own, base and difference(base, own, seeds[0], resamples)))
    return Comparison(tuple(variants), _corrected(rows), seeds)


def difference(base: Measurement, other: Measurement, seed: int = 0, resamples: int = 1000) -> Measurement:
    """Return `other - base` as a measurement, paired by item where both keep their items.

    Where one side is exact (no interval), the interval is the other's, shifted. Where neither items
    nor an exact side can be had, the difference has no interval and its note says so.
    """
    value = other.value - base.value
    shell = Measurement(
        name=f"{other.name} difference",
        value=value,
        unit=other.unit,
        n=other.n,
        under=other.under,
        group=other.group,
        better=other.better,
        seed=seed,
    )
    if math.isnan(value):
        return replace(shell, n=0, note=other.note or base.note)
    a, b = base.samples, other.samples
    if a is not None and b is not None and len(a) == len(b) and len(a) > 1:
        transform = other.details.get("transform")
        same = base.weights is None or other.weights is None or np.array_equal(base.weights, other.weights)
        found = paired_difference(
            a,
            b,
            base.weights,
            other.weights,
            clusters=other.details.get("clusters"),
            transform=TRANSFORMS[transform] if transform else None,
            seed=seed,
            resamples=resamples,
        )
        note = "" if same else "the items have other weights under the two variants"
        details = {"p": found.p, "test": "paired permutation of items"}
        low, high = (None, None) if math.isnan(found.low) else (found.low, found.high)
        over = other.interval if other.interval.startswith("bootstrap") else "bootstrap over items"
        return replace(shell, low=low, high=high, interval=f"paired {over}", note=note, details=details)
    if _is_exact(base) and _is_exact(other):
        return replace(shell, interval="exact", seed=None)
    if _is_exact(base) and other.low is not None and other.high is not None:
        low, high = other.low - base.value, other.high - base.value
        return replace(shell, low=low, high=high, interval=other.interval)
    if _is_exact(other) and base.low is not None and base.high is not None:
        low, high = other.value - base.high, other.value - base.low
        return replace(shell, low=low, high=high, interval=base.interval)
    reason = "not paired" if a is None or b is None else "the variants were measured on different items"
    return replace(shell, interval="none", note=f"{reason}: no interval; several seeds would give one")


def _is_exact(m: Measurement) -> bool:
    return m.low is None and m.interval == "exact"


def _edits(edits: Any) -> Sequence[Edit]:
    return edits if isinstance(edits, Sequence) else [edits]


def _keyed(measurements: Sequence[Measurement]) -> dict[Key, Measurement]:
    out: dict[Key, Measurement] = {}
    for m in measurements:
        key = (m.name, tuple(sorted(m.group.items())))
        if key in out:
            raise InputError(f"two measurements are called {m.name!r} with the same group {dict(m.group)}")
        out[key] = m
    return out


def _over_seeds(runs: Sequence[Sequence[Measurement]], seeds: Sequence[int]) -> dict[Key, Measurement]:
    """Return the mean over seeds of each measurement, with the seeds' values as its items."""
    keyed = [_keyed(run) for run in runs]
    out: dict[Key, Measurement] = {}
    for key, first in keyed[0].items():
        every = [run[key] for run in keyed if key in run]
        values = np.array([m.value for m in every])
        if len(every) < len(seeds) or not np.isfinite(values).all():
            note = next((m.note for m in every if math.isnan(m.value)), "") or "missing for a seed"
            out[key] = replace(first, value=math.nan, low=None, high=None, note=note)
            continue
        mean = mean_measurement(
            first.name,
            first.unit,
            values,
            seed=seeds[0],
            over="seeds",
            better=first.better,
            group=first.group,
            note=first.note,
        )
        out[key] = replace(mean, under=first.under, details={"seeds": list(seeds)}, baseline=first.baseline)
    return out


def _corrected(rows: list[Row]) -> tuple[Row, ...]:
    """Add Holm's correction over all differences of the comparison."""
    p = [r.difference.details.get("p", math.nan) if r.difference else math.nan for r in rows]
    out = []
    for row, corrected in zip(rows, holm(p), strict=True):
        if row.difference is not None and math.isfinite(corrected):
            details = {**row.difference.details, "p_holm": float(corrected)}
            row = replace(row, difference=replace(row.difference, details=details))
        out.append(row)
    return tuple(out)


def _with_interval(m: Measurement, sign: bool = False) -> str:
    if math.isnan(m.value):
        return "-"
    text = ("+" if sign and m.value > 0 else "") + format_number(m.value)
    if m.low is not None and m.high is not None:
        text += f" [{format_number(m.low)}, {format_number(m.high)}]"
    return text


def _p_text(m: Measurement) -> str:
    p = m.details.get("p")
    return "" if p is None else f"{p:.3g} (Holm {m.details.get('p_holm', p):.3g})"
