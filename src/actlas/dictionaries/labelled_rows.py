"""Rows of activations with where they come from: document, position, token, and the text before it.

    for part in labelled_rows(model, corpus, "blocks.15.resid_post", batch=1024, tokens=16384):
        part.x                    # float32 [n, d]
        part.label                # int64 [n, 3]: document (a number, see part.names), position, token
        part.held                 # bool [n]: kept apart for measuring

A dictionary whose atoms are activations (`actlas.dictionaries.itda`) needs this. The data may be a
corpus that a model reads, a Store, or rows with or without labels. Every tenth window (or document of a
store, or block of 64 rows) is held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.calibration.origin import document_key
from actlas.core.calibration.reading import Source, check_row_sites, read_batch, rows_of
from actlas.core.errors import InputError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

EVERY = 10  # one unit in so many is held out
BEFORE = 12  # tokens of text kept with a row, its own included
CONTEXT = 128  # tokens in a window, as in the paper
_BLOCK = 64  # rows that no model reads in windows are held out in blocks of so many positions


@dataclass
class Rows:
    """Consecutive rows.

    Attributes:
        x: float32 `[n, d]` on the CPU.
        label: int64 `[n, 3]`: number of the document, position in it, token id (-1 where unknown).
        unit: int64 `[n]`, the window, document or block that a row belongs to.
        held: bool `[n]`, rows that are kept apart.
        before: int64 `[n, BEFORE]`, the token ids up to and with the row's own; -1 pads on the left.
        names: the documents by number, as far as they are known.
    """

    x: Tensor
    label: Tensor
    unit: Tensor
    held: Tensor
    before: Tensor
    names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: Any) -> Rows:
        return Rows(self.x[at], self.label[at], self.unit[at], self.held[at], self.before[at], self.names)

    @staticmethod
    def cat(parts: list[Rows]) -> Rows:
        """Join rows of one source, in order."""
        if len(parts) == 1:
            return parts[0]
        columns = ("x", "label", "unit", "held", "before")
        x, label, unit, held, before = (torch.cat([getattr(p, name) for p in parts]) for name in columns)
        return Rows(x, label, unit, held, before, parts[-1].names)

    def where(self, row: int) -> str:
        """Say which row this is, for an error."""
        document, position, _ = self.label[row].tolist()
        name = self.names[document] if 0 <= document < len(self.names) else str(document)
        return f"document {name!r}, position {position}"


def labelled_rows(
    model: Model | None,
    data: Any,
    site: str,
    *,
    batch: int,
    tokens: int | None = None,
    context: int | None = None,
    labels: Tensor | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> Iterator[Rows]:
    """Yield rows in batches of `batch` (the last may be smaller), each checked.

    Args:
        model: reads a corpus; not needed for a Store or rows.
        data: a corpus, a Store, or rows `[n, d]`.
        site: one site.
        tokens: stop after so many rows.
        context: tokens in a window of a corpus; default 128, or what the model takes.
        labels: for rows, int64 `[n, 2 or 3]`: document, position, token.
        batch_tokens: of one forward pass.
        seed: of a Store's order.

    Raises:
        InputError: no rows, a corpus without a model, several sites, a row of zeros.
        NonFiniteError: a row that holds NaN or infinity, named by document and position.
        ShapeError: rows or labels of another shape.
    """
    if isinstance(data, Tensor):
        source = _of_tensor(data, labels)
    elif labels is not None:
        raise InputError("labels go with rows [n, d]; a corpus and a store have their own")
    elif hasattr(data, "batches") and hasattr(data, "query"):
        if model is not None and data.fingerprint is not None:
            data.fingerprint.check(model.fingerprint, "the store")
        source = _of_store(data, site, batch, seed)
    elif model is None:
        raise InputError("a corpus needs a model to read it; give one, or rows [n, d]")
    else:
        source = _of_corpus(model, data, site, tokens, context, batch_tokens)
    seen = 0
    for part in _rebatch(source, batch):
        part = part if tokens is None else part[: tokens - seen]
        if not len(part):
            return
        _check(part, site)
        seen += len(part)
        yield part
    if not seen:
        raise InputError("there are no rows to fit; give at least one document with some text")


def _of_corpus(
    model: Model, corpus: Iterable[Any], site: str, tokens: int | None, context: int | None, batch_tokens: int
) -> Iterator[Rows]:
    resolved = check_row_sites(model.resolve(site))
    if context is None:
        context = min(CONTEXT, model.context_length or CONTEXT)
    if len(resolved) != 1:
        raise InputError(f"a dictionary is fitted at one site; {site!r} names {len(resolved)}")
    numbers: dict[str, int] = {}
    names: list[str] = []
    windows = 0
    for read in Source(corpus).batches(model, batch_tokens, context, tokens):
        for name in read.documents:
            if name not in numbers:
                numbers[name] = len(names)
                names.append(name)
        parts: list[Rows] = []

        def take(
            at: Site, value: Tensor, read: Any = read, parts: list[Rows] = parts, first: int = windows
        ) -> None:
            ids = _ids(read.encoded)
            for x, origin in rows_of(value, at, read, read.origin(0), 0):
                own = torch.tensor([numbers[n] for n in origin.names])[origin.document]
                label = torch.stack([own, origin.position, origin.token], dim=1)
                unit = origin.document + first
                before = _before(ids, origin.document, origin.place) if ids is not None else _none(len(x))
                x = x.to("cpu", torch.float32)
                parts.append(Rows(x, label, unit, unit % EVERY == EVERY - 1, before, names))

        read_batch(model, read, resolved, take)
        windows += len(read.documents)
        yield from parts


def _ids(encoded: dict[str, Any]) -> Tensor | None:
    """Return the real token ids of each row, padding moved out: `[batch, pos]` with -1 behind them."""
    ids = encoded.get("input_ids")
    if not isinstance(ids, Tensor):
        return None
    mask = encoded.get("attention_mask")
    return ids.cpu() if not isinstance(mask, Tensor) else torch.where(mask.bool(), ids, -1).cpu()


def _before(ids: Tensor, row: Tensor, place: Tensor) -> Tensor:
    columns = place.unsqueeze(1) + torch.arange(1 - BEFORE, 1)
    found = ids[row.unsqueeze(1), columns.clamp(min=0)]
    return torch.where(columns >= 0, found, -1)


def _none(n: int) -> Tensor:
    return torch.full((n, BEFORE), -1)


def _of_tensor(x: Tensor, labels: Tensor | None) -> Iterator[Rows]:
    if x.ndim != 2 or not x.is_floating_point():
        raise ShapeError(f"rows must be floats [n, d], not {x.dtype} {list(x.shape)}")
    n = len(x)
    if labels is None:
        label = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)], dim=1)
        unit = torch.arange(n) // _BLOCK
    else:
        if labels.shape not in ((n, 2), (n, 3)) or labels.is_floating_point():
            raise ShapeError(f"labels must be whole numbers [{n}, 2 or 3], not {list(labels.shape)}")
        label = labels.to("cpu", torch.int64)
        place = torch.stack([label[:, 0], label[:, 1] // _BLOCK], dim=1)
        unit = torch.unique(place, dim=0, return_inverse=True)[1]
    if label.shape[1] == 2:
        label = torch.cat([label, torch.full((n, 1), -1)], dim=1)
    before = _none(n)
    before[:, -1] = label[:, 2]
    rows = x.detach().to("cpu", torch.float32)
    yield Rows(rows, label, unit, unit % EVERY == EVERY - 1, before)


def _of_store(store: Any, site: str, batch: int, seed: int) -> Iterator[Rows]:
    """Read a store in a shuffled order that only the seed decides, so that two models' stores agree.

    Massive rows differ between models, so they are read too, and left out by their norm afterwards.
    """
    table = store.tokens
    columns = {name: table.column(name).to_pylist() for name in ("document", "position", "token")}
    names = list(dict.fromkeys(str(d) for d in columns["document"]))
    numbers = {name: i for i, name in enumerate(names)}
    label = torch.tensor(
        [
            (numbers[str(d)], p, t)
            for d, p, t in zip(columns["document"], columns["position"], columns["token"], strict=True)
        ]
    )
    keys = torch.tensor([document_key(name, 0) % EVERY for name in names])
    for found in store.batches(batch, sites=[site], shuffle=True, seed=seed, keep_massive=True):
        own = label[torch.as_tensor(found["row"])]
        before = _none(len(own))
        before[:, -1] = own[:, 2]
        held = keys[own[:, 0]] == EVERY - 1
        yield Rows(found[site].to(torch.float32), own, own[:, 0], held, before, names)


def _rebatch(source: Iterator[Rows], batch: int) -> Iterator[Rows]:
    if batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1 row")
    waiting: list[Rows] = []
    held = 0
    for part in source:
        waiting.append(part)
        held += len(part)
        if held >= batch:
            whole = Rows.cat(waiting)
            for start in range(0, held - batch + 1, batch):
                yield whole[start : start + batch]
            rest = held - held % batch
            waiting, held = ([whole[rest:]], held - rest) if held > rest else ([], 0)
    if held:
        yield Rows.cat(waiting)


def _check(part: Rows, site: str) -> None:
    bad = ~torch.isfinite(part.x).all(1)
    if bool(bad.any()):
        where = part.where(int(bad.nonzero()[0]))
        raise NonFiniteError(f"{site} holds NaN or infinity at {where}; leave that document out")
    zero = ~part.x.any(1)
    if bool(zero.any()):
        where = part.where(int(zero.nonzero()[0]))
        raise InputError(f"{site} is all zeros at {where}; an atom needs a direction, so leave such rows out")
