"""A small model, texts and the harvest that most tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actlas.core.model import Model
from actlas.store import Store, harvest
from tests.core.tiny import TEXTS, tiny

SITE, OTHER = "blocks.1.resid_post", "blocks.0.attn.z"
CONTEXT = 32
CORPUS = [f"{i} {text}" for i in range(2) for text in TEXTS]


def small(out: Path, model: Model | None = None, corpus: Any = None, **options: Any) -> Store:
    """Harvest the small corpus into shards of at most 100 rows."""
    given = {"sites": [SITE, OTHER], "context": CONTEXT, "batch_tokens": 64, "shard_rows": 100, **options}
    return harvest(model or tiny(), CORPUS if corpus is None else corpus, out=out, progress=False, **given)


def expected(model: Model, texts: list[str], site: str, context: int = CONTEXT) -> Tensor:
    """Return the rows of a site by brute force: each window of each text in a pass of its own."""
    rows = []
    for text in texts:
        ids = model.tokenizer(text)["input_ids"]
        for start in range(0, len(ids), context):
            rows.append(model.trace(torch.tensor([ids[start : start + context]]), site).rows(site).flatten(1))
    return torch.cat(rows)


def files_of(store: Path) -> dict[str, bytes]:
    """Return the content of every file of a store but its lock."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != ".shards.lock"
    }
