"""Small random models and prompts for gates."""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.core.model import Model
from tests.core.tiny import tiny

QUESTIONS = [
    f"How many is {a} and {b}" for a in ("two", "five", "nine") for b in ("one", "six", "ten", "four")
]
OTHERS = [
    f"Tell me about {a} {b}" for a in ("old", "red", "wild") for b in ("ships", "birds", "towns", "rain")
]
LABELLED = [(t, 1) for t in QUESTIONS] + [(t, 0) for t in OTHERS]


def model(family: str = "llama") -> Model:
    """Return the random model that every test of gates uses."""
    return tiny(family)


def generated(
    found: Model, prompts: list[str], *edits: object, n: int = 5, **options: object
) -> list[Tensor]:
    """Return the ids that each prompt is continued with, under edits."""
    options = {"min_new_tokens": n, **options}
    with found.edit(*edits):  # type: ignore[arg-type]
        return found.generate(prompts, max_new_tokens=n, **options).tokens  # type: ignore[arg-type]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Say whether two generations are the same."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
