"""Harvest: activations of a corpus to disk, at the speed of the forward pass.

    store = harvest(model, corpus("prose"), "blocks.15.resid_post", "acts", rows=1_000_000)

The corpus is cut into shards before anything runs (`actlas.store.planning`), and each shard is made by
itself and appears at once (`actlas.store.making`). A harvest that was killed therefore goes on with the
first shard that is not there, several workers can share the shards, and a damaged shard can be made
again: the rows come out the same each time.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from actlas.core.artifact import FORMAT, MANIFEST, atomic_write, load_artifact
from actlas.core.calibration.reading import Batch, check_row_sites, read_batch
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.core.progress import progress as progress_bar
from actlas.core.sites import Site
from actlas.core.streaming import Window, encode_windows
from actlas.models.cache import locked
from actlas.store.gradients import check_predicts
from actlas.store.identity import check_record, check_settings, other_settings, recipe_of, weights_digest
from actlas.store.layout import SHARDS, check_dtype, tensors_of
from actlas.store.making import make_shard
from actlas.store.planning import ShardPlan, plan_shards, window_size
from actlas.store.store import Store

_SHARD_BYTES, _SHARD_ROWS = 64 * 2**20, (1024, 16384)
_LOCK = f".{SHARDS}.lock"
_OURS = (_LOCK, f".{MANIFEST}.")  # what is in the folder of a harvest that was killed at its very start


def harvest(
    model: Model,
    corpus: Iterable[Any],
    sites: str | Site | Iterable[str | Site],
    out: str | Path,
    *,
    rows: int | None = None,
    dtype: str = "float16",
    context: int | None = None,
    batch_tokens: int = 2048,
    shard_rows: int | None = None,
    keep_massive: bool = False,
    gradient: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> Store:
    """Store the activations of every token of a corpus at some sites.

    Run it again after it was killed, and it goes on; the rows are those of an uninterrupted run. The
    same call on a complete store changes nothing.

    Args:
        model: the model; edits that are installed on it apply, and are recorded.
        corpus: strings, documents with `.text` and `.id`, or conversations (lists of messages, or
            documents with `.messages`), which go through the chat template. It is read in order, and
            must be the same when a harvest is continued.
        sites: names or patterns of sites with one row of channels a token; heads are flattened.
        out: the folder: new, empty, or a store that this call goes on with.
        rows: stop after so many tokens; default: the whole corpus.
        dtype: `"float16"`, `"bfloat16"`, `"float32"`, or `"int8"`: half the size of float16, each row
            with a scale of its own, an error of at most 1/254 of the row's largest magnitude.
        context: tokens a document is cut into; default: the model's context, at most 512.
        batch_tokens: tokens in a forward pass at most, padding included.
        shard_rows: rows of a shard, i.e. how much work a kill can cost; default: 64 MB of them, between
            1,024 and 16,384.
        keep_massive: hand out rows of massive activations with the others. They are always stored and
            marked; by default `Store.batches` passes over them.
        gradient: store the gradient of the summed next-token cross-entropy at each row too, in float32.
            The forward pass then runs to the end, and back.
        workers: with more than one, the shards are shared among so many Ray workers (`actlas[ray]`),
            which all must see `out`.
        progress: show progress on standard error when it takes long.

    Raises:
        SiteError: a site that does not exist or has no row of channels for each token.
        InputError: an empty corpus, a bad option, or a folder that holds something else.
        FingerprintError: the folder is a store of another model.
        NonFiniteError: NaN or infinity at a site, with document and position.
        FailureError: it could not be written.
    """
    resolved = check_row_sites(model.resolve(sites))
    window = window_size(model, context)
    if gradient:
        check_predicts(model)
    check_dtype(dtype)
    _check_positive(rows=rows, batch_tokens=batch_tokens, workers=workers, shard_rows=shard_rows)
    folder = Path(out)
    _check_folder(folder)
    settings: dict[str, Any] = {
        "sites": [site.name for site in resolved],
        "dtype": dtype,
        "gradient": gradient,
        "context": window,
        "batch_tokens": batch_tokens,
        "rows": rows,
        "under": [edit.describe() for edit in model.installed],
        "weights": weights_digest(model),
    }
    with locked(folder / SHARDS, str(folder)) as alone:
        if alone:
            remove_leftovers(folder)
        begun = (folder / MANIFEST).exists()
        if begun:
            manifest = _continue(folder, model, settings, shard_rows)
        else:
            manifest = _begin(model, corpus, resolved, settings, shard_rows)
        planned = plan_shards(model, corpus, context=window, rows=rows, shard_rows=manifest["shard_rows"])
        plans = itertools.chain([next(planned)], planned)  # an empty corpus fails before anything is written
        if not begun:
            _write_manifest(folder, {**manifest, "keep_massive": keep_massive, "complete": False})
        total = _run(model, folder, manifest, plans, workers, progress)
        if alone:
            remove_leftovers(folder)
        _write_manifest(folder, {**manifest, "keep_massive": keep_massive, "complete": True, "total": total})
    return Store(folder)


def _run(
    model: Model,
    folder: Path,
    manifest: dict[str, Any],
    plans: Iterator[ShardPlan],
    workers: int,
    progress: bool,
) -> int:
    """Make the shards that are missing; return the rows of all."""
    recipe = recipe_of(manifest)
    total = 0

    def missing() -> Iterator[ShardPlan]:
        nonlocal total
        for plan in plans:
            total += plan.rows
            if check_record(folder, plan):
                advance(plan.rows, "already there")
            else:
                yield plan

    expected = manifest["rows"]
    with _progress_line(progress, expected) as advance:
        if workers > 1:
            from actlas.store.parallel import make_shards

            make_shards(model, missing(), recipe, folder, workers, advance)
        else:
            for plan in missing():
                make_shard(model, plan, recipe, folder, advance)
    return total


def _begin(
    model: Model,
    corpus: Iterable[Any],
    sites: Sequence[Site],
    settings: dict[str, Any],
    shard_rows: int | None,
) -> dict[str, Any]:
    channels = {site.name: _channels(model, site) for site in sites}
    tensors = tensors_of(channels, settings["dtype"], settings["gradient"])
    size = sum(dtype.itemsize * columns for dtype, columns in tensors.values())
    least, most = _SHARD_ROWS
    return {
        "kind": "store",
        "format": FORMAT,
        "files": {},
        "model": model.name,
        "fingerprint": model.fingerprint.to_json(),
        **settings,
        "channels": channels,
        "shard_rows": shard_rows or min(max(_SHARD_BYTES // size, least), most),
        "corpus": {
            "name": str(getattr(corpus, "name", "text")),
            "source": str(getattr(corpus, "source", "")),
            "hash": getattr(corpus, "hash", None),
        },
    }


def _channels(model: Model, site: Site) -> int:
    """Return how many channels a site has; where the layout does not say, by running one token."""
    if site.features is not None:
        return math.prod(site.features)
    found: list[int] = []

    def take(site: Site, x: Tensor) -> None:
        found.append(math.prod(x.shape[2:]) if x.ndim > 2 else x.shape[-1])

    read_batch(model, Batch(encode_windows(model, [Window("", 0, (0,))]), [""], [0]), [site], take)
    return found[0]


def _continue(folder: Path, model: Model, settings: dict[str, Any], shard_rows: int | None) -> dict[str, Any]:
    manifest, _ = load_artifact(folder, "store")
    check_settings(folder, manifest, model, settings)
    if shard_rows is not None and shard_rows != manifest["shard_rows"]:
        raise InputError(other_settings(folder, "shard_rows", manifest["shard_rows"], shard_rows))
    return manifest


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


def _check_folder(folder: Path) -> None:
    """Refuse a file, and a folder with somebody else's files."""
    if not folder.exists() or (folder / MANIFEST).exists():
        return
    if not folder.is_dir() or any(not p.name.startswith(_OURS) for p in folder.iterdir()):
        raise InputError(f"{folder} exists and is not a store; give another name or remove it")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing."""
    for place in (folder, folder / SHARDS):
        for path in place.glob(".*"):
            if path.is_file() and path.name != _LOCK:
                path.unlink(missing_ok=True)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


@contextmanager
def _progress_line(wanted: bool, total: int | None) -> Iterator[Any]:
    if wanted:
        with progress_bar("harvest", total, "rows") as advance:
            yield advance
    else:
        yield lambda *_: None
