"""Features of texts for attribution: TF-IDF that is fitted inside a fold, or the states of an encoder.

TF-IDF: counts of the most frequent words and signs (line ends and indents are signs) times
`log((1 + n) / (1 + df)) + 1`, each text to unit length. The states of an encoder are standardised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.errors import InputError
from actlas.core.probe_data import pool

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]
Index = NDArray[np.int64]
TOKENS = r"[^\W\d_]+|\d+|_+|\n[ \t]*|[^\w\s]"
_BATCH = 16


@dataclass(frozen=True)
class Features:
    """How texts or states become features.

    Attributes:
        kind: `"tfidf"` or `"encoder"`.
        vocabulary, idf: of TF-IDF.
        centre, scale: of states (zeros for TF-IDF).
    """

    kind: str
    vocabulary: tuple[str, ...] = ()
    idf: Array = field(default_factory=lambda: np.zeros(0))
    centre: Array = field(default_factory=lambda: np.zeros(0))
    scale: Array = field(default_factory=lambda: np.ones(0))

    def of(self, texts_or_states: Any) -> Array:
        """Return features `[n, d]` of texts (TF-IDF) or of states `[n, d]`."""
        if self.kind == "tfidf":
            made = _counter(self.vocabulary).fit_transform(texts_or_states).toarray() * self.idf
            length = np.linalg.norm(made, axis=1, keepdims=True)
            return np.asarray(made / np.where(length > 0, length, 1.0))
        return np.asarray((texts_or_states - self.centre) / self.scale)


@dataclass(frozen=True)
class Fitted:
    """Features that were fitted on some texts, with those texts' features."""

    features: Features
    x: Array


@dataclass(frozen=True)
class Extractor:
    """Texts (and their states) from which features are fitted on any subset.

    Attributes:
        texts: all texts.
        states: float64 `[n, d]`, or `None` for TF-IDF.
        words: size of the vocabulary.
    """

    texts: Sequence[str]
    states: Array | None
    words: int

    def fit(self, index: Index) -> Fitted:
        """Fit on some texts."""
        if self.states is not None:
            x = self.states[index]
            spread = x.std(0)
            scale = np.where(spread > 1e-9 * max(float(np.abs(x).max()), 1e-30), spread, 1.0)
            made = Features("encoder", centre=x.mean(0), scale=scale)
            return Fitted(made, made.of(x))
        some = [self.texts[i] for i in index]
        counter = _counter(None, self.words)
        counts = counter.fit_transform(some)
        words = tuple(sorted(counter.vocabulary_, key=counter.vocabulary_.get))
        frequency = np.asarray((counts > 0).sum(0)).ravel()
        idf = np.log((1 + len(some)) / (1 + frequency)) + 1
        made = Features("tfidf", vocabulary=words, idf=idf, centre=np.zeros(len(words)))
        return Fitted(made, made.of(some))

    def of(self, fitted: Fitted, index: Index) -> Array:
        """Return fitted features of other texts."""
        if self.states is not None:
            return fitted.features.of(self.states[index])
        return fitted.features.of([self.texts[i] for i in index])


def states(model: Model, texts: Sequence[str], site: str, position: str) -> Array:
    """Return one state for each text, cut to the model's context, float64 `[n, d]`.

    Raises:
        InputError: a position other than `"mean"`, `"first"` and `"last"`.
    """
    if position not in ("mean", "first", "last"):
        raise InputError(f"position is {position!r}; it must be 'mean', 'first' or 'last'")
    where = model.resolve(site)[0]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: dict[int, Any] = {}
    for start in range(0, len(order), _BATCH):
        some = order[start : start + _BATCH]
        trace = model.trace(model.encode([texts[i] for i in some], truncate=True), [where])
        rows.update(zip(some, pool(trace, where, position).to(torch.float64).cpu(), strict=True))  # type: ignore[arg-type]
    return torch.stack([rows[i] for i in range(len(texts))]).numpy()


def _counter(vocabulary: Sequence[str] | None, words: int | None = None) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(
        lowercase=False, token_pattern=TOKENS, vocabulary=vocabulary or None, max_features=words
    )
