"""Capitals against the context: prompts whose context names a wrong capital, with or without an intent line.

    countries = known_capitals(model)                # those that the model completes rightly without context
    draws = wrong_contexts(countries, countries, each=4, seed=0)
    prompt(draws[0], "context")                      # "The capital of Peru is the city of Oslo. Answer ..."

All capitals are one token, so prompts that differ in the city alone match token by token; so do the two
intent lines.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.data.facts_table import COUNTRIES, Country
from actlas.data.single_token import Tokens

if TYPE_CHECKING:
    from actlas.core.model import Model

QUERY = "The capital of {} is the city of"
INTENTS = {"context": "Answer from the context.", "prior": "Answer from your memory."}
Draw = tuple[Country, Country]  # the country asked for, and the one whose capital the context names


def known_capitals(model: Model) -> list[Country]:
    """Return the countries whose one-token capital is the model's first choice without any context.

    Raises:
        InputError: fewer than eight are.
    """
    tokens = Tokens(model.tokenizer)
    found = [(c, tokens.one(QUERY.format(c.name), f" {c.capital}")) for c in COUNTRIES]
    asked = [(c, i) for c, i in found if i is not None]
    logits = model.logits(model.encode([QUERY.format(c.name) for c, _ in asked], padding_side="left"))
    said = logits[:, -1].argmax(1).tolist()
    known = [c for (c, i), first in zip(asked, said, strict=True) if i == first]
    if len(known) < 8:
        raise InputError(f"{model.name} knows only {len(known)} capitals that are one token; 8 are needed")
    return known


def wrong_contexts(
    asked: Sequence[Country], cities: Sequence[Country], *, each: int, seed: int
) -> list[Draw]:
    """Return `each` different wrong cities for every country that is asked for."""
    draw = random.Random(f"capitals/{seed}")
    return [(c, o) for c in asked for o in draw.sample([o for o in cities if o.capital != c.capital], each)]


def prompt(draw: Draw, intent: str = "") -> str:
    """Return the prompt: context sentence, intent line (none for `""`), query."""
    asked, other = draw
    query = QUERY.format(asked.name)
    parts = [f"{query} {other.capital}.", INTENTS.get(intent, ""), query]
    return " ".join(part for part in parts if part)


def answer(draw: Draw, intent: str) -> str:
    """Return the answer that an intent asks for, with its space."""
    return f" {(draw[1] if intent == 'context' else draw[0]).capital}"


def answer_ids(model: Model, draws: Sequence[Draw], asked: str, said: str) -> Tensor:
    """Return the token of what the context says (`"context"`) or of what is true (`"prior"`), `[n]`.

    Args:
        model: whose tokenizer is used.
        draws: the prompts.
        asked: the intent of the prompts (`""`: none).
        said: which answer.

    Raises:
        InputError: an answer that is not one token there.
    """
    tokens, found = Tokens(model.tokenizer), []
    for draw in draws:
        one = tokens.one(prompt(draw, asked), answer(draw, said))
        if one is None:
            raise InputError(f"{answer(draw, said)!r} is not one token after {prompt(draw, asked)[-40:]!r}")
        found.append(one)
    return torch.tensor(found)


def plain_pair(draw: Draw) -> dict[str, str]:
    """Return a record for `PromptPairs`: answer = what the context says, wrong = what is true.

    The other prompt's context names the true capital.
    """
    asked, _ = draw
    true = (asked, asked)
    return {
        "clean": prompt(draw),
        "corrupt": prompt(true),
        "answer": answer(draw, "context"),
        "wrong": answer(draw, "prior"),
    }


def intent_pair(draw: Draw, own: str = "prior") -> dict[str, str]:
    """Return a record for `PromptPairs`: one intent's prompt against the other's."""
    other = "context" if own == "prior" else "prior"
    return {
        "clean": prompt(draw, own),
        "corrupt": prompt(draw, other),
        "answer": answer(draw, own),
        "wrong": answer(draw, other),
    }
