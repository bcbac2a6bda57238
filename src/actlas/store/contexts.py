"""Where a feature is largest in a store, with the text around each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError
from actlas.core.lens import Lens

if TYPE_CHECKING:
    from actlas.store.store import Store

_Hit = tuple[float, int]  # value and row
_BLOCK = 2048  # rows that are encoded at once
_SPARE = 8  # candidates for each context that is wanted, because near ones are merged


@dataclass(frozen=True)
class Context:
    """A token with the text around it.

    Attributes:
        pieces: the text of each token, in order; joined they are the text.
        index: which of the pieces the token is.
        row: its row in the store.
        document: the document's id.
        position: the token's position in it.
        token: its id.
        value: the feature's value there, or `None` if this is not about a feature.
        activations: the feature's value at each of the pieces; empty if it is not about one.
    """

    pieces: tuple[str, ...]
    index: int
    row: int
    document: str
    position: int
    token: int
    value: float | None = None
    activations: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """The pieces joined, the token marked as «token»."""
        marked = [f"«{p}»" if i == self.index else p for i, p in enumerate(self.pieces)]
        return "".join(marked)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return asdict(self)


def context_of(store: Store, row: int, before: int, after: int) -> Context:
    """Return the context of a row: tokens of the same document, at most so many before and after."""
    return _contexts(store, [row], before, after)[row]


def top_contexts(
    store: Store, lens: Lens, features: Sequence[int], n: int, context: int, rows: Tensor
) -> dict[int, list[Context]]:
    """Return each feature's largest places; see `Store.tops`."""
    if n < 1 or context < 0:
        raise InputError(f"n must be at least 1 and context at least 0, not {n} and {context}")
    if lens.fingerprint is not None:
        lens.fingerprint.check(store.fingerprint, f"the lens at {lens.site}")
    lens.flat(torch.empty(0, store.channels(lens.site)))
    chosen = [lens.check_feature(int(feature)) for feature in features]
    values, found = _largest(store, lens, chosen, min(n * _SPARE, len(rows)), rows)
    picked = {}
    for i, feature in enumerate(chosen):
        candidates = [
            (value, row)
            for value, row in zip(values[i].tolist(), found[i].tolist(), strict=True)
            if value > 0
        ]
        picked[feature] = candidates
    needed = sorted({row for candidates in picked.values() for _, row in candidates})
    around = _contexts(store, needed, context, context)
    return {
        feature: _with_values(store, lens, feature, _apart(candidates, around, n), around)
        for feature, candidates in picked.items()
    }


def _largest(
    store: Store, lens: Lens, features: Sequence[int], k: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each feature and their rows, `[features, k]`, largest first."""
    values = torch.full((len(features), 0), -torch.inf)
    numbers = torch.zeros((len(features), 0), dtype=torch.int64)
    for part in rows.split(_BLOCK):
        z = values_of(lens, store.read(lens.site, part), features).T.contiguous()
        here = z.topk(min(k, len(part)), sorted=False).indices.sort(dim=1).values
        values = torch.cat([values, z.gather(1, here)], 1)
        numbers = torch.cat([numbers, part[here]], 1)
        # Stable, so that of equal values the first rows win.
        order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
        values, numbers = values.gather(1, order), numbers.gather(1, order)
    return values, numbers


def values_of(lens: Lens, x: Tensor, features: Sequence[int]) -> Tensor:
    """Return the values of some features at rows `[n, d]`, `[n, features]`."""
    with torch.no_grad():
        codes: Any = lens.encode(x)
    if isinstance(codes, Codes):
        if len(features) == 1:
            return codes.of(features[0]).unsqueeze(1).float()
        codes = codes.dense()
    found: Tensor = codes.flatten(1)[:, list(features)]
    return found.float()


def _apart(candidates: list[_Hit], around: dict[int, Context], n: int) -> list[_Hit]:
    """Take the largest first, and leave out those whose context overlaps one that was taken."""
    taken: list[_Hit] = []
    covered: set[int] = set()
    for value, row in candidates:
        context = around[row]
        span = range(row - context.index, row - context.index + len(context.pieces))
        if covered.isdisjoint(span):
            covered.update(span)
            taken.append((value, row))
            if len(taken) == n:
                break
    return taken


def _with_values(
    store: Store, lens: Lens, feature: int, taken: list[_Hit], around: dict[int, Context]
) -> list[Context]:
    """Return the contexts with the feature's value at each piece."""
    spans = []
    for _, row in taken:
        context = around[row]
        first = row - context.index
        spans.append(range(first, first + len(context.pieces)))
    rows = [row for span in spans for row in span]
    if not rows:
        return []
    activations = values_of(lens, store.read(lens.site, rows), [feature])[:, 0].tolist()
    made, at = [], 0
    for (value, row), span in zip(taken, spans, strict=True):
        here = tuple(activations[at : at + len(span)])
        at += len(span)
        context = around[row]
        made.append(Context(**{**context.__dict__, "value": value, "activations": here}))
    return made


def _contexts(store: Store, rows: Sequence[int], before: int, after: int) -> dict[int, Context]:
    """Return the contexts of some rows, by row, asking the token table once."""
    wanted = sorted({near for row in rows for near in range(max(row - before, 0), row + after + 1)})
    found_rows = store.table.rows(wanted)
    table = {name: found_rows[name].to_pylist() for name in ("row", "document", "text", "position", "token")}
    index = {row: i for i, row in enumerate(table["row"])}
    found = {}
    for row in rows:
        i = index[row]
        document = table["document"][i]
        near = [
            j
            for j in range(max(i - before, 0), min(i + after + 1, len(table["row"])))
            if table["document"][j] == document and table["row"][j] - row == j - i
        ]
        found[row] = Context(
            tuple(table["text"][j] for j in near),
            near.index(i),
            row,
            document,
            table["position"][i],
            table["token"][i],
        )
    return found
