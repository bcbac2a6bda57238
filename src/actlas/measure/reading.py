"""Small helpers of the measures that stream a corpus: excerpts, and which document a row is from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.trace import Trace

_CHARACTERS_PER_TOKEN = 3  # short of the usual four, so that an excerpt seldom has more tokens than asked


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document."""

    id: str
    text: str


def read(
    model: Model,
    corpus: Iterable[Any],
    sites: Any,
    *,
    tokens: int | None,
    context: int,
    per_document: int | None = None,
    batch_tokens: int = 512,
    stop: bool = True,
) -> Iterator[Trace]:
    """Stream traces of the beginnings of documents.

    A fixed budget of tokens then comes from many documents, which is what an interval over documents
    needs.

    Args:
        model, corpus, sites, batch_tokens, stop: as of `model.stream`.
        tokens: read about so many in all; `None`: the whole corpus.
        context: window length; cut to what the model takes.
        per_document: about how many tokens of each document; `None`: all of it.
    """
    context = min(context, model.context_length or context)
    return model.stream(
        excerpts(corpus, per_document),
        sites,
        batch_tokens=batch_tokens,
        context=context,
        max_tokens=tokens,
        stop=stop,
    )


def excerpts(corpus: Iterable[Any], tokens: int | None) -> Iterator[Excerpt]:
    """Yield the beginning of each document, about `tokens` tokens of it (`None`: all of it)."""
    for i, document in enumerate(corpus):
        text = document if isinstance(document, str) else document.text
        name = str(i) if isinstance(document, str) else str(document.id)
        yield Excerpt(name, text if tokens is None else text[: _CHARACTERS_PER_TOKEN * tokens])


def token_rows(trace: Trace) -> tuple[list[str], NDArray[np.int64]]:
    """Return the documents of a streamed trace, and for each row of `trace.rows` the index of its own."""
    assert trace.mask is not None
    names = list(dict.fromkeys(trace.documents))
    row = torch.arange(trace.mask.shape[0]).unsqueeze(1).expand(trace.mask.shape)[trace.mask.cpu()]
    index = np.array([names.index(d) for d in trace.documents])
    return names, index[row.numpy()]
