"""Traces over a corpus in constant memory: documents are cut into windows, windows into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from actlas.core.errors import InputError, ModelError
from actlas.core.sites import Site

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.trace import Trace

DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document."""

    document: str
    offset: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenDocument:
    """A document that is tokens already, e.g. a block of packed text; a corpus may hold such."""

    id: str
    ids: tuple[int, ...]


def windows(
    model: Model, corpus: Iterable[Any], context: int | None = None, max_tokens: int | None = None
) -> Iterator[Window]:
    """Yield the windows of a corpus, document by document.

    Args:
        model: whose tokenizer cuts the text.
        corpus: strings, documents with `.text` and `.id`, or `TokenDocument`s.
        context: tokens in a window; default the model's context, at most 512.
        max_tokens: stop after so many tokens.

    Raises:
        InputError: no text at all, or a window longer than the model's context.
    """
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it cannot read a corpus of text")
    limit = model.context_length
    size = context or min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if size < 1 or (limit is not None and size > limit):
        raise InputError(f"context is {context}; {model.name} takes 1 to {limit} tokens")
    seen = 0
    for i, document in enumerate(corpus):
        name = str(i) if isinstance(document, str) else str(document.id)
        if isinstance(document, TokenDocument):
            ids = list(document.ids)
        else:
            text = document if isinstance(document, str) else document.text
            ids = model.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            if max_tokens is not None:
                piece = piece[: max_tokens - seen]
            if not piece:
                return
            seen += len(piece)
            yield Window(name, start, tuple(piece))
    if not seen:
        raise InputError("the corpus has no text; give at least one document with some")


def batches(found: Iterable[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Group windows so that a padded batch has at most `batch_tokens` tokens (one window always fits)."""
    held: list[Window] = []
    width = 0
    for window in found:
        wider = max(width, len(window.ids))
        if held and wider * (len(held) + 1) > batch_tokens:
            yield held
            held, wider = [], len(window.ids)
        held.append(window)
        width = wider
    if held:
        yield held


def encode_windows(model: Model, held: Sequence[Window]) -> dict[str, Any]:
    """Return the model's arguments for some windows, padded on the right."""
    width = max(len(w.ids) for w in held)
    ids = torch.full((len(held), width), model._encoder.pad_id)
    mask = torch.zeros(len(held), width, dtype=torch.long)
    for i, window in enumerate(held):
        ids[i, : len(window.ids)] = torch.tensor(window.ids)
        mask[i, : len(window.ids)] = 1
    return model.encode({"input_ids": ids, "attention_mask": mask})


def stream_traces(
    model: Model,
    corpus: Iterable[Any],
    sites: Sequence[Site],
    *,
    batch_tokens: int,
    context: int | None,
    stop: bool,
    max_tokens: int | None,
    grad: bool,
) -> Iterator[Trace]:
    """Yield one trace per batch of windows; see `Model.stream`."""
    if batch_tokens < 1:
        raise InputError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    for batch in batches(windows(model, corpus, context, max_tokens), batch_tokens):
        encoded = encode_windows(model, batch)
        yield model._run(
            encoded,
            sites,
            grad=grad,
            stop=stop,
            documents=[w.document for w in batch],
            offsets=[w.offset for w in batch],
        )
