"""`chats(...)`: short conversations made from templates with a fixed seed, for what concerns chat models.

    made = chats(200, seed=0)
    made[0].messages     # ({'role': 'user', 'content': 'What is the capital of Ghana?'}, {'role': ...}, ...)
    fit, held_out = made[:150], made[150:]

Four kinds in turn, so that any first part is balanced: capitals, sums, rewriting a sentence of Moby-Dick,
and questions about Python's documentation. Every second round of four has a second question and answer.
Answers come from the templates, not from a model, so the text is the same on every machine that has the
same Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from actlas.core.errors import InputError
from actlas.data.bundled import documents
from actlas.data.facts_table import COUNTRIES

KINDS = ("capitals", "arithmetic", "rewriting", "documentation")
_Turn = tuple[str, str]
_PATIENCE = 2000  # drafts in a row that gave nothing new: there is nothing more


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        id: unique among the conversations it was made with.
        messages: `{"role", "content"}` in order.
        group: labels to disaggregate by: `kind` and `turns`.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    group: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What was said, without roles and markers."""
        return "\n\n".join(m["content"] for m in self.messages)


def chats(n: int = 200, *, seed: int = 0) -> list[Conversation]:
    """Make `n` different conversations; the first `k` are the same for every `n` of at least `k`.

    Args:
        n: how many.
        seed: the same seed gives the same conversations.

    Raises:
        InputError: `n` below 1, or more than the templates can make.
    """
    if n < 1:
        raise InputError(f"cannot make {n} conversations; ask for at least 1")
    draw = random.Random(f"chats/{seed}")
    made: dict[tuple[str, ...], Conversation] = {}
    fruitless = 0
    while len(made) < n:
        kind = KINDS[len(made) % len(KINDS)]
        turns = 1 + len(made) // len(KINDS) % 2
        said = [text for _ in range(turns) for text in _MAKERS[kind](draw)]
        fruitless = fruitless + 1 if tuple(said) in made else 0
        if fruitless > _PATIENCE:
            raise InputError(f"the templates make {len(made)} different conversations, not {n}")
        if not fruitless:
            roles = ("user", "assistant") * turns
            messages = tuple({"role": r, "content": c} for r, c in zip(roles, said, strict=True))
            group = {"kind": kind, "turns": str(turns)}
            made[tuple(said)] = Conversation(f"chat/{seed}/{len(made)}", messages, group)
    return list(made.values())


def _capital(draw: random.Random) -> _Turn:
    country = draw.choice(COUNTRIES)
    question, answer = draw.choice(
        (
            ("What is the capital of {0}?", "The capital of {0} is {1}."),
            ("Which city is the capital of {0}?", "{1} is the capital of {0}."),
            ("I am going to {0}. In which city does its government sit?", "In {1}, the capital of {0}."),
            ("Of which country is {1} the capital?", "{1} is the capital of {0}, in {2}."),
            ("Tell me the capital of {0} and its continent.", "{1}. {0} lies in {2}."),
        )
    )
    facts = (country.name, country.capital, country.continent)
    return question.format(*facts), answer.format(*facts)


def _sum(draw: random.Random) -> _Turn:
    a, b = draw.randint(2, 99), draw.randint(2, 99)
    question, answer = draw.choice(
        (
            ("What is {0} + {1}?", "{0} + {1} = {2}."),
            ("Please add {0} and {1}.", "The sum of {0} and {1} is {2}."),
            ("I had {0} apples and bought {1} more. How many have I now?", "You have {2} apples now."),
            ("Compute {2} - {0}.", "{2} - {0} = {1}."),
            ("Which is larger, {0} or {1}?", "{3}"),
        )
    )
    larger = f"{max(a, b)} is larger than {min(a, b)}." if a != b else f"They are equal: both are {a}."
    return question.format(a, b, a + b, larger), answer.format(a, b, a + b, larger)


def _rewriting(draw: random.Random) -> _Turn:
    sentence = draw.choice(_sentences())
    words = sentence.split()
    asked, answer = draw.choice(
        (
            ("Write this sentence in capital letters", sentence.upper()),
            ("Write this sentence in small letters only", sentence.lower()),
            ("Put the words of this sentence in reverse order", " ".join(reversed(words))),
            ("Leave all punctuation out of this sentence", re.sub(r"[^\w\s]", "", sentence)),
            ("Give me the first five words of this sentence", " ".join(words[:5])),
            ("Number the first four words", "\n".join(f"{i}. {w}" for i, w in enumerate(words[:4], 1))),
        )
    )
    return f"{asked}: {sentence}", answer


def _documentation(draw: random.Random) -> _Turn:
    name, summary = draw.choice(_entries())
    question = draw.choice(
        (
            "What does `{0}` do in Python?",
            "Explain Python's `{0}` in one sentence.",
            "In Python's documentation, how is `{0}` described?",
        )
    )
    return question.format(name), summary


@cache
def _sentences() -> tuple[str, ...]:
    """Sentences of Moby-Dick of 8 to 24 words."""
    found: dict[str, None] = {}
    for page in documents("prose"):
        text = " ".join(page.text.split())
        for sentence in re.findall(r"(?<=[.!?] )[A-Z][^.!?\"]*[.!?]", text):
            if 8 <= len(sentence.split()) <= 24:
                found[sentence] = None
    return tuple(found)


@cache
def _entries() -> tuple[_Turn, ...]:
    """Names and first sentences of documented functions and classes."""
    found: dict[str, str] = {}
    for page in documents("docs"):
        for head, body in re.findall(r"(?:^|\n\n\n)([\w.]+)(?:\([^\n]*\))?\n\n((?:[^\n]+\n?)+)", page.text):
            summary = re.split(r"(?<=[.!?])\s", " ".join(body.split()))[0]
            name = head.replace("_pydecimal", "decimal")
            private = any(part.startswith("_") for part in name.split("."))
            if 5 <= len(summary.split()) <= 40 and summary[-1] in ".!?" and not private:
                found.setdefault(name, summary)
    return tuple(found.items())


_MAKERS: dict[str, Callable[[random.Random], _Turn]] = {
    "capitals": _capital,
    "arithmetic": _sum,
    "rewriting": _rewriting,
    "documentation": _documentation,
}
