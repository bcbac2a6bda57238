"""How well single features of a dictionary tell the values of a known attribute apart.

For feature j and value v of an attribute (an item's author, a prompt's subject), over labelled rows:

    precision = P(a = v | f_j > 0)      recall = P(f_j > 0 | a = v)      F1 = their harmonic mean

A feature may stand for several values at once ("names that start with a J"): `best_union` sorts the
values by their single F1 and takes the best of the first 1, 2, ... `most` of them together.

    table = attribute_f1(sae.encode(x), names)        # names: one label a row
    table.best("Mary")                                # (feature, F1)
    best_union(table, most=10)                        # for every feature: which values, and their F1

The F1 that chose a feature is too good on the rows that chose it. `f1_on` measures a choice on other
rows, with a bootstrap interval. Features that are never active have F1 -inf, so they are never chosen.

Source: Makelov, Lange and Nanda 2024, "Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control", section 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError, did_you_mean
from actlas.core.intervals import Array, bootstrap_statistic, divide
from actlas.core.measurement import Measurement

Sign = Literal["positive", "any"]
#: What a row is labelled with: one label each, or one bool mask `[rows]` for each value.
Values = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class F1Table:
    """Precision, recall and F1 of every feature for every value.

    Attributes:
        values: the attribute's values, in order.
        joint: int64 `[features, values]`, rows at which the feature is active and the value is v.
        active: int64 `[features]`, rows at which the feature is active.
        support: int64 `[values]`, rows of each value.
        rows: number of rows.
        disjoint: whether a row has at most one value, so that unions can be counted.
    """

    values: tuple[str, ...]
    joint: Tensor
    active: Tensor
    support: Tensor
    rows: int
    disjoint: bool

    @property
    def precision(self) -> Tensor:
        """Share of the feature's active rows with this value, float64 `[features, values]`; NaN without."""
        return self.joint.double() / self.active.double().unsqueeze(1)

    @property
    def recall(self) -> Tensor:
        """Share of the value's rows at which the feature is active, float64; NaN for a value without rows."""
        return self.joint.double() / self.support.double().unsqueeze(0)

    @property
    def f1(self) -> Tensor:
        """F1, float64 `[features, values]`; -inf where the feature is never active."""
        return _f1(self.joint, self.active.unsqueeze(1), self.support.unsqueeze(0))

    def index(self, value: str) -> int:
        """Return the column of a value.

        Raises:
            InputError: the rows have no such value.
        """
        if value not in self.values:
            few = ", ".join(self.values[:8]) + (", ..." if len(self.values) > 8 else "")
            hint = did_you_mean(value, self.values) or f"; there are {few}"
            raise InputError(f"the attribute has no value {value!r}{hint}")
        return self.values.index(value)

    def best(self, value: str, n: int = 1) -> list[tuple[int, float]]:
        """Return the `n` features of greatest F1 for a value, best first, as (feature, F1).

        Features that are never active are left out, so there may be fewer than `n`.
        """
        column = self.f1[:, self.index(value)]
        found = column.topk(min(n, len(column)))
        return [
            (int(j), float(f))
            for j, f in zip(found.indices, found.values, strict=True)
            if f > -torch.inf  # never active
        ]

    def interpretable(self, least: float = 0.8) -> Tensor:
        """Return which features have F1 above `least` for some value, bool `[features]`."""
        return (self.f1 > least).any(1)


@dataclass(frozen=True)
class Union:
    """The values that a feature stands for together.

    Attributes:
        feature: its number.
        values: one or more values, the best alone first.
        f1: F1 of the feature against "any of these values".
        single: F1 against the first value alone.
    """

    feature: int
    values: tuple[str, ...]
    f1: float
    single: float


def attribute_f1(codes: Codes, values: Values, *, sign: Sign = "positive") -> F1Table:
    """Count how each feature's activity goes with each value.

    Args:
        codes: codes of n rows, `[n, k]` places.
        values: one label a row (a label of `None` belongs to no value), or `{value: bool mask [n]}` where
            a row can have several.
        sign: `"positive"`: a feature is active where its code is above 0; `"any"`: where it is not 0
            (dictionaries with signed codes).

    Raises:
        InputError: labels that do not fit the rows, no rows, or no value at all.
    """
    if len(codes.shape) != 1:
        raise InputError(
            f"F1 needs codes of rows [n, k]; these are {list(codes.indices.shape)}: flatten them"
        )
    names, masks = _masks(values, len(codes))
    on = _active(codes, sign)
    row, place = on.nonzero(as_tuple=True)
    feature = codes.indices[row, place].cpu()
    row = row.cpu()
    active = torch.bincount(feature, minlength=codes.features)
    disjoint = bool((masks.sum(1) <= 1).all())
    if disjoint:
        label = torch.where(masks.any(1), masks.to(torch.int8).argmax(1), len(names))
        key = feature * (len(names) + 1) + label[row]
        counted = torch.bincount(key, minlength=codes.features * (len(names) + 1))
        joint = counted.reshape(codes.features, len(names) + 1)[:, : len(names)].contiguous()
    else:
        joint = torch.stack(
            [torch.bincount(feature[masks[row, v]], minlength=codes.features) for v in range(len(names))], 1
        )
    return F1Table(names, joint, active, masks.sum(0), len(codes), disjoint)


