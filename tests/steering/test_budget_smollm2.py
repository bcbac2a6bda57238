"""The automatic strength on a real model: new prompts stay within the budget, and the effect is real."""

from __future__ import annotations

import pytest

import actlas
from actlas.core.contrast import Contrast, read_contrast
from actlas.core.direction import Direction
from actlas.data.tasks import pairs, task
from actlas.steering.auto import auto


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block"),
    [("sentiment", 15), ("true-false", 20), ("capitals", 10), ("agreement", 25), ("ioi", 18)],
)
def test_held_out_texts_stay_within_the_budget(name: str, block: int) -> None:
    model = actlas.load("smollm2")
    site = f"blocks.{block}.resid_post"
    contrast = Contrast.of(pairs(task(name, model.tokenizer, n=64, seed=1)))
    fit, test = contrast.at(range(32)), contrast.at(range(32, len(contrast)))
    reading = read_contrast(model, fit, site)[site]
    direction = Direction.of(reading, reading.difference.mean(0), "mean_diff")
    chosen = auto(model, fit, {site: direction}, test=test, random=1)
    assert chosen.within.value >= 0.95 and chosen.within.n >= 50
    assert chosen.price.value > 0.02
    over = next(m for m in chosen.measurements if m.name == "effect-over-random")
    assert over.low is not None
    assert name == "true-false" or over.low > 0
