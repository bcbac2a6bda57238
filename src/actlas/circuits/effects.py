"""Effects of patches: how much of the difference between two runs each part carries, with intervals.

    denoise:  (m(patched) - m(corrupted)) / (m(clean) - m(corrupted))      1: all of the behaviour is back
    others:   (m(clean) - m(patched)) / (m(clean) - m(corrupted))          1: all of it is gone

Both means over prompts are taken before the division, so that a prompt with a small difference does not
blow up. Intervals are bootstraps over prompts (95%), numerator and denominator drawn together. The largest
of many effects is too large by selection; `held_out` chooses on one half of the prompts and measures on
the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.circuits.nodes import Node
from actlas.core.errors import InputError
from actlas.core.intervals import divide, percentiles, resample_counts
from actlas.core.measurement import Measurement

Array = NDArray[np.float64]
Part = Node | tuple[Node, ...]
RESAMPLES = 1000


@dataclass(frozen=True)
class Effect:
    """One part's effect: a fraction of the difference between the two runs, with its 95% interval."""

    part: Part
    label: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.label}: {self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, eq=False)
class Effects:
    """What patching found.

    Attributes:
        parts: what was patched: nodes, or tuples of nodes that were patched together.
        patched: the metric under each patch, `[parts, n]` float64.
        clean, corrupt: the metric of the two runs, `[n]` float64.
        mode, metric, unit: how it was patched and judged.
        method: `"exact"`, `"attribution"` or `"integrated gradients"`.
        model, task: their names.
        inert: which patches changed nothing, bool `[parts]`.
        seed: of the bootstrap and of resampling.
        notes: what a reader must know.
    """

    parts: tuple[Part, ...]
    patched: Tensor = field(repr=False)
    clean: Tensor = field(repr=False)
    corrupt: Tensor = field(repr=False)
    mode: str
    metric: str
    unit: str
    method: str
    model: str
    task: str
    inert: Tensor = field(repr=False)
    seed: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.parts)

    def __post_init__(self) -> None:
        check_difference(self.clean, self.corrupt, self.metric)

    @property
    def changes(self) -> Tensor:
        """The metric's change that counts as effect, per prompt, `[parts, n]`, in the metric's unit."""
        return self.patched - self.corrupt if self.mode == "denoise" else self.clean - self.patched

    @property
    def values(self) -> Tensor:
        """The effects, `[parts]` float64, as fractions of the difference between the runs."""
        return self.changes.mean(1) / (self.clean - self.corrupt).mean()

    @property
    def labels(self) -> list[str]:
        """A short name of each part."""
        return [label(p) for p in self.parts]

    def __getitem__(self, part: Part | str | int) -> Effect:
        """Return one part's effect, by node, label or number.

        Raises:
            InputError: it was not patched.
        """
        if isinstance(part, int):
            index = part
        elif isinstance(part, str):
            index = self.labels.index(part) if part in self.labels else -1
        else:
            index = self.parts.index(part) if part in self.parts else -1
        if not 0 <= index < len(self):
            raise InputError(f"{part if isinstance(part, (str, int)) else label(part)!r} was not patched")
        return self.intervals([index])[0]

    def top(self, k: int = 10) -> list[Effect]:
        """Return the `k` parts with the largest effects in absolute value, largest first."""
        order = self.values.abs().argsort(descending=True, stable=True)[:k]
        return self.intervals(order.tolist())

    def intervals(self, which: Sequence[int] | None = None) -> list[Effect]:
        """Return effects with bootstrap intervals over prompts, of all parts or of some."""
        chosen = list(range(len(self))) if which is None else list(which)
        num = self.changes[chosen].numpy()
        den = (self.clean - self.corrupt).numpy()
        n = len(den)
        values = self.values[chosen].tolist()
        bounds = [(math.nan, math.nan)] * len(chosen)
        if n > 1 and chosen:
            draws = np.concatenate(
                [
                    divide(c @ num.T, np.broadcast_to((c @ den)[:, None], (len(c), len(chosen))))
                    for c in _counts(n, self.seed)
                ]
            )
            bounds = [percentiles(draws[:, i], n) for i in range(len(chosen))]
        return [
            Effect(self.parts[i], label(self.parts[i]), v, *b)
            for i, v, b in zip(chosen, values, bounds, strict=True)
        ]

    def rows(self, index: Sequence[int] | slice) -> Effects:
        """Return the effects on some of the prompts only."""
        return replace(
            self, patched=self.patched[:, index], clean=self.clean[index], corrupt=self.corrupt[index]
        )

    def held_out(self, k: int = 5) -> list[Effect]:
        """Return the `k` largest effects of a random half of the prompts as measured on the other half."""
        n = len(self.clean)
        if n < 4:
            raise InputError(f"{n} prompts are too few to choose on half of them; give at least 4")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).tolist()
        chosen = self.rows(order[: n // 2]).values.abs().argsort(descending=True, stable=True)[:k]
        return self.rows(order[n // 2 :]).intervals(chosen.tolist())

    def only(self, which: Sequence[int]) -> Effects:
        """Return the effects of some of the parts."""
        chosen = list(which)
        parts = tuple(self.parts[i] for i in chosen)
        return replace(self, parts=parts, patched=self.patched[chosen], inert=self.inert[chosen])

    def measurements(self, k: int = 5, *, held_out: bool = False) -> tuple[Measurement, ...]:
        """Return the largest effects as measurements; `held_out`: on prompts that did not choose them."""
        group = {"task": self.task, "mode": self.mode, "method": self.method}
        n = len(self.clean) - len(self.clean) // 2 if held_out else len(self.clean)
        note = f"share of the difference in {self.metric} between clean and corrupted prompts"
        note += "; chosen on the other half of the prompts" if held_out else ""
        return tuple(
            Measurement(
                "patching-effect", e.value, "fraction", n, e.low, e.high, "bootstrap over prompts", self.seed,
                group={**group, "component": e.label}, note=note,
            )
            for e in (self.held_out(k) if held_out else self.top(k))
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary: every effect, with intervals for the fifty largest."""
        largest = {label(e.part): e for e in self.top(50)}
        records = []
        for part, name, value, inert in zip(
            self.parts, self.labels, self.values.tolist(), self.inert.tolist(), strict=True
        ):
            record: dict[str, Any] = {"component": name, "effect": value}
            if isinstance(part, Node):
                record |= {"site": part.site, "position": part.position}
                record |= {} if part.feature is None else {"feature": part.feature}
            if name in largest:
                record |= {"low": largest[name].low, "high": largest[name].high}
            records.append(record | ({"changed_nothing": True} if inert else {}))
        return {
            "model": self.model,
            "task": self.task,
            "mode": self.mode,
            "method": self.method,
            "metric": self.metric,
            "unit": self.unit,
            "prompts": len(self.clean),
            "clean": float(self.clean.mean()),
            "corrupted": float(self.corrupt.mean()),
            "seed": self.seed,
            "notes": list(self.notes),
            "effects": records,
        }


def agreement(exact: Effects, estimated: Effects) -> Measurement:
    """Return Spearman's rank correlation of two lists of effects, with a bootstrap over prompts.

    Args:
        exact, estimated: effects of the same parts on the same prompts, e.g. of `patch` and `attribute`.

    Raises:
        InputError: they are of different parts or prompts.
    """
    if exact.parts != estimated.parts or exact.patched.shape != estimated.patched.shape:
        raise InputError(
            "the two lists of effects are of different parts or prompts, so they cannot be compared"
        )
    if len(exact) < 3:
        raise InputError(f"a rank correlation of {len(exact)} parts says nothing; give at least 3")
    sides = [e.changes.numpy() for e in (exact, estimated)]
    n = sides[0].shape[1]
    value = float(_spearman(*(s.mean(1)[None] for s in sides))[0])
    draws = np.concatenate([_spearman(*(c @ s.T for s in sides)) for c in _counts(n, exact.seed)])
    low, high = percentiles(draws, n) if n > 1 else (math.nan, math.nan)
    k = min(10, len(exact))
    tops = [set(e.values.abs().argsort(descending=True)[:k].tolist()) for e in (exact, estimated)]
    shared = len(tops[0] & tops[1])
    return Measurement(
        "patching-agreement", value, "rank correlation", n, low, high, "bootstrap over prompts", exact.seed,
        group={"task": exact.task, "mode": exact.mode, "method": estimated.method}, better="higher",
        note=f"Spearman's, over {len(exact)} parts; the two share {shared} of their {k} largest",
        details={"parts": len(exact), "top": k, "shared_top": shared},
    )  # fmt: skip


def label(part: Part) -> str:
    """Return a short name of a part."""
    return part.label if isinstance(part, Node) else " + ".join(n.label for n in part)


def check_difference(clean: Tensor, corrupt: Tensor, metric: str) -> None:
    """Raise InputError if a metric does not tell the clean from the corrupted prompts."""
    difference = clean - corrupt
    scale = float(torch.cat([clean, corrupt]).abs().max())
    if float(difference.abs().max()) <= 1e-6 * max(scale, 1e-6):
        raise InputError(
            f"the metric {metric} is the same ({float(clean.mean()):.4g}) on clean and corrupted prompts, so"
            " there is nothing to attribute; use another metric or corruption"
        )
    if abs(float(difference.mean())) <= 1e-3 * float(difference.abs().mean()):
        raise InputError(
            f"the metric {metric} differs on clean and corrupted prompts in both directions and cancels on"
            " average; orient it (answer against wrong answer of each pair)"
        )


def _counts(n: int, seed: int) -> Any:
    return resample_counts(n, RESAMPLES, seed)


def _spearman(a: Array, b: Array) -> Array:
    """Return the rank correlation of each row of `a` with that of `b`, both `[draws, parts]`."""
    from scipy.stats import rankdata

    x, y = (rankdata(z, axis=1) for z in (a, b))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return divide((x * y).sum(1), np.sqrt((x**2).sum(1) * (y**2).sum(1)))