def best_union(table: F1Table, features: Collection[int] | None = None, *, most: int = 10) -> list[Union]:
    """Return for each feature the values that it stands for together.

    The values are sorted by their single F1; of the first 1, 2, ..., `most` of them together those with
    the greatest F1 are kept (the fewest, among equals).

    Args:
        table: of `attribute_f1`, with at most one value a row.
        features: which features; default all that are ever active.
        most: how many values at most.

    Raises:
        InputError: rows with several values (their unions cannot be counted from a table), a feature that
            does not exist, or `most` below 1.
    """
    if not table.disjoint:
        raise InputError("unions need rows of at most one value each; these rows have several")
    if most < 1:
        raise InputError(f"most is {most}; a union has at least 1 value")
    n = len(table.active)
    if features is None:
        chosen = table.active.nonzero().squeeze(1)
    else:
        chosen = torch.tensor([int(f) for f in features], dtype=torch.int64)
        if bool(((chosen < 0) | (chosen >= n)).any()):
            raise InputError(f"features {chosen.tolist()} are not all within 0 to {n - 1}")
    width = min(most, len(table.values))
    single, order = table.f1[chosen].sort(dim=1, descending=True, stable=True)
    joint = table.joint[chosen].gather(1, order[:, :width]).cumsum(1)
    support = table.support[order[:, :width]].cumsum(1)
    together = _f1(joint, table.active[chosen].unsqueeze(1), support)
    size = together.argmax(1)
    return [
        Union(
            feature=int(j),
            values=tuple(table.values[int(v)] for v in order[i, : int(size[i]) + 1]),
            f1=float(together[i, size[i]]),
            single=float(single[i, 0]),
        )
        for i, j in enumerate(chosen)
    ]


def f1_on(
    codes: Codes,
    values: Values,
    feature: int,
    union: Collection[str],
    *,
    sign: Sign = "positive",
    seed: int = 0,
    name: str = "attribute F1",
    group: Mapping[str, str] | None = None,
) -> Measurement:
    """Measure a feature's F1 against "any of these values" on rows that did not choose it.

    Args:
        codes, values, sign: see `attribute_f1`.
        feature: its number.
        union: the values it is said to stand for.
        seed: of the bootstrap over rows.
        name, group: of the measurement.

    Returns:
        F1 with its interval. A feature that is never active here has F1 0 if the values occur.
    """
    names, masks = _masks(values, len(codes))
    wanted = torch.zeros(len(codes), dtype=torch.bool)
    for value in union:
        if value in names:
            wanted |= masks[:, names.index(value)]
    codes.check_feature(feature)
    on = (_active(codes, sign) & (codes.indices == feature)).any(1).cpu()
    a, v = on.numpy().astype(np.float64), wanted.numpy().astype(np.float64)

    def f1(counts: Array) -> Array:
        return divide(2 * (counts @ (a * v)), counts @ (a + v))

    found = float(f1(np.ones((1, len(a))))[0])
    low, high = bootstrap_statistic(f1, len(a), seed=seed)
    return Measurement(
        name=name,
        value=found,
        unit="fraction",
        n=len(a),
        low=None if np.isnan(low) else low,
        high=None if np.isnan(high) else high,
        interval="bootstrap over rows",
        seed=seed,
        better="higher",
        group=dict(group or {}),
        note="" if found == found else "neither the feature nor its values occur in these rows",
        details={"feature": int(feature), "values": [str(v) for v in union]},
    )


def _f1(joint: Tensor, active: Tensor, support: Tensor) -> Tensor:
    total = (active + support).double()
    f1 = 2 * joint.double() / total
    return torch.where(active.expand_as(f1) > 0, f1, torch.full_like(f1, -torch.inf))


def _active(codes: Codes, sign: Sign) -> Tensor:
    if sign not in ("positive", "any"):
        raise InputError(f"sign is {sign!r}; it must be 'positive' or 'any'")
    return codes.values > 0 if sign == "positive" else codes.active


def _masks(values: Values, rows: int) -> tuple[tuple[str, ...], Tensor]:
    """Return the values' names and bool masks `[rows, values]`."""
    if isinstance(values, Mapping):
        names = tuple(str(v) for v in values)
        columns = [torch.as_tensor(m).to("cpu").bool() for m in values.values()]
        if any(c.shape != (rows,) for c in columns):
            wrong = next(n for n, c in zip(names, columns, strict=True) if c.shape != (rows,))
            raise InputError(f"the mask of {wrong!r} does not have one entry for each of the {rows} rows")
        masks = torch.stack(columns, 1) if columns else torch.zeros(rows, 0, dtype=torch.bool)
    else:
        labels = [None if v is None else str(v) for v in values]
        if len(labels) != rows:
            raise InputError(
                f"there are {rows} rows of codes but {len(labels)} labels; give one for each row"
            )
        names = tuple(sorted({v for v in labels if v is not None}))
        place = {v: i for i, v in enumerate(names)}
        masks = torch.zeros(rows, len(names), dtype=torch.bool)
        for i, v in enumerate(labels):
            if v is not None:
                masks[i, place[v]] = True
    if not rows or not names:
        raise InputError(f"F1 needs labelled rows; there are {rows} rows with {len(names)} values")
    return names, masks
