"""Making one shard: forward passes over its windows, rows written where they belong as they come.

Windows of like length run together, so that little is padding, and each writes its rows at its own
place in the file. Nothing of the shard is held in memory but one batch of activations, and the columns
of its token table.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from actlas.core.artifact import _plain_errors, atomic_write
from actlas.core.calibration.collect import _check_finite
from actlas.core.calibration.massive import massive_rows
from actlas.core.calibration.origin import Origin
from actlas.core.calibration.reading import Batch, read_batch, rows_of
from actlas.core.errors import ShapeError, SiteError
from actlas.core.layout import RESIDUAL_KINDS
from actlas.core.model import Model
from actlas.core.sites import Site
from actlas.core.streaming import batches, encode_windows
from actlas.models.cache import _sync, sha256_of
from actlas.store.gradients import batch_limit, next_token_gradients
from actlas.store.layout import (
    GRADIENT,
    SCALE,
    SHARDS,
    ShardRecord,
    check_dtype,
    file_names,
    plan_file,
    quantize_rows,
    tensors_of,
)
from actlas.store.planning import Cut, ShardPlan
from actlas.store.tokens import token_table

TEMPORARY = ".part"


@dataclass(frozen=True)
class Recipe:
    """How the rows of a store are made; the same for all of its shards.

    Attributes:
        channels: channels of each site, by name.
        dtype: how activations are stored.
        gradient: whether gradients are stored too.
        batch_tokens: tokens in a forward pass at most, padding included.
    """

    channels: dict[str, int]
    dtype: str
    gradient: bool
    batch_tokens: int


def make_shard(
    model: Model,
    plan: ShardPlan,
    recipe: Recipe,
    folder: Path,
    advance: Callable[[int], object] = lambda _: None,
) -> ShardRecord:
    """Make a shard and put it in its place; whatever was there is replaced.

    Args:
        model: the model, with the edits that belong to the store installed.
        plan: which windows.
        recipe: which sites and how.
        folder: the store.
        advance: called with the number of rows after each batch.

    Returns:
        The shard's record, which is written last.

    Raises:
        NonFiniteError: NaN or infinity, with document and position.
        FailureError: it could not be written.
    """
    shards = folder / SHARDS
    names = file_names(plan.index)
    parts: dict[str, Path] = {}
    with _plain_errors(shards, "write"):
        shards.mkdir(parents=True, exist_ok=True)
        try:
            for name in names:
                handle, path = tempfile.mkstemp(prefix=f".{name}.", suffix=TEMPORARY, dir=shards)
                os.close(handle)
                os.chmod(path, 0o644)
                parts[name] = Path(path)
            with parts[names[0]].open("wb", buffering=0) as file:
                massive = _write_rows(model, plan, recipe, file, advance)
            import pyarrow.parquet as pq

            pq.write_table(token_table(plan, massive), parts[names[1]], compression="zstd")
            files = {}
            for name, part in parts.items():
                _sync(part)
                files[name] = {"bytes": part.stat().st_size, "sha256": sha256_of(part)}
            for name, part in parts.items():
                os.replace(part, shards / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        _sync(shards)
    record = ShardRecord(plan.index, plan.first, plan.rows, plan.digest, int(massive.sum()), files)
    atomic_write(shards / f"{record.name}.json", record.to_text())
    return record


def _write_rows(
    model: Model, plan: ShardPlan, recipe: Recipe, file: IO[bytes], advance: Callable[[int], object]
) -> Tensor:
    """Run the shard's windows and write the file; return which rows are massive, bool `[rows]`."""
    writer = _Writer(plan, recipe, file)
    sites = model.resolve(list(recipe.channels))
    limit = recipe.batch_tokens
    if recipe.gradient:
        limit = min(limit, batch_limit(model))
    places = {id(cut): place for cut, place in zip(plan.cuts, _places(plan.cuts), strict=True)}
    # Stable: windows of equal length stay in order, so that a shard is always cut into the same batches.
    by_length = sorted(plan.cuts, key=lambda cut: -len(cut))
    at = 0
    for held in batches((cut.window for cut in by_length), limit):
        cuts = by_length[at : at + len(held)]
        at += len(held)
        batch = Batch(encode_windows(model, held), [w.document for w in held], [w.offset for w in held])
        tokens = batch.origin(0)
        assert tokens is not None
        starts = torch.tensor([places[id(cut)] for cut in cuts])

        def take(site: Site, x: Tensor, kind: str = "") -> None:
            for rows, origin in rows_of(x, site, batch, tokens, 0):  # noqa: B023
                if int(origin.token[0]) < 0:
                    raise SiteError(f"{site.name} has no row for each token; a store cannot hold it")
                writer.take(site, rows, origin, starts[origin.document] + origin.place, kind)  # noqa: B023

        if recipe.gradient:
            for site, x, gradient in next_token_gradients(model, batch, sites):
                take(site, x)
                take(site, gradient, GRADIENT)
        else:
            read_batch(model, batch, sites, take)
        advance(sum(len(cut) for cut in cuts))
    writer.check_full()
    return writer.massive


