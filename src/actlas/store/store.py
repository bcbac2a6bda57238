"""A Store: activations on disk, read as shuffled batches, by row number, or by SQL over their tokens.

    store = Store("acts")
    for batch in store.batches(2048, seed=0):
        batch["blocks.15.resid_post"]                    # [2048, d], float32
    store.query("SELECT text, count(*) AS n FROM tokens GROUP BY text ORDER BY n DESC LIMIT 5")
    store.read("blocks.15.resid_post", [0, 1, 2])

What a Store sees is what was there when it was opened: shards that a harvest adds later are seen by
opening it again. Files are mapped, not read: memory does not grow with the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.artifact import load_artifact
from actlas.core.errors import ArtifactError, InputError, SiteError, did_you_mean
from actlas.core.fingerprint import Fingerprint
from actlas.core.lens import Lens
from actlas.store.layout import (
    GRADIENT,
    HOW_TO_MEND,
    SHARDS,
    Piece,
    ShardRecord,
    damaged,
    fault_of,
    file_names,
    read_header,
    tensors_of,
)
from actlas.store.mapping import Files
from actlas.store.table import TokenTable

if TYPE_CHECKING:
    import pyarrow as pa

    from actlas.core.model import Model
    from actlas.store.contexts import Context

Rows = Sequence[int] | Tensor | range | slice


class Store:
    """A snapshot of a store.

    Args:
        path: its folder.
        model: checked against the model that the store was harvested from, if given.

    Raises:
        ArtifactError: not a store, or one whose shards are not what they should be.
        FingerprintError: a store of another model.
    """

    def __init__(self, path: str | Path, model: Model | None = None) -> None:
        self.path = Path(path)
        manifest, _ = load_artifact(self.path, "store")
        self.fingerprint = Fingerprint.from_json(manifest.get("fingerprint"), self.path)
        if model is not None:
            self.fingerprint.check(model.fingerprint, str(self.path))
        try:
            self._channels = {str(k): int(v) for k, v in manifest["channels"].items()}
            self.dtype: str = manifest["dtype"]
            self.gradient = bool(manifest["gradient"])
            self._tensors = tensors_of(self._channels, self.dtype, self.gradient)
            self.complete = bool(manifest["complete"])
            self.keep_massive = bool(manifest["keep_massive"])
            total = manifest.get("total")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{self.path} is a store with an unreadable manifest ({error})") from error
        self.model_name = str(manifest.get("model", ""))
        self.context_length = manifest.get("context")
        self.corpus = dict(manifest.get("corpus") or {})
        self.under = tuple(manifest.get("under") or ())
        self._records = _records(self.path)
        self.rows = sum(r.rows for r in self._records)
        self._mapped: Files | None = None
        self.table = TokenTable(
            self.path, [self.path / SHARDS / file_names(r.index)[1] for r in self._records]
        )
        if self.complete and self.rows != total:
            lost = len(self._records)
            raise ArtifactError(f"{damaged(self.path, lost)}: its record is missing; {HOW_TO_MEND}")

    # -- what is in it ----------------------------------------------------------------------------

    @property
    def sites(self) -> list[str]:
        """The sites whose activations it holds."""
        return list(self._channels)

    def channels(self, site: str) -> int:
        """Return how many channels a site has.

        Raises:
            SiteError: the store does not hold it.
        """
        return self._channels[self._site(site)]

    @property
    def shards(self) -> list[str]:
        """The names of the shards."""
        return [record.name for record in self._records]

    @property
    def massive(self) -> int:
        """How many rows are massive activations at some site."""
        return sum(record.massive for record in self._records)

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} ({d})" for name, d in self._channels.items())
        state = "" if self.complete else ", not complete"
        return f"<Store {self.path}: {self.rows:,} rows of {self.model_name}, {sites}, {self.dtype}{state}>"

    # -- activations ------------------------------------------------------------------------------

    def read(self, site: str, rows: Rows | int, *, gradient: bool = False) -> Tensor:
        """Return rows of a site, float32 `[n, d]`, in the order asked for.

        Args:
            site: which site.
            rows: row numbers, or a slice.
            gradient: the gradients at these rows instead of the activations.

        Raises:
            SiteError: the store does not hold the site.
            InputError: a row that is not there, or gradients that were not harvested.
            ArtifactError: a damaged shard, by name.
        """
        name = self._site(site)
        if gradient and not self.gradient:
            raise InputError(f"{self.path} holds no gradients; harvest with gradient=True")
        return self._files[name + GRADIENT if gradient else name].gather(self._row_numbers(rows))

    def batches(
        self,
        batch: int,
        *,
        sites: str | Iterable[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        start: int = 0,
        where: str | None = None,
        gradient: bool = False,
        keep_massive: bool | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield every row once, in batches.

        Args:
            batch: rows in a batch; the last one may be smaller.
            sites: which sites; default: all.
            shuffle: in an order drawn over the whole store; otherwise in row order.
            seed: of that order (at least 0).
            start: how many batches to leave out at the beginning, to go on where one stopped.
            where: only rows for which this SQL condition on the table `tokens` holds, e.g.
                `"NOT special AND split = 'fit'"`.
            gradient: give `<site>.gradient` too.
            keep_massive: with the rows of massive activations; default: as it was harvested, normally
                without.

        Yields:
            By site float32 `[n, d]`, and `"row"`, the row numbers, int64 `[n]`.

        Raises:
            InputError: a batch below 1, a condition that is not SQL or that no row meets.
        """
        if batch < 1 or start < 0 or seed < 0:
            given = f"{batch}, {start} and {seed}"
            raise InputError(f"batch must be at least 1, start at least 0 and seed at least 0, not {given}")
        names = self.sites if sites is None else [sites] if isinstance(sites, str) else list(sites)
        wanted = {name: self._site(name) for name in names}
        if gradient:
            if not self.gradient:
                raise InputError(f"{self.path} holds no gradients; harvest with gradient=True")
            wanted |= {name + GRADIENT: found + GRADIENT for name, found in list(wanted.items())}
        rows = self.select(where, keep_massive=keep_massive)
        if shuffle:
            # In NumPy: waking PyTorch's threads for this would cost more than the work.
            rows = torch.from_numpy(np.random.default_rng(seed).permutation(rows.numpy()))
        return self._batches(rows, batch, start, wanted)

    def _batches(
        self, rows: Tensor, batch: int, start: int, wanted: dict[str, str]
    ) -> Iterator[dict[str, Tensor]]:
        rows = rows[start * batch :]
        if not len(rows):
            return
        parts = [self._files[tensor].batches(rows, batch) for tensor in wanted.values()]
        for numbers, *values in zip(rows.split(batch), *parts, strict=True):
            yield {**dict(zip(wanted, values, strict=True)), "row": numbers}

    def select(self, where: str | None = None, *, keep_massive: bool | None = None) -> Tensor:
        """Return the numbers of the rows that `batches` would give, in row order, int64 `[n]`."""
        keep = self.keep_massive if keep_massive is None else keep_massive
        if where is None and (keep or not self.massive):
            return torch.from_numpy(np.arange(self.rows))
        condition = "TRUE" if where is None else f"({where}\n)"
        if not keep:
            condition += " AND NOT massive"
        table = self.table.ask(f"SELECT row FROM tokens WHERE {condition} ORDER BY row")
        rows = torch.from_numpy(table["row"].to_numpy().copy())
        if not len(rows):
            raise InputError(f"no row of {self.path} meets the condition {where or 'NOT massive'!r}")
        return rows

    # -- tokens -----------------------------------------------------------------------------------

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Ask the token table, in SQL (DuckDB), and return the answer as one dictionary a row.

        The table is `tokens`; `actlas.store.tokens.COLUMNS` says what its columns hold.

        Raises:
            InputError: SQL that DuckDB does not take, with what it says.
        """
        found: list[dict[str, Any]] = self.table.ask(sql).to_pylist()
        return found

    @property
    def tokens(self) -> pa.Table:
        """The whole token table, in memory."""
        return self.table.whole

    @property
    def documents(self) -> list[str]:
        """The documents, in order."""
        return self.table.documents()

    def text(self, document: str) -> str:
        """Return the text of a document, as far as it was harvested.

        Raises:
            InputError: there is no such document.
        """
        return self.table.text(document)

    def context(self, row: int, before: int = 16, after: int = 16) -> Context:
        """Return a row's token with the text around it."""
        from actlas.store.contexts import context_of

        return context_of(self, int(self._row_numbers(row)[0]), before, after)

    def top(
        self,
        lens: Lens,
        feature: int,
        n: int = 20,
        *,
        context: int = 16,
        where: str | None = None,
        keep_massive: bool | None = None,
    ) -> list[Context]:
        """Return where a feature of a lens is largest, with the text around; see `tops`."""
        found = self.tops(lens, [feature], n, context=context, where=where, keep_massive=keep_massive)
        return found[feature]

    def tops(
        self,
        lens: Lens,
        features: Iterable[int],
        n: int = 20,
        *,
        context: int = 16,
        where: str | None = None,
        keep_massive: bool | None = None,
    ) -> dict[int, list[Context]]:
        """Return for each feature of a lens the tokens at which it is largest, in one pass.

        No two contexts of a feature overlap: of tokens so near each other the largest stands for all.

        Args:
            lens: a lens with codes for one of the store's sites.
            features: which features.
            n: how many contexts a feature; fewer where it is positive at fewer places.
            context: tokens before and after.
            where: only rows for which this SQL condition holds.
            keep_massive: as in `batches`.

        Raises:
            SiteError, ShapeError, FingerprintError: a lens for another site, width or model.
            InputError: there is no such feature.
        """
        from actlas.store.contexts import top_contexts

        rows = self.select(where, keep_massive=keep_massive)
        return top_contexts(self, lens, list(features), n, context, rows)

    # -- care -------------------------------------------------------------------------------------

    def check(self, model: Model) -> None:
        """Raise FingerprintError unless the store was harvested from such a model."""
        self.fingerprint.check(model.fingerprint, str(self.path))

    def verify(self) -> dict[str, str]:
        """Compare every shard with its checksums; return what is wrong, by the shard's name."""
        found = {r.name: fault_of(self.path, r.index, thorough=True) for r in self._records}
        return {name: fault for name, fault in found.items() if fault is not None}

    def remake(self, shard: str | int, model: Model, corpus: Iterable[Any]) -> None:
        """Make one shard again from the corpus that the store was harvested from.

        Raises:
            InputError: there is no such shard, or the corpus is another.
            FingerprintError: the model is another.
        """
        from actlas.store.repairing import remake_shards

        index = int(shard)
        remake_shards(self.path, [index], model, corpus)
        self._mapped = None

    # -- inside -----------------------------------------------------------------------------------

    def _site(self, name: str) -> str:
        if name not in self._channels:
            near = did_you_mean(name, self._channels) or f" (it has {', '.join(self._channels)})"
            raise SiteError(f"{self.path} holds no activations of {name!r}{near}")
        return name

    def _row_numbers(self, rows: Rows | int) -> Tensor:
        if isinstance(rows, int):
            rows = [rows]
        if isinstance(rows, slice):
            return torch.arange(*rows.indices(self.rows))
        if isinstance(rows, range):
            rows = list(rows)
        numbers = torch.as_tensor(rows).to(torch.int64)
        if numbers.ndim != 1:
            raise InputError(f"rows must be a list of row numbers, not a tensor {list(numbers.shape)}")
        wrong = numbers[(numbers < 0) | (numbers >= self.rows)]
        if len(wrong):
            raise InputError(f"{self.path} has no row {int(wrong[0])}; it has 0 to {self.rows - 1}")
        return numbers

    @property
    def _files(self) -> Files:
        """The shards, mapped when they are first needed; they stay mapped."""
        if not self._records:
            raise InputError(f"{self.path} holds no rows yet; its harvest has not finished a shard")
        if self._mapped is None:
            paths = [self.path / SHARDS / file_names(r.index)[0] for r in self._records]
            pieces = [self._pieces(r, path) for r, path in zip(self._records, paths, strict=True)]
            self._mapped = Files(paths, pieces, torch.tensor([r.first for r in self._records]))
        return self._mapped

    def _pieces(self, record: ShardRecord, path: Path) -> dict[str, Piece]:
        """Return where a shard's tensors lie, after checking that they are what they must be."""
        fault = fault_of(self.path, record.index)
        found: dict[str, Piece] = {}
        if fault is None:
            try:
                found = read_header(path)
            except ArtifactError as error:
                fault = str(error)
        for name, (dtype, columns) in self._tensors.items():
            piece = found.get(name)
            shape = None if piece is None else (piece.dtype, piece.rows, piece.columns)
            if fault is None and shape != (dtype, record.rows, columns):
                fault = f"{name} is not {str(dtype).removeprefix('torch.')} [{record.rows}, {columns}]"
        if fault is not None:
            raise ArtifactError(f"{damaged(self.path, record.index)}: {fault}; {HOW_TO_MEND}")
        return found


def _records(folder: Path) -> list[ShardRecord]:
    """Return the records of the shards that are there, from the first to before the first gap."""
    found: list[ShardRecord] = []
    first = 0
    while record := ShardRecord.read(folder, len(found)):
        if record.first != first:
            raise ArtifactError(
                f"{damaged(folder, record.index)}: it begins at row {record.first} instead of {first}; "
                f"{HOW_TO_MEND}"
            )
        first += record.rows
        found.append(record)
    return found
