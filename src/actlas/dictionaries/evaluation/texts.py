"""Labelled texts as single rows: activations and codes averaged over the tokens of each text.

Sparse probing and concept removal (SAEBench) classify texts. A text is the mean over its tokens of the
activation, `[d]`, and of the codes, `[m]`; padding and massive rows do not count. Because pooling and
decoding are both linear, switching features S off and keeping the reconstruction error moves the pooled
activation by exactly  - sum_{j in S} pooled z_j d_j.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.data import task
from actlas.dictionaries.evaluation.rows import which_massive
from actlas.measure.reading import excerpts

if TYPE_CHECKING:
    from actlas.core.model import Model

Labelled = Sequence[tuple[str, str]]
TOKENS = 96  # of a text at most


@dataclass(frozen=True)
class Pooled:
    """Texts as rows.

    Attributes:
        x: float32 `[texts, d]`, mean activation.
        codes: float32 `[texts, m]`, mean code, for each dictionary.
        label: of each text, `[texts]`.
    """

    x: NDArray[np.float32]
    codes: Mapping[str, NDArray[np.float32]]
    label: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.x)

    def classes(self) -> list[str]:
        """Return the labels that occur, sorted."""
        return sorted(set(self.label.tolist()))


@torch.no_grad()
def pool_texts(
    model: Model,
    texts: Labelled,
    lenses: Mapping[str, Dictionary],
    *,
    batch_tokens: int = 2048,
    tokens: int = TOKENS,
) -> Pooled:
    """Read labelled texts at the dictionaries' site and average them.

    Args:
        model: whose activations are read.
        texts: `(text, label)`.
        lenses: dictionaries of one site.
        batch_tokens: of one forward pass.
        tokens: read at most so many of each text.

    Raises:
        InputError: no texts, or a text with nothing but massive rows.
    """
    if not texts:
        raise InputError("there are no labelled texts to evaluate on; give at least a few of each label")
    first = next(iter(lenses.values()))
    n = len(texts)
    total = torch.zeros(n, first.channels, dtype=torch.float64)
    sums = {name: torch.zeros(n, lens.features) for name, lens in lenses.items()}
    count = torch.zeros(n)
    for trace in model.stream(
        [text for text, _ in texts], first.site, batch_tokens=batch_tokens, context=_context(model, tokens)
    ):
        assert trace.mask is not None
        keep = torch.tensor(trace.offsets) == 0  # the first window of each text
        mask = trace.mask.cpu() & keep.unsqueeze(1)
        x = first.flat(trace[first.site]).float().cpu()
        own = torch.tensor([int(d) for d in trace.documents])
        row = own.unsqueeze(1).expand(mask.shape)[mask]
        rows = x[mask]
        ordinary = ~which_massive(first, rows)
        row, rows = row[ordinary], rows[ordinary]
        count.index_add_(0, row, torch.ones(len(row)))
        total.index_add_(0, row, rows.double())
        for name, lens in lenses.items():
            codes = lens.encode(rows)
            place = row.unsqueeze(1) * lens.features + codes.indices
            sums[name].view(-1).index_add_(0, place.reshape(-1), codes.values.float().reshape(-1))
    if bool((count == 0).any()):
        bad = int((count == 0).nonzero()[0])
        raise InputError(f"text {bad} has no tokens but massive ones: {texts[bad][0][:40]!r}")
    return Pooled(
        (total / count.unsqueeze(1)).float().numpy(),
        {name: (s / count.unsqueeze(1)).numpy() for name, s in sums.items()},
        np.array([label for _, label in texts]),
    )


def default_sets(
    model: Model, corpus: Iterable[Any], *, per_class: int = 60, tokens: int = 64
) -> dict[str, list[tuple[str, str]]]:
    """Return the labelled sets that can be had without a download, by name.

    * `"domain"`: beginnings of documents, labelled by the corpus's own `domain` (prose, code, docs);
    * `"sentiment"` and `"true-false"`: the judged texts of those tasks, for tokenizers that can express them.

    Args:
        model: whose tokenizer the tasks are made for.
        corpus: documents; those without a `domain` label are passed over.
        per_class: texts of each label.
        tokens: about so many tokens of a document.
    """
    out: dict[str, list[tuple[str, str]]] = {}
    documents = [d for d in corpus if getattr(d, "group", {}).get("domain")]
    by_domain: dict[str, list[tuple[str, str]]] = {}
    for document, part in zip(documents, excerpts(documents, tokens), strict=True):
        by_domain.setdefault(document.group["domain"], []).append((part.text, document.group["domain"]))
    sets = {name: found[:per_class] for name, found in by_domain.items() if len(found) >= 10}
    if len(sets) > 1:
        out["domain"] = [pair for found in sets.values() for pair in found]
    for name, label in (("sentiment", "sentiment"), ("true-false", "truth")):
        try:
            items = task(name, model.tokenizer, n=2 * per_class)
        except InputError:
            continue  # this tokenizer cannot express the task
        out[name] = [(item.stimulus, item.group[label]) for item in items]
    return out


def _context(model: Model, tokens: int) -> int:
    return min(tokens, model.context_length or tokens)


def review_corners(model: Model, *, per_corner: int = 30) -> list[tuple[str, str, str]]:
    """Return reviews `(text, sentiment, subject)` of two subjects, for removing a spurious correlation.

    The two subjects are those with most reviews in the sentiment task; an empty list where the tokenizer
    cannot express the task.

    Args:
        model: whose tokenizer the task is made for.
        per_corner: reviews of each sentiment and subject at most.
    """
    try:
        items = list(task("sentiment", model.tokenizer, n=40 * per_corner))
    except InputError:
        return []
    corners: dict[tuple[str, str], list[str]] = {}
    for item in items:
        corners.setdefault((item.group["sentiment"], item.group["subject"]), []).append(item.stimulus)
    sentiments = sorted({s for s, _ in corners})
    subjects = sorted(
        {s for _, s in corners}, key=lambda s: (-min(len(corners.get((a, s), [])) for a in sentiments), s)
    )
    return [
        (text, sentiment, subject)
        for sentiment in sentiments
        for subject in subjects[:2]
        for text in corners.get((sentiment, subject), [])[:per_corner]
    ]
