"""Small tasks as an instruction with inputs and one-token outputs: three with two labels each, four open
ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

from actlas.data.facts_table import COUNTRIES
from actlas.data.single_token import Tokens
from actlas.data.words import BLAME, CATEGORIES, NOUNS, OPPOSITES, PEOPLE, PRAISE
from actlas.select.cross_task import Instructed

_PAST = (
    ("walk", "walked"), ("go", "went"), ("take", "took"), ("see", "saw"), ("play", "played"),
    ("write", "wrote"), ("give", "gave"), ("come", "came"), ("look", "looked"), ("find", "found"),
    ("begin", "began"), ("speak", "spoke"), ("call", "called"), ("run", "ran"), ("know", "knew"),
    ("turn", "turned"), ("hold", "held"), ("bring", "brought"), ("stand", "stood"), ("leave", "left"),
    ("open", "opened"), ("feel", "felt"), ("grow", "grew"), ("fall", "fell"), ("send", "sent"),
    ("work", "worked"),
)  # fmt: skip
_THINGS = ("film", "book", "meal", "hotel", "concert", "game", "trip", "lecture")


def task_sets(tokens: Tokens, *, n: int, seed: int) -> list[Instructed]:
    """Return the tasks with `n` examples each; labels of closed tasks are balanced."""
    draw = random.Random(f"cross-task/{seed}")
    capitals = [(c.name, c.capital) for c in COUNTRIES]
    opposites = list(OPPOSITES)
    plurals = [*NOUNS, *PEOPLE]
    animals, fruits = (list(CATEGORIES[word]) for word in ("animal", "fruit"))
    made = {
        "capital": ("Name the capital of the country.", capitals, ()),
        "antonym": ("Give the opposite of the word.", opposites, ()),
        "plural": ("Give the plural of the word.", plurals, ()),
        "past": ("Give the past tense of the verb.", list(_PAST), ()),
        "sentiment": (
            "Is the review positive or negative?",
            _two(
                [f"The {t} was {w}." for t in _THINGS for w in PRAISE],
                [f"The {t} was {w}." for t in _THINGS for w in BLAME],
                ("positive", "negative"),
            ),
            ("positive", "negative"),
        ),
        "number": (
            "Is the word singular or plural?",
            _two([one for one, _ in plurals], [many for _, many in plurals], ("singular", "plural")),
            ("singular", "plural"),
        ),
        "kind": (
            "Is the word an animal or a fruit?",
            _two(animals, fruits, ("animal", "fruit")),
            ("animal", "fruit"),
        ),
    }
    found = []
    for name, (instruction, pool, labels) in made.items():
        kept = [(i, o) for i, o in pool if tokens.one("Output:", f" {o}") is not None]
        found.append(Instructed(name, instruction, tuple(_balanced(draw, kept, labels, n)), labels))
    return found


def _two(first: Sequence[str], second: Sequence[str], labels: tuple[str, str]) -> list[tuple[str, str]]:
    return [(word, label) for words, label in zip((first, second), labels, strict=True) for word in words]


def _balanced(
    draw: random.Random, pool: Sequence[tuple[str, str]], labels: Sequence[str], n: int
) -> list[tuple[str, str]]:
    """Return up to `n` examples, as many of each label, in random order."""
    groups = [[e for e in pool if e[1] == label] for label in labels] if labels else [list(pool)]
    most = min(n // len(groups), *(len(g) for g in groups)) if len(groups) > 1 else min(n, len(groups[0]))
    chosen = [e for group in groups for e in draw.sample(group, most)]
    draw.shuffle(chosen)
    return chosen
