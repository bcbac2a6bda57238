"""A Measurement: one number about a model, with its uncertainty, its n and its unit.

Cards, comparisons and reproductions are made of these and of nothing else. How an interval is
computed lives in `actlas.measure.statistics`; this file only says what a measurement is, so that
every room can hold one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Measurement:
    """One number with everything a reader needs to trust it.

    Attributes:
        name: what was measured, in the field's words, e.g. `"perplexity"`.
        value: the number; `nan` where there was nothing to measure (the note says why).
        unit: `"nats/token"`, `"fraction"`, `"tokens/s"`, `"bytes"`, `"count"`, ...
        n: how many independent items stand behind it (documents, prompts, repeats).
        low, high: the 95% interval; `None` for exact counts, which have no uncertainty.
        interval: how the interval was made: `"bootstrap over documents"`, `"wilson"`, `"exact"`, ...
        seed: the seed of every random choice behind it; `None` if there was none.
        under: descriptions of the edits that were installed, in order.
        group: the slice it belongs to, e.g. `{"task": "ioi", "template": "ABBA"}` or `{"layer": "5"}`.
        better: which direction is an improvement, if either is.
        note: what a reader must know (rows left out, why a value is missing, ...).
        baseline: the measurement it must be read beside (a time is never reported alone).
        details: JSON-able extras (a curve, uncounted operators, thresholds).
        samples, weights: per-item values behind the number, for paired differences. Not saved.
    """

    name: str
    value: float
    unit: str
    n: int
    low: float | None = None
    high: float | None = None
    interval: str = "exact"
    seed: int | None = None
    under: tuple[str, ...] = ()
    group: Mapping[str, str] = field(default_factory=dict)
    better: Better | None = None
    note: str = ""
    baseline: Measurement | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    samples: np.ndarray | None = field(default=None, compare=False, repr=False)
    weights: np.ndarray | None = field(default=None, compare=False, repr=False)

    def with_group(self, **group: str) -> Measurement:
        """Return the same measurement with more group labels."""
        return replace(self, group={**self.group, **group})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary (without the per-item samples); `nan` becomes `null`."""
        out: dict[str, Any] = {
            "name": self.name,
            "value": _finite(self.value),
            "unit": self.unit,
            "n": self.n,
            "low": _finite(self.low),
            "high": _finite(self.high),
            "interval": self.interval,
            "seed": self.seed,
            "under": list(self.under),
            "group": dict(self.group),
            "better": self.better,
            "note": self.note,
            "details": {k: _finite(v) if isinstance(v, float) else v for k, v in self.details.items()},
        }
        if self.baseline is not None:
            out["baseline"] = self.baseline.to_json()
        return out

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Measurement:
        """Rebuild a measurement from `to_json`'s dictionary."""
        fields = dict(record)
        fields["value"] = math.nan if fields.get("value") is None else fields["value"]
        fields["under"] = tuple(fields.get("under", ()))
        if fields.get("baseline") is not None:
            fields["baseline"] = cls.from_json(fields["baseline"])
        return cls(**fields)

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"{self.name}: not available ({self.note or 'nothing to measure'})"
        text = f"{self.name}: {format_number(self.value)}"
        if self.low is not None and self.high is not None:
            text += f" [{format_number(self.low)}, {format_number(self.high)}]"
        unit = "" if self.unit in ("", "count") else f" {self.unit}"
        where = "".join(f", {k}={v}" for k, v in self.group.items())
        return f"{text}{unit} (n={self.n:,}{where})"


def format_number(x: float) -> str:
    """Format a number to four significant digits, with thousands separators for large integers."""
    if not math.isfinite(x):
        return str(x)
    if x == int(x) and abs(x) < 1e15:
        return f"{int(x):,}"
    if abs(x) >= 10000:
        return f"{x:,.0f}"
    if x != 0 and abs(x) < 1e-3:
        return f"{x:.2e}"
    return f"{x:.4g}"


def _finite(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(x)
