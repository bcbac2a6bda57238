"""Name features on some rows and judge the names on others; `concepts.py` is the door."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError, did_you_mean
from actlas.core.intervals import wilson
from actlas.dictionaries.attribute_f1 import F1Table, Sign, attribute_f1, best_union

#: Names a feature from its values at the naming rows `[n]` and their metadata, or gives `None`.
Namer = Callable[[int, Tensor, Mapping[str, Sequence[Any]]], "tuple[str, Sequence[str]] | None"]


@dataclass(frozen=True)
class Concept:
    """What a feature stands for, and how far that can be relied on.

    Attributes:
        feature: its number.
        attribute, values: its name: the attribute has one of these values.
        named_f1: F1 on the rows that named it.
        precision, recall: on the other rows; NaN where there is nothing to divide by.
        precision_interval, recall_interval: 95%, Wilson.
        confidence: their harmonic mean; 0 if the feature never fires where the name holds.
        share: share of the judging rows at which the name holds.
        firings: at how many judging rows the feature fires.
    """

    feature: int
    attribute: str
    values: tuple[str, ...]
    named_f1: float
    precision: float
    recall: float
    precision_interval: tuple[float, float]
    recall_interval: tuple[float, float]
    confidence: float
    share: float
    firings: int

    @property
    def name(self) -> str:
        """The name in words, e.g. `category: jazz or blues`."""
        return f"{self.attribute}: {' or '.join(self.values)}"

    def __str__(self) -> str:
        return (
            f"{self.feature}: {self.name} (precision {self.precision:.2f}, recall {self.recall:.2f}, "
            f"{self.firings} firings)"
        )


def name_and_judge(
    codes: Codes,
    labels: Mapping[str, Any],
    judging: Any,
    namer: str | Namer,
    most: int,
    most_share: float,
    least: int,
    sign: Sign,
) -> tuple[list[Concept], int]:
    side = {
        True: torch.from_numpy(np.flatnonzero(judging)),
        False: torch.from_numpy(np.flatnonzero(~judging)),
    }
    naming_labels = {a: v[~judging] for a, v in labels.items()}
    naming = codes[side[False]]
    fit = {a: attribute_f1(naming, v, sign=sign) for a, v in naming_labels.items() if _known(v)}
    test = {
        a: attribute_f1(codes[side[True]], v[judging], sign=sign)
        for a, v in labels.items()
        if _known(v[judging])
    }
    if not fit or not test:
        raise InputError("no attribute has a known value on both sides of the split; give more rows")
    active = next(iter(fit.values())).active
    live = [int(i) for i in (active >= max(1, least)).nonzero().squeeze(1)]
    named: dict[int, tuple[str, tuple[str, ...], float]] = {}
    if callable(namer):
        for j in live:
            answer = namer(j, naming.of(j), naming_labels)
            if answer is not None:
                attribute, values = answer[0], tuple(str(v) for v in answer[1])
                if attribute not in fit:
                    raise InputError(
                        f"the namer says {attribute!r} of feature {j}; the metadata has {', '.join(fit)}"
                        f"{did_you_mean(attribute, fit)}"
                    )
                named[j] = (attribute, values, _counts(fit[attribute], j, values)[3])
    else:
        for attribute, table in fit.items():
            for j, values, f1 in _unions(table, live, most, most_share):
                if j not in named or f1 > named[j][2]:
                    named[j] = (attribute, values, f1)
    made = [_judged(test[a], j, a, values, f1) for j, (a, values, f1) in named.items() if a in test]
    return sorted(made, key=lambda c: (-c.confidence, c.feature)), len(live)


def _unions(
    table: F1Table, live: Sequence[int], most: int, share: float
) -> list[tuple[int, tuple[str, ...], float]]:
    """Return for each live feature the best union that covers no more than its share of the rows."""
    left, found = list(live), []
    for width in sorted({w for w in (most, 7, 5, 4, 3, 2, 1) if w <= most}, reverse=True):
        again = []
        for union in best_union(table, left, most=width):
            covers = int(table.support[[table.index(v) for v in union.values]].sum()) / table.rows
            if covers <= share:
                found.append((union.feature, union.values, union.f1))
            else:
                again.append(union.feature)
        left = again
        if not left:
            break
    return found


def _counts(table: F1Table, feature: int, values: Sequence[str]) -> tuple[int, int, int, float]:
    """Return (firings where the name holds, firings, rows where it holds, F1) of a feature."""
    columns = [table.index(v) for v in values if v in table.values]
    hits = int(table.joint[feature, columns].sum())
    fires, holds = int(table.active[feature]), int(table.support[columns].sum())
    return hits, fires, holds, 2 * hits / max(1, fires + holds)


def _judged(
    table: F1Table, feature: int, attribute: str, values: tuple[str, ...], named_f1: float
) -> Concept:
    hits, fires, holds, f1 = _counts(table, feature, values)
    return Concept(
        feature=feature,
        attribute=attribute,
        values=values,
        named_f1=named_f1,
        precision=hits / fires if fires else float("nan"),
        recall=hits / holds if holds else float("nan"),
        precision_interval=wilson(hits, fires),
        recall_interval=wilson(hits, holds),
        confidence=f1,
        share=holds / table.rows,
        firings=fires,
    )


def _known(values: Any) -> bool:
    return any(v is not None for v in values)
