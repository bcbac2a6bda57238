"""The token table: what each row of a store is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from torch import Tensor

    from actlas.store.planning import ShardPlan

#: Columns of the table `tokens`, and what they hold.
COLUMNS = {
    "row": "row of the store",
    "document": "the document's id",
    "position": "position of the token in its document",
    "place": "position of the token in the window that the model saw",
    "token": "token id",
    "text": "what the token stands for; a document's texts joined are the document",
    "special": "whether it is one of the tokenizer's special tokens",
    "role": "in conversations, the role of the message that it lies in; null elsewhere",
    "massive": "whether its activations are massive at one of the store's sites",
    "split": "the document's label `split`, or null",
    "labels": "all of the document's labels, as a map",
    "shard": "number of the shard",
}

_LABELS = pa.map_(pa.string(), pa.string())
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "document": pa.string(),
        "position": pa.int32(),
        "place": pa.int32(),
        "token": pa.int32(),
        "text": pa.string(),
        "special": pa.bool_(),
        "role": pa.string(),
        "massive": pa.bool_(),
        "split": pa.string(),
        "labels": _LABELS,
        "shard": pa.int32(),
    }
)


def token_table(plan: ShardPlan, massive: Tensor) -> pa.Table:
    """Return the table of a shard's rows.

    Args:
        plan: its windows.
        massive: bool `[rows]`.
    """
    lengths = np.array([len(cut) for cut in plan.cuts])
    starts = np.repeat(np.array([cut.start for cut in plan.cuts]), lengths)
    place = np.arange(plan.rows) - np.repeat(np.cumsum(lengths) - lengths, lengths)

    def per_token(name: str) -> list[object]:
        return [v for cut in plan.cuts for v in getattr(cut.text, name)[cut.start : cut.stop]]

    def per_window(values: list[object], kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind).take(pa.array(np.repeat(np.arange(len(values)), lengths)))

    texts = [cut.text for cut in plan.cuts]
    columns = {
        "row": pa.array(np.arange(plan.first, plan.first + plan.rows, dtype=np.int64)),
        "document": per_window([plain_text(t.id) for t in texts], pa.string()),
        "position": pa.array((starts + place).astype(np.int32)),
        "place": pa.array(place.astype(np.int32)),
        "token": pa.array(np.array(per_token("ids"), dtype=np.int32)),
        "text": pa.array([plain_text(str(piece)) for piece in per_token("pieces")], pa.string()),
        "special": pa.array(per_token("special"), pa.bool_()),
        "role": pa.array(per_token("roles"), pa.string()),
        "massive": pa.array(massive.numpy()),
        "split": per_window([t.labels.get("split") for t in texts], pa.string()),
        "labels": per_window(
            [[(plain_text(k), plain_text(str(v))) for k, v in t.labels.items()] for t in texts], _LABELS
        ),
        "shard": pa.array(np.full(plan.rows, plan.index, dtype=np.int32)),
    }
    return pa.table(columns, schema=SCHEMA)


def plain_text(value: str) -> str:
    """Return text as UTF-8 can hold it: half of a surrogate pair becomes replacement characters."""
    return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
