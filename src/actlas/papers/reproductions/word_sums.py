"""Small sums told as stories, each with a terse and a wordy solution.

    problem = word_sums(60, seed=0)[0]
    problem.question    # 'Tom has 12 apples and buys 7 more. How many apples does he have now?'
    problem.concise     # '12 + 7 = 19.'
    problem.verbose     # 'Let us think about this step by step. ... So the answer is 19.'

Both solutions end with the number and a full stop, so that a reading of the last token compares like with
like.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from actlas.core.contrast import Contrast
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.measure.answer_length import render_prompt

_NAMES = ("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace")
_THINGS = ("apples", "books", "coins", "stamps", "pencils", "marbles", "cards", "shells")
_MORE = (
    "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
    "There are {a} {thing} in a box. {name} adds {b} {thing}. How many {thing} are in the box?",
    "{name} finds {a} {thing} on Monday and {b} {thing} on Tuesday. How many {thing} is that in all?",
)
_LESS = (
    "{name} has {a} {thing} and gives {b} of them away. How many {thing} does {name} have left?",
    "There are {a} {thing} in a box. {name} takes out {b}. How many {thing} are left in the box?",
    "{name} collected {a} {thing} and then lost {b}. How many {thing} remain?",
)
_WORDY = (
    "Let us think about this step by step. First, we look at what we know. We begin with {a} {thing}. "
    "After that, {b} {thing} {come}. To find the result, we need to {verb} these two numbers. "
    "When we {verb} them carefully, we get {c}. So the answer is {c}.",
    "Okay, let me read the question again and work through it slowly. The number at the start is {a}. "
    "The other number is {b}, because {b} {thing} {come}. That means that we have to {verb}. "
    "Let me check this once more to be sure. Yes, that is right, it makes {c}. So the answer is {c}.",
)


@dataclass(frozen=True)
class WordSum:
    """One problem with its right answer and two solutions."""

    question: str
    answer: str
    concise: str
    verbose: str


def word_sums(n: int, seed: int = 0) -> list[WordSum]:
    """Return `n` different problems; the first `k` are the same for every `n` of at least `k`."""
    draw = random.Random(f"word sums/{seed}")
    found: dict[str, WordSum] = {}
    while len(found) < n:
        more = draw.random() < 0.5
        a, b = draw.randint(11, 60), draw.randint(3, 30)
        if not more and b >= a:
            continue
        c = a + b if more else a - b
        words = {"name": draw.choice(_NAMES), "thing": draw.choice(_THINGS), "a": a, "b": b, "c": c}
        question = draw.choice(_MORE if more else _LESS).format(**words)
        verbose = draw.choice(_WORDY).format(
            **words, come="are added" if more else "go away", verb="add" if more else "subtract"
        )
        found.setdefault(
            question, WordSum(question, str(c), f"{a} {'+' if more else '-'} {b} = {c}.", verbose)
        )
    return list(found.values())[:n]


def plain_sums(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return `n` different questions for the sum of two two-digit numbers, with their answers."""
    if n > 4000:
        raise InputError(f"there are not {n} different sums of two-digit numbers; ask for at most 4000")
    draw = random.Random(f"plain sums/{seed}")
    found: dict[str, str] = {}
    while len(found) < n:
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        found[f"What is {a} + {b}?"] = str(a + b)
    return list(found.items())


def solved(model: Model, problems: Sequence[WordSum]) -> Contrast:
    """Return the contrast of concise (positive) and verbose solutions, after the rendered question."""
    prompts = tuple(render_prompt(model, p.question) for p in problems)
    return Contrast(
        tuple(q + p.concise for q, p in zip(prompts, problems, strict=True)),
        tuple(q + p.verbose for q, p in zip(prompts, problems, strict=True)),
        prompt=prompts,
    )
