"""Basic deduction after the bAbI tasks, number 15 (Weston et al. 2015): who is afraid of whom?

    Mice are afraid of wolves. Cats are afraid of sheep. Wolves are afraid of cats. Sheep are afraid of mice.
    Emily is a mouse. Jessica is a cat. Emily is afraid of
                                                           wolves

The answers are four kinds of animals, one token each.
"""

from __future__ import annotations

import random
import string

from actlas.data.task_items import TaskItem

ANIMALS = {"mouse": "mice", "wolf": "wolves", "cat": "cats", "sheep": "sheep"}
_NAMES = ("Emily", "Jessica", "Winona", "Gertrude", "Julie", "Brian", "Bernhard", "Lily", "Greg", "Julius")


def deduction_items(n: int, seed: int = 0) -> list[TaskItem]:
    """Return `n` different items; the answers' frequencies are balanced as far as `n` allows."""
    draw = random.Random(f"deduction/{seed}")
    kinds = list(ANIMALS)
    made: dict[str, TaskItem] = {}
    while len(made) < n:
        answer = kinds[len(made) % len(kinds)]
        feared = _derangement(kinds, draw)
        asked = next(k for k in kinds if feared[k] == answer)
        other = draw.choice([k for k in kinds if k != asked])
        names = draw.sample(_NAMES, 2)
        facts = [f"{ANIMALS[a].capitalize()} are afraid of {ANIMALS[b]}." for a, b in feared.items()]
        draw.shuffle(facts)
        people = [f"{names[0]} is a {asked}.", f"{names[1]} is a {other}."]
        draw.shuffle(people)
        prompt = " ".join([*facts, *people, f"{names[0]} is afraid of"])
        wrong = tuple(f" {ANIMALS[k]}" for k in kinds if k != answer)
        made.setdefault(
            prompt, TaskItem(f"deduction/{seed}/{len(made)}", prompt, f" {ANIMALS[answer]}", wrong)
        )
    return list(made.values())


def random_text(length: int, draw: random.Random) -> str:
    """Return letters and spaces, about `length` characters: what says nothing."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) < length:
        words.append("".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(2, 8))))
    return " ".join(words)[:length].strip() or "x"


def _derangement(kinds: list[str], draw: random.Random) -> dict[str, str]:
    """Return who fears whom, nobody itself and everybody feared once."""
    while True:
        feared = draw.sample(kinds, len(kinds))
        if all(a != b for a, b in zip(kinds, feared, strict=True)):
            return dict(zip(kinds, feared, strict=True))
