"""Finding damaged shards and making them again, each by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from actlas.core.artifact import load_artifact
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.models.cache import locked
from actlas.store.identity import check_record, check_settings, recipe_of, weights_digest
from actlas.store.layout import SHARDS, fault_of, shard_name
from actlas.store.making import make_shard
from actlas.store.planning import plan_shards


def remake_shards(path: str | Path, shards: Sequence[int], model: Model, corpus: Iterable[Any]) -> None:
    """Make some shards of a store again, from the corpus that it was harvested from.

    Raises:
        InputError: there is no such shard, or the corpus is another.
        FingerprintError: the model is another.
    """
    folder = Path(path)
    manifest, _ = load_artifact(folder, "store")
    settings = {
        **{k: manifest[k] for k in ("sites", "dtype", "gradient", "context", "batch_tokens", "rows")},
        "under": [edit.describe() for edit in model.installed],
        "weights": weights_digest(model),
    }
    check_settings(folder, manifest, model, settings)
    wanted = set(shards)
    with locked(folder / SHARDS, str(folder)):
        cut = {name: manifest[name] for name in ("context", "rows", "shard_rows")}
        for plan in plan_shards(model, corpus, **cut):
            if not wanted:
                break
            check_record(folder, plan, lenient=plan.index in wanted)
            if plan.index in wanted:
                make_shard(model, plan, recipe_of(manifest), folder)
                wanted.discard(plan.index)
    if wanted:
        raise InputError(f"{folder} has no shard {shard_name(min(wanted))} with this corpus")


def repair(path: str | Path, model: Model, corpus: Iterable[Any]) -> list[str]:
    """Check every shard of a store against its checksums and make the damaged ones again.

    Returns:
        The names of the shards that were made again.
    """
    folder = Path(path)
    load_artifact(folder, "store")
    found = [index for index in range(_shards_of(folder)) if fault_of(folder, index, thorough=True)]
    if found:
        remake_shards(folder, found, model, corpus)
    return [shard_name(index) for index in found]


def _shards_of(folder: Path) -> int:
    """How many shards a store has or had: one more than the last of which any file is there."""
    names = [p.name.split(".")[0] for p in (folder / SHARDS).glob("[0-9]*.*")]
    return max((int(name) + 1 for name in names if name.isdigit()), default=0)