def _places(cuts: Sequence[Cut]) -> list[int]:
    places, at = [], 0
    for cut in cuts:
        places.append(at)
        at += len(cut)
    return places


class _Writer:
    """Writes rows into their places in a safetensors file whose header says where these are."""

    def __init__(self, plan: ShardPlan, recipe: Recipe, file: IO[bytes]) -> None:
        self._file, self._recipe = file, recipe
        self._stored = check_dtype(recipe.dtype)
        tensors = tensors_of(recipe.channels, recipe.dtype, recipe.gradient)
        header, self._pieces = plan_file(tensors, plan.rows)
        self._left = dict.fromkeys(self._pieces, plan.rows)
        self.massive = torch.zeros(plan.rows, dtype=torch.bool)
        file.write(header)
        file.truncate(max(piece.end for piece in self._pieces.values()))

    def take(self, site: Site, rows: Tensor, origin: Origin, places: Tensor, kind: str) -> None:
        """Check some rows of a site, convert them and write them.

        Args:
            site: the site.
            rows: `[n, d]`.
            origin: where they come from, for errors.
            places: int64 `[n]`, which rows of the shard they are.
            kind: `""` for activations, `GRADIENT` for gradients.
        """
        d = self._recipe.channels[site.name]
        if rows.shape[1] != d:
            raise SiteError(f"{site.name} has {rows.shape[1]} channels here and {d} elsewhere in the store")
        _check_finite(f"the gradient at {site.name}" if kind else site.name, rows, origin)
        if kind:
            self._write(site.name + GRADIENT, rows.to(torch.float32), places)
            return
        if site.kind in RESIDUAL_KINDS:
            self.massive[places] |= massive_rows(rows).cpu()
        if self._stored == torch.int8:
            codes, scale = quantize_rows(rows)
            self._write(site.name, codes, places)
            self._write(site.name + SCALE, scale, places)
            return
        converted = rows.to(self._stored)
        if self._stored == torch.float16:
            _check_range(site, rows, converted, origin)
        self._write(site.name, converted, places)

    def check_full(self) -> None:
        """Raise if some rows were not written."""
        for name, left in self._left.items():
            if left:
                raise SiteError(f"{name} gave {left:,} rows too few for its tokens; a store cannot hold it")

    def _write(self, name: str, rows: Tensor, places: Tensor) -> None:
        piece = self._pieces[name]
        data = rows.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        breaks = (places.diff() != 1).nonzero().squeeze(1) + 1
        edges = [0, *breaks.tolist(), len(places)]
        for start, stop in itertools.pairwise(edges):  # runs of rows that lie together
            self._file.seek(piece.offset + int(places[start]) * piece.row_bytes)
            part = data[start * piece.row_bytes : stop * piece.row_bytes]
            while part:
                part = part[self._file.write(part) :]
        self._left[name] -= len(places)


def _check_range(site: Site, rows: Tensor, converted: Tensor, origin: Origin) -> None:
    """Raise if a finite value became infinite as float16."""
    beyond = rows.abs().amax(1) > torch.finfo(torch.float16).max
    if bool(beyond.any()):
        i = int(beyond.nonzero()[0])
        raise ShapeError(
            f"{site.name} holds {float(rows[i].abs().max()):,.0f} in document "
            f"{origin.names[int(origin.document[i])]!r} at position {int(origin.position[i])}, and float16 "
            "ends at 65,504; use dtype='bfloat16', 'float32' or 'int8'"
        )
