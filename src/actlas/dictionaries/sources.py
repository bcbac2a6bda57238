"""Where a dictionary's training rows come from: rows in memory, a Store on disk, or a live model.

    RowsSource(x)                                       rows that were read already
    StoreSource(store, "blocks.15.resid_post")          activations on disk, shuffled across the store
    LiveSource(model, corpus, "blocks.15.resid_post")   read while training, through a shuffle buffer

All give float32 batches in random order, leave massive activations out (rows whose norm is above ten
times the median: `skip_above`), and refuse NaN. A pass is the same for the same seed, and can be entered
at any batch (`start`), which is how an interrupted training goes on.

What a live source packs together is its `packing`. Only activations are ever mixed:

* `"document"`: each document alone, cut at the context; nothing attends across documents.
* `"block"`: documents are joined with the end-of-text token and cut into full blocks, as language-model
  pre-training does it; tokens attend to the document before their own.

Conversations with a chat template are documents whose text is the templated conversation
(`conversations.py`), so training on them one by one (FAST) is a choice of corpus and packing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError, NonFiniteError, ShapeError
from actlas.core.progress import progress
from actlas.core.streaming import TokenDocument
from actlas.dictionaries.objective import Batch

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.store import Store

#: Rows whose norm is above so many times the median norm are massive activations.
MASSIVE = 10.0
Packing = Literal["document", "block"]


class Source(Protocol):
    """Rows for `train`."""

    @property
    def channels(self) -> int: ...
    @property
    def target_channels(self) -> int: ...
    @property
    def skip_above(self) -> float | None: ...
    @property
    def identity(self) -> str: ...
    def sample(self, n: int, seed: int) -> Batch: ...
    def batches(self, batch: int, seed: int, start: int = 0) -> Iterator[Batch]: ...


class RowsSource:
    """Rows in memory.

    Args:
        x: `[n, d]` (or `[n, heads, head_dim]`, which is joined).
        y: `[n, d_out]`, what is to be reconstructed, if that is not `x`.
        gradient: `[n, d]`, dL/dx at the rows.
        keep_massive: train on massive rows too.

    Raises:
        ShapeError: different numbers of rows.
        NonFiniteError: a row holds NaN or infinity.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        gradient: Tensor | None = None,
        *,
        keep_massive: bool = False,
    ) -> None:
        rows = [None if t is None else t.detach().flatten(1).float() for t in (x, y, gradient)]
        for name, t in zip(("y", "gradient"), rows[1:], strict=True):
            if t is not None and len(t) != len(x):
                raise ShapeError(f"{name} has {len(t)} rows and x has {len(x)}; they must belong together")
        if not len(x):
            raise InputError("there are no rows to train on")
        for t in rows:
            if t is not None:
                check_rows(t)
        whole = Batch(*rows)  # type: ignore[arg-type]
        norm = whole.x.norm(dim=1)
        limit = MASSIVE * float(norm.median())
        self.skip_above = None if keep_massive or limit <= 0 else limit
        self._rows = whole if self.skip_above is None else whole.take(norm <= limit)

    @property
    def channels(self) -> int:
        return self._rows.x.shape[1]

    @property
    def target_channels(self) -> int:
        return self._rows.target.shape[1]

    @property
    def identity(self) -> str:
        x = self._rows.x
        digest = hashlib.sha256(x[:: max(1, len(x) // 64)].contiguous().numpy().tobytes()).hexdigest()
        return f"rows {list(x.shape)} {digest[:16]}"

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, n: int, seed: int) -> Batch:
        """Return some rows, at random."""
        return self._rows.take(_permutation(len(self), seed)[:n])

    def batches(self, batch: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield whole batches in random order, once through."""
        order = _permutation(len(self), seed)
        for i in range(start * batch, len(order) - batch + 1, batch):
            yield self._rows.take(order[i : i + batch])


class StoreSource:
    """Rows of a Store.

    Args:
        store: a harvested store.
        site: the site that is encoded; several make a crosscoder's concatenated rows.
        target: the site that is reconstructed, if another (a transcoder).
        gradient: read the gradients too that were harvested at the site.
        where: only rows of the token table for which this SQL condition holds.

    Raises:
        SiteError: the store does not hold a site.
        InputError: no row meets the condition, or no gradients were harvested.
    """

    def __init__(
        self,
        store: Store,
        site: str | list[str],
        *,
        target: str | None = None,
        gradient: bool = False,
        where: str | None = None,
    ) -> None:
        self._store, self._target, self._where = store, target, where
        self._sites = [site] if isinstance(site, str) else list(site)
        self._gradient = gradient
        self._names = [*self._sites, *([target] if target else [])]
        self.channels = sum(store.channels(s) for s in self._sites)
        self.target_channels = store.channels(target) if target else self.channels
        self.rows = len(store.select(where))
        self.skip_above: float | None = None
        self.skip_above = MASSIVE * float(self.sample(4096, 0).x.norm(dim=1).median())

    @property
    def identity(self) -> str:
        return f"store {self._store.rows} rows {' '.join(self._names)} {self._where or ''}".strip()

    def sample(self, n: int, seed: int) -> Batch:
        """Return some rows, at random."""
        found = next(self._read(min(n, self.rows), seed, 0))
        return self._usual(found)

    def batches(self, batch: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches in random order across the whole store, once through."""
        for rows in self._read(batch, seed, start):
            yield self._usual(rows)

    def _usual(self, rows: Batch) -> Batch:
        return rows if self.skip_above is None else rows.take(rows.x.norm(dim=1) <= self.skip_above)

    def _read(self, batch: int, seed: int, start: int) -> Iterator[Batch]:
        first = self._sites[0]
        for held in self._store.batches(
            batch, sites=self._names, seed=seed, start=start, where=self._where, gradient=self._gradient
        ):
            x = torch.cat([held[s] for s in self._sites], dim=1) if len(self._sites) > 1 else held[first]
            check_rows(x)
            y = held[self._target] if self._target else None
            yield Batch(x, y, held[f"{first}.gradient"] if self._gradient else None)


class LiveSource:
    """Activations read from a model while the dictionary trains, through a half-refreshed shuffle buffer.

    The buffer is filled, shuffled, half of it is trained on, and that half is read anew.

    Args:
        model: whose activations are read; installed edits apply.
        corpus: strings or documents.
        site: what is encoded; several make a crosscoder's concatenated rows.
        target: what is reconstructed, if another site.
        gradient: also collect dL/dx, L the summed next-token cross-entropy.
        buffer: rows held for shuffling.
        packing: see the module's docstring.
        context: tokens in a window.
        max_tokens: read at most so many tokens of the corpus in a pass.
    """

    def __init__(
        self,
        model: Model,
        corpus: Iterable[Any],
        site: str | list[str],
        *,
        target: str | None = None,
        gradient: bool = False,
        buffer: int = 65_536,
        packing: Packing = "document",
        context: int | None = None,
        max_tokens: int | None = None,
        batch_tokens: int = 2048,
        keep_massive: bool = False,
    ) -> None:
        if packing not in ("document", "block"):
            raise InputError(f"packing is {packing!r}; it must be 'document' or 'block'")
        self._model, self._target, self._gradient = model, target, gradient
        self._sites = [s.name for s in model.resolve([site] if isinstance(site, str) else list(site))]
        documents = list(corpus)
        self._corpus = join_blocks(model, documents, context or 256) if packing == "block" else documents
        self._buffer, self._context, self._limit, self._batch_tokens = (
            buffer,
            context,
            max_tokens,
            batch_tokens,
        )
        self._packing = packing
        self.skip_above: float | None = None
        first = self.sample(4096, 0)
        self._widths = first.x.shape[1], first.target.shape[1]
        if not keep_massive:
            self.skip_above = MASSIVE * float(first.x.norm(dim=1).median())

    @property
    def channels(self) -> int:
        return self._widths[0]

    @property
    def target_channels(self) -> int:
        return self._widths[1]

    @property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for document in self._corpus:
            text = document if isinstance(document, str) else getattr(document, "text", None)
            digest.update((str(document.ids) if text is None else text).encode())
        return f"live {self._model.name} {' '.join(self._sites)} {self._packing} {digest.hexdigest()[:16]}"

    def sample(self, n: int, seed: int) -> Batch:
        """Return the first rows of the corpus: a sample in its order."""
        found: list[Batch] = []
        for rows in self._rows():
            found.append(rows)
            if sum(map(len, found)) >= n:
                break
        whole = _join(found)
        if self.skip_above is None:
            norm = whole.x.norm(dim=1)
            whole = whole.take(norm <= MASSIVE * norm.median())
        return whole.take(slice(0, n))

    def batches(self, batch: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches of one pass over the corpus; entering late reads up to there again."""
        generator = torch.Generator().manual_seed(seed)
        held: list[Batch] = []
        count, given = 0, 0
        for rows in self._rows():
            held.append(rows)
            count += len(rows)
            if count < self._buffer:
                continue
            pool = _join(held)
            pool = pool.take(torch.randperm(len(pool), generator=generator))
            half = len(pool) // 2 // batch * batch or batch
            for i in range(0, half, batch):
                given += 1
                if given > start:
                    yield pool.take(slice(i, i + batch))
            held, count = [pool.take(slice(half, None))], len(pool) - half
        pool = _join(held)
        pool = pool.take(torch.randperm(len(pool), generator=generator))
        for i in range(0, len(pool) - batch + 1, batch):
            given += 1
            if given > start:
                yield pool.take(slice(i, i + batch))

    def read(self, most: int) -> Batch | None:
        """Return the rows of a whole pass, or `None` if there are more than `most`."""
        found: list[Batch] = []
        count = 0
        with progress("reading activations", total=self._limit, unit="tokens") as advance:
            for rows in self._rows():
                found.append(rows)
                count += len(rows)
                advance(len(rows))
                if count > most:
                    return None
        return _join(found)

    def _rows(self) -> Iterator[Batch]:
        names = [*self._sites, *([self._target] if self._target else [])]
        with torch.no_grad() if not self._gradient else torch.enable_grad():
            for trace in self._model.stream(
                self._corpus, names, batch_tokens=self._batch_tokens, context=self._context,
                max_tokens=self._limit, grad=self._gradient, stop=not self._gradient,
            ):  # fmt: skip
                assert trace.mask is not None  # a stream of text has one
                kept = trace.mask
                gradient = None
                if self._gradient:
                    gradient, kept = loss_gradient(trace, self._sites[0])
                x = torch.cat([trace[s].detach()[kept].flatten(1).float() for s in self._sites], dim=1)
                y = trace[self._target].detach()[kept].flatten(1).float() if self._target else None
                check_rows(x)
                rows = Batch(x, y, None if gradient is None else gradient[kept].flatten(1).float())
                if self.skip_above is not None:
                    rows = rows.take(x.norm(dim=1) <= self.skip_above)
                if len(rows):
                    yield rows


def loss_gradient(trace: Any, site: str) -> tuple[Tensor, Tensor]:
    """Return dL/dx at a site, L the summed next-token cross-entropy, and which tokens have a label."""
    tokens, mask = trace.tokens, trace.mask
    labelled = mask.clone()
    labelled[:, :-1] &= mask[:, 1:]
    labelled[:, -1] = False

    def loss(logits: Tensor) -> Tensor:
        given = logits[:, :-1][labelled[:, :-1]]
        return torch.nn.functional.cross_entropy(
            given.float(), tokens[:, 1:][labelled[:, :-1]], reduction="sum"
        )

    gradient: Tensor = trace.gradients(loss)[site]
    return gradient.detach(), labelled


def join_blocks(model: Model, corpus: Iterable[Any], context: int) -> list[TokenDocument]:
    """Return documents joined with the end-of-text token and cut into blocks of `context` tokens.

    Raises:
        ModelError: the model has no tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so text cannot be packed into blocks")
    ids: list[int] = []
    for document in corpus:
        if isinstance(document, TokenDocument):
            ids += [*document.ids, tokenizer.eos_token_id]
            continue
        text = document if isinstance(document, str) else document.text
        ids += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    blocks = range(0, len(ids) - context + 1, context) if len(ids) >= context else range(1)
    return [TokenDocument(f"block {i // context}", tuple(ids[i : i + context])) for i in blocks]


def check_rows(x: Tensor) -> None:
    """Raise NonFiniteError, naming the first bad row, if any value is NaN or infinite."""
    good = torch.isfinite(x).all(1)
    if not bool(good.all()):
        bad = (~good).nonzero().squeeze(1)
        raise NonFiniteError(
            f"row {int(bad[0])} of the activations holds NaN or infinity ({len(bad)} such rows)"
        )


def _permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _join(parts: list[Batch]) -> Batch:
    if not parts:
        raise InputError("the data has no rows; give a corpus or store with some")
    columns = [[getattr(p, name) for p in parts] for name in ("x", "y", "gradient")]
    return Batch(*[None if c[0] is None else torch.cat(c) for c in columns])  # type: ignore[arg-type]
