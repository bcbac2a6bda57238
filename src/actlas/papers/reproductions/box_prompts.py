"""Prompts about which object is in which box (Kim and Schuster 2023, arXiv 2305.02363), with named positions.

    The apple is in Box F, the bell is in Box C, the drum is in Box Q. Box F contains the      -> " apple"

Objects and labels are one token each, so every prompt with as many boxes has equally many tokens. Objects of
training and of test prompts are disjoint.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model

LABELS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_OBJECTS = """
apple bell book bread brush camera candle card chain chair clock coat coin computer cup disk drum
engine fan flag flower fork gift glass guitar gun hammer hat helmet jacket key knife lamp letter
machine magnet map medal medicine milk mirror needle note paper pen phone picture pie pipe plane
plant plate pot radio ring rock rope rose scarf shell ship shirt shoe stone string suit tape ticket
tie tool train tree watch wheel wire
"""
OBJECTS = tuple(_OBJECTS.split())


@dataclass(frozen=True)
class Boxes:
    """One prompt: objects and labels in order of mention, and which of them is asked for.

    Attributes:
        objects, labels: in order of mention.
        asked: number of the box that is asked for.
        query: the label in the question, if it is none of the labels.
    """

    objects: tuple[str, ...]
    labels: tuple[str, ...]
    asked: int
    query: str = ""

    @property
    def prompt(self) -> str:
        """The text up to the answer."""
        said = ", ".join(f"the {o} is in Box {b}" for o, b in zip(self.objects, self.labels, strict=True))
        return f"T{said[1:]}. Box {self.query or self.labels[self.asked]} contains the"

    @property
    def answer(self) -> str:
        """The object in the box that is asked for."""
        return f" {self.objects[self.asked]}"


def single_tokens(model: Model) -> tuple[list[str], list[str]]:
    """Return the objects and labels that are one token after a space."""
    count = lambda word: len(model.tokenizer(f"the {word}")["input_ids"])  # noqa: E731
    base = len(model.tokenizer("the")["input_ids"])
    return [o for o in OBJECTS if count(o) == base + 1], [b for b in LABELS if count(b) == base + 1]


class BoxWorld:
    """Draws prompts; training and test objects are disjoint.

    Args:
        model: whose tokenizer decides which words are one token.
        boxes: how many a prompt has.
        seed: of the split and of all draws.
    """

    def __init__(self, model: Model, boxes: int, seed: int) -> None:
        objects, self.labels = single_tokens(model)
        self.random = random.Random(f"boxes/{boxes}/{seed}")
        self.random.shuffle(objects)
        self.boxes, half = boxes, len(objects) // 2
        self.objects = {"train": objects[:half], "test": objects[half:]}

    def draw(self, split: str, *, without: Boxes | None = None, asked: int | None = None) -> Boxes:
        """Return a prompt, with no object or label of another one."""
        used = set() if without is None else {*without.objects, *without.labels, without.query}
        objects = self.random.sample([o for o in self.objects[split] if o not in used], self.boxes)
        labels = self.random.sample([b for b in self.labels if b not in used], self.boxes)
        return Boxes(
            tuple(objects), tuple(labels), self.random.randrange(self.boxes) if asked is None else asked
        )

    def training(self, n: int) -> list[tuple[str, str]]:
        """Return `n` training prompts with their answers."""
        drawn = [self.draw("train") for _ in range(n)]
        return [(d.prompt, d.answer) for d in drawn]

    def pairs(self, model: Model, drawn: list[Boxes]) -> PromptPairs:
        """Return prompts beside corrupted ones: other objects and labels, and a label asked for that no box
        has. The wrong answer is another object of the prompt."""
        from actlas.circuits.batch import PromptPairs

        records = []
        for d in drawn:
            other = self.draw("test", without=d)
            free = [b for b in self.labels if b not in {*d.labels, *other.labels}]
            other = Boxes(other.objects, other.labels, other.asked, self.random.choice(free))
            wrong = self.random.choice([o for i, o in enumerate(d.objects) if i != d.asked])
            record = {"clean": d.prompt, "corrupt": other.prompt, "answer": d.answer, "wrong": f" {wrong}"}
            records.append(record)
        return PromptPairs.from_task(model, records, n=len(records), force=True)

    def desiderata(self, drawn: list[Boxes]) -> dict[str, list[tuple[str, str, str]]]:
        """Return (base prompt, source prompt, target answer) for what a group of heads may carry.

        `object`: the source has other objects and labels and asks for the same place; heads that carry the
        object make the answer the source's object. `position`: the source has other objects and labels and
        asks for another place; heads that carry the place make it the base's object at that place.
        """
        found: dict[str, list[tuple[str, str, str]]] = {"object": [], "position": []}
        for d in drawn:
            same = self.draw("test", without=d, asked=d.asked)
            found["object"].append((d.prompt, same.prompt, same.answer))
            place = self.random.choice([i for i in range(self.boxes) if i != d.asked])
            moved = self.draw("test", without=d, asked=place)
            found["position"].append((d.prompt, moved.prompt, f" {d.objects[place]}"))
        return found
