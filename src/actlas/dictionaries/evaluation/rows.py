"""The rows that an evaluation reads: activations of one site, with document, token and position.

A fixed budget of tokens is taken from the beginnings of many documents, because documents are the
independent items behind every interval. Rows of massive activations are left out: no dictionary is
fitted on them, and one of them outweighs thousands of others in every mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries.labelled_rows import Rows, labelled_rows
from actlas.measure.reading import excerpts

if TYPE_CHECKING:
    from actlas.core.model import Model

CONTEXT = 256
_TIMES = 10.0  # a norm above so many times the median is massive, for dictionaries that set no bound


@dataclass(frozen=True)
class Sample:
    """Rows without massive ones.

    Attributes:
        x: float32 `[n, d]`.
        document: which document each row is from, `[n]`, 0, 1, ...
        token: token ids, int64 `[n]`; -1 where there are none.
        position: of the token in its document, int64 `[n]`.
        left_out: massive rows that are not among them.
    """

    x: Tensor
    document: NDArray[np.int64]
    token: Tensor
    position: Tensor
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.x)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return int(self.document.max()) + 1 if len(self.document) else 0

    def take(self, rows: Tensor) -> Sample:
        """Return some of the rows (bool `[n]` or indices); documents are numbered anew."""
        document = np.unique(self.document[rows.numpy()], return_inverse=True)[1]
        return Sample(self.x[rows], document, self.token[rows], self.position[rows], self.left_out)

    def split(self, first: int) -> tuple[Sample, Sample]:
        """Return the documents that hold the first `first` rows, and the others; a lone one is halved.

        Raises:
            InputError: fewer than two rows.
        """
        n = len(self)
        if n < 2:
            raise InputError(f"{n} rows cannot be divided; give more text")
        cut = min(max(first, 1), n - 1)
        if self.documents < 2:
            return self.take(torch.arange(cut)), self.take(torch.arange(cut, n))
        last = min(int(self.document[cut - 1]), self.documents - 2)
        inside = torch.from_numpy(self.document <= last)
        return self.take(inside), self.take(~inside)

    def sums(self, values: Tensor) -> NDArray[np.float64]:
        """Return the sums over each document of `[n]`, or `[n, c]`, in float64."""
        wide = values.double()
        out = torch.zeros(self.documents, *wide.shape[1:], dtype=torch.float64)
        return out.index_add_(0, torch.from_numpy(self.document), wide).numpy()


def read_sample(
    model: Model | None,
    data: Iterable[Any] | Tensor,
    lens: Dictionary,
    *,
    tokens: int,
    context: int = CONTEXT,
    per_document: int | None = None,
    skip_positions: int = 0,
) -> Sample:
    """Read activations at a dictionary's site.

    Args:
        model: whose activations are read; not needed for rows.
        data: documents or strings; or rows `[n, d]`, which count as documents of 32 rows each.
        lens: the dictionary; its `skip_above` says which rows are massive, if it is set.
        tokens: read about so many.
        context: window length in tokens; cut to what the model takes.
        per_document: tokens of one document at most; default `tokens // 32`, at least 64.
        skip_positions: leave out each document's first so many tokens.

    Raises:
        InputError: no text, no model, or nothing but massive rows.
        ShapeError: the rows have not the dictionary's channels.
    """
    if tokens < 2:
        raise InputError(f"tokens is {tokens}; an evaluation needs at least 2")
    if isinstance(data, Tensor):
        found = Rows.cat(list(labelled_rows(None, data, lens.site, batch=4096, tokens=tokens)))
        document = np.arange(len(found)) // 32
    else:
        if model is not None:
            context = min(context, model.context_length or context)
        limit = max(64, tokens // 32) if per_document is None else per_document
        text = excerpts(data, limit)
        found = Rows.cat(
            list(labelled_rows(model, text, lens.site, batch=4096, tokens=tokens, context=context))
        )
        document = found.label[:, 0].numpy()
    if found.x.shape[1] != lens.channels:
        raise ShapeError(
            f"{type(lens).__name__} at {lens.site} reads {lens.channels} channels; the rows have "
            f"{found.x.shape[1]}"
        )
    massive = which_massive(lens, found.x)
    kept = ~massive & (found.label[:, 1] >= skip_positions)
    if not bool(kept.any()):
        raise InputError(f"all {len(found)} rows of {lens.site} are massive or skipped; give more text")
    whole = Sample(found.x, document, found.label[:, 2], found.label[:, 1], int(massive.sum()))
    return whole.take(kept)


def which_massive(lens: Dictionary, x: Tensor) -> Tensor:
    """Return which rows `[n, d]` an evaluation leaves out, bool `[n]`: those that the edits pass by.

    For a dictionary without `skip_above` they are those that a calibration calls massive, and those
    whose norm is above ten times the median.
    """
    if lens.skip_above is not None:
        return lens.massive(x)
    norm = x.norm(dim=1)
    return massive_rows(x) | (norm > _TIMES * norm.median())
