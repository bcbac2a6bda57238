"""Checking that an answer is one token, the way it stands after its prompt.

Tokenizers differ: GPT-2 has `" Paris"` as one token, SentencePiece adds the space by itself, SmolLM splits
numbers into digits so that `" 7"` is two tokens. What counts is the continuation, so the check tokenizes
prompt and answer together and asks that exactly one token was added.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from actlas.core.errors import InputError

T = TypeVar("T")
_CARRIER = "The word is"


class Tokens:
    """Token ids of text without special tokens, remembered.

    Args:
        tokenizer: one of transformers (called with `add_special_tokens=False`), one of the `tokenizers`
            library, or `None`: then every word passes and no ids are known.

    Raises:
        InputError: it is not a tokenizer.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        if tokenizer is not None and not callable(tokenizer) and not hasattr(tokenizer, "encode"):
            raise InputError(
                f"a {type(tokenizer).__name__} is not a tokenizer; give model.tokenizer, or None"
            )
        self.tokenizer = tokenizer
        self._ids: dict[str, tuple[int, ...]] = {}

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer to check with."""
        return self.tokenizer is not None

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text (empty without a tokenizer)."""
        if self.tokenizer is None:
            return ()
        if text not in self._ids:
            if callable(self.tokenizer):
                found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                found = self.tokenizer.encode(text, add_special_tokens=False)
                found = getattr(found, "ids", found)
            self._ids[text] = tuple(int(i) for i in found)
        return self._ids[text]

    def added(self, prompt: str, answer: str) -> tuple[int, ...]:
        """Return the tokens that `answer` adds after `prompt`; empty if it changes the prompt's tokens."""
        before, whole = self.ids(prompt), self.ids(prompt + answer)
        return whole[len(before) :] if whole[: len(before)] == before else ()

    def one(self, prompt: str, answer: str) -> int | None:
        """Return the only token that `answer` adds after `prompt`, or `None` if it is not one known token."""
        added = self.added(prompt, answer)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is None and hasattr(self.tokenizer, "token_to_id"):
            token = getattr(getattr(self.tokenizer, "model", None), "unk_token", None)
            unknown = None if token is None else self.tokenizer.token_to_id(token)
        return added[0] if len(added) == 1 and added[0] != unknown else None


class Builder:
    """What the builders of tasks draw from: seeded choices and words that fit the tokenizer.

    Args:
        tokens: the tokenizer's checks.
        seed: text or number; every choice depends on it.
        words: use only so many words of each list of candidates; `None` uses all.
    """

    def __init__(self, tokens: Tokens, seed: str, words: int | None = None) -> None:
        self.tokens = tokens
        self.random = random.Random(seed)
        self.words = words

    def single(self, words: Iterable[str], least: int = 2) -> list[str]:
        """Return the words that are one token after a space.

        Raises:
            InputError: fewer than `least` are.
        """
        asked = list(words)
        if not self.tokens.known:
            return asked[: self.words]
        kept = [word for word in asked if self.tokens.one(_CARRIER, f" {word}") is not None]
        if len(kept) < least:
            first = next(word for word in asked if word not in kept)
            pieces = len(self.tokens.added(_CARRIER, f" {first}"))
            raise InputError(
                f"only {len(kept)} of {len(asked)} words are one token for this tokenizer, {least} are needed"
                f" ({' ' + first!r} is {pieces}); use another task"
            )
        return kept[: self.words]

    def labels(self, candidates: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """Return the first pair of label words that are one token each.

        Raises:
            InputError: none is.
        """
        for first, second in candidates:
            if not self.tokens.known or all(
                self.tokens.one("Answer:", f" {word}") is not None for word in (first, second)
            ):
                return first, second
        said = ", ".join(f"{a}/{b}" for a, b in candidates)
        raise InputError(f"none of the labels {said} is one token for this tokenizer; use another task")

    def pick(self, things: Sequence[T], n: int) -> list[T]:
        """Return `n` different things, in random order."""
        return self.random.sample(list(things), n)
