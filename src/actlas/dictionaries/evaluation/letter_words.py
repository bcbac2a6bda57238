"""Words whose first letter a model should know: one token each, read where they stand."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError, ModelError

if TYPE_CHECKING:
    from actlas.core.model import Model

LEAST_WORDS = 8  # of a letter, so that a few are held out
EXAMPLES = ("apple", "music", "house", "green", "table", "river", "doctor", "winter", "paper", "king")


@dataclass(frozen=True)
class Words:
    """Activations at words.

    Attributes:
        x: float32 `[words, d]`. letter: index 0 to 25, `[words]`. train: bool `[words]`.
        words: the words themselves.
    """

    x: Tensor
    letter: NDArray[np.int64]
    train: NDArray[np.bool_]
    words: tuple[str, ...]


@torch.no_grad()
def read_words(
    model: Model, site: str, *, per_letter: int = 40, examples: int = 2, seed: int = 0, batch: int = 64
) -> Words:
    """Read the activation at words that are one token, after a few solved examples.

    Args:
        model: a language model with a tokenizer.
        site: where.
        per_letter: words of each letter at most.
        examples: how many lines "word has the first letter: W" stand before.
        seed: which words, and which are held out (30%).
        batch: words of one forward pass.

    Raises:
        ModelError: no tokenizer. InputError: fewer than two letters have words enough.
    """
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it has no words for the first-letter task")
    generator = np.random.default_rng(seed)
    ids, words = _words(model.tokenizer, per_letter, generator, EXAMPLES[:examples])
    lines = "".join(f" {w} has the first letter: {w[0].upper()}\n" for w in EXAMPLES[:examples])
    prefix = list(model.tokenizer(lines)["input_ids"]) if lines else []
    rows = torch.tensor([[*prefix, i] for i in ids])
    found = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        trace = model.trace({"input_ids": part, "attention_mask": torch.ones_like(part)}, site)
        found.append(trace[site][:, -1].flatten(1).float().cpu())
    letter = np.array([string.ascii_lowercase.index(w[0]) for w in words])
    train = np.zeros(len(words), dtype=bool)
    for one in np.unique(letter):
        own = generator.permutation(np.flatnonzero(letter == one))
        train[own[: round(0.7 * len(own))]] = True
    return Words(torch.cat(found), letter, train, tuple(words))


def _words(
    tokenizer: Any, per_letter: int, generator: np.random.Generator, leave_out: Sequence[str]
) -> tuple[list[int], list[str]]:
    by_letter: dict[str, list[tuple[int, str]]] = {}
    special = set(getattr(tokenizer, "all_special_ids", []))
    for i in range(len(tokenizer)):
        if i in special:
            continue
        text = tokenizer.decode([i])
        word = text.strip()
        plain = len(word) >= 3 and word.isascii() and word.isalpha() and word.islower()
        if plain and text == f" {word}" and word not in leave_out:
            by_letter.setdefault(word[0], []).append((i, word))
    kept = {k: v for k, v in sorted(by_letter.items()) if len(v) >= LEAST_WORDS}
    if len(kept) < 2:
        raise InputError(
            f"this tokenizer has {LEAST_WORDS} whole words or more for {len(kept)} letters; the first-letter "
            "task needs that for at least 2"
        )
    chosen = [v[i] for v in kept.values() for i in generator.permutation(len(v))[:per_letter]]
    return [i for i, _ in chosen], [w for _, w in chosen]
