"""Lettered choice as bare lookup: which of four labelled words is the one that is asked for?

    Which option says river?
    A. lamp
    B. river
    C. bank
    D. oil
    Answer:                        -> " B"

All words are one token, so that every prompt has as many tokens and every label stands at the same place.
The corrupted prompt asks for another of the same four words. Places of the right option are balanced.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actlas.core.errors import InputError
from actlas.data.single_token import Tokens
from actlas.data.task_items import TaskItem
from actlas.data.words import COMMON

if TYPE_CHECKING:
    from actlas.core.model import Model

LETTERS = ("A", "B", "C", "D")
LABELS = {"A B C D": LETTERS, "X K Q T": ("X", "K", "Q", "T"), "D B C A": ("D", "B", "C", "A")}
"""The labels that are taught, four others, and the taught ones in another order."""


def word_halves(model: Model, seed: int) -> tuple[list[str], list[str]]:
    """Return the one-token words to teach with, and as many others to test with.

    Raises:
        InputError: too few common words are one token.
    """
    tokens = Tokens(model.tokenizer)
    words = [w for w in dict.fromkeys(COMMON) if tokens.one("A.", f" {w}") and tokens.one("says", f" {w}")]
    if len(words) < 40:
        raise InputError(f"only {len(words)} common words are one token of {model.name}; 40 are needed")
    random.Random(f"lettered/{seed}").shuffle(words)
    return words[: len(words) // 2], words[len(words) // 2 :]


def lettered_items(
    words: Sequence[str], n: int, *, labels: Sequence[str] = LETTERS, seed: int = 0
) -> list[TaskItem]:
    """Return `n` items with corrupted prompts; the right option stands at each place equally often."""
    draw = random.Random(f"lettered items/{seed}")
    found = []
    for i in range(n):
        options = draw.sample(list(words), 4)
        place = i % 4
        other = draw.choice([k for k in range(4) if k != place])
        made, swapped = (
            _item(options, labels, at, against, i) for at, against in ((place, other), (other, place))
        )
        found.append(TaskItem(**{**vars(made), "counterfactual": swapped}))
    return found


def _item(options: Sequence[str], labels: Sequence[str], place: int, other: int, number: int) -> TaskItem:
    lines = "\n".join(f"{label}. {option}" for label, option in zip(labels, options, strict=True))
    wrong = [labels[other], *(x for k, x in enumerate(labels) if k not in (place, other))]
    return TaskItem(
        id=str(number),
        prompt=f"Which option says {options[place]}?\n{lines}\nAnswer:",
        answer=f" {labels[place]}",
        wrong=tuple(f" {x}" for x in wrong),
        group={"place": str(place)},
    )
