"""What a choice by activations must beat: chance, words in common, and sentence embeddings.

    random_scores(n, seed)                  chance
    bm25(source, target)                    Okapi BM25, the target examples as queries, averaged
    embedding_scores(encoder, source, target)   cosine with the mean embedding of the target examples

Source: Robertson & Zaragoza 2009 (BM25, k1 = 1.5, b = 0.75); the MoNA paper's baselines.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from actlas.core.errors import InputError
from actlas.select.samples import Array

if TYPE_CHECKING:
    from actlas.core.model import Model

_K1, _B = 1.5, 0.75


def random_scores(n: int, seed: int) -> Array:
    """Return a random score for each of n samples."""
    return np.random.default_rng(seed).random(n)


def bm25(source: Sequence[str], target: Sequence[str]) -> Array:
    """Return the mean BM25 score of each source text for the target texts as queries, `[n]`.

    Raises:
        InputError: no source or no target texts.
    """
    if not source or not target:
        raise InputError(f"BM25 needs texts on both sides; there are {len(source)} and {len(target)}")
    texts = [words(t) for t in source]
    length = np.array([len(t) for t in texts], dtype=np.float64)
    norm = _K1 * (1 - _B + _B * length / max(length.mean(), 1e-9))
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, text in enumerate(texts):
        for word, times in Counter(text).items():
            found[word].append((i, times))
    scores = np.zeros(len(texts))
    for word, times in Counter(w for t in target for w in words(t)).items():
        places = found.get(word, [])
        rarity = math.log(1 + (len(texts) - len(places) + 0.5) / (len(places) + 0.5))
        for i, here in places:
            scores[i] += times * rarity * here * (_K1 + 1) / (here + norm[i])
    return scores / len(target)


def embedding_scores(encoder: Model, source: Sequence[str], target: Sequence[str]) -> Array:
    """Return the cosine of each source text's embedding with the mean of the targets', `[n]`.

    Args:
        encoder: a sentence encoder, e.g. `actlas.load("minilm")`.
        source, target: texts.
    """
    from actlas.measure.encoder import embed

    middle = embed(encoder, target).mean(0)
    scores: Array = embed(encoder, source) @ (middle / np.linalg.norm(middle))
    return scores


def words(text: str) -> list[str]:
    """Return the words and signs of a text, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())
