"""The judges of east and repe-reasoning on invented numbers, their items, and what their runs stand on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import t

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import east, repe_reasoning
from actlas.papers.reproductions.bandit_prompts import ARMS, bandits
from actlas.papers.reproductions.deduction_items import ANIMALS, deduction_items, random_text
from actlas.steering.directions import fit_direction
from tests.core.tiny import tiny


def measured(name: str, value: float, half: float = 0.01, **group: str) -> Measurement:
    return Measurement(name, value, "nats", 50, value - half, value + half, group=group)


def east_run(over: float, under: float, kept: float = 1.0, half: float = 0.01) -> Measured:
    found = [
        measured(east.TEMPERATURE, 0.1, words=east.SAME),
        measured("entropy gain over shuffled", 0.1, words=east.SAME),
        Measurement("entropy span", 0.4, "nats", 50),
        Measurement("1 - cosine with the covariance", 1e-8, "cosine", 50),
    ]
    for words in (east.SAME, east.OTHER):
        found += [
            measured(east.OVER, over, half, words=words, beta="0.2"),
            measured(east.UNDER, under, half, words=words, beta="-0.2"),
            measured("valid mass kept", kept, words=words, beta="0.2"),
        ]
    return Measured(found)


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (east_run(0.1, -0.1), "holds"),
        (east_run(0.1, 0.1), "partly"),
        (east_run(-0.1, 0.1), "does not hold here"),
        (east_run(0.1, -0.1, half=0.5), "not testable here"),
        (east_run(0.1, -0.1, kept=0.5), "partly"),  # the entropy rose because the model broke
    ],
)
def test_the_judge_of_east(run: Measured, verdict: str) -> None:
    assert verdict_of(east.judge(run)) == verdict


def test_a_broken_model_is_said_to_be_broken() -> None:
    checks = east.judge(east_run(0.1, -0.1, kept=0.5))
    assert checks[0].passed is False and "only 50% of the valid mass" in checks[0].said


def test_the_limit_of_random_directions_is_the_prediction_interval() -> None:
    generator = np.random.default_rng(0)
    own, noise = generator.normal(0.5, 0.1, 40), generator.normal(0, 0.1, (10, 40))
    means = noise.mean(1)
    half = t.ppf(0.975, 9) * means.std(ddof=1) * np.sqrt(1 + 1 / 10)
    for side in (1, -1):
        found = east.over_limit("x", own, noise, side, 0, {})
        assert found.value == pytest.approx(own.mean() - (means.mean() + side * half))
        assert found.low < found.value < found.high


def test_bandits_are_balanced_and_end_before_the_choice() -> None:
    made = bandits(80, seed=3)
    assert [b.prompt for b in made] == [b.prompt for b in bandits(80, seed=3)]
    assert len({b.prompt for b in made}) == 80
    assert Counter(b.better for b in made) == dict.fromkeys(ARMS, 40)
    first = Counter("A" if "machines, A and B" in b.prompt else "B" for b in made)
    assert first == dict.fromkeys(ARMS, 40)
    assert all(b.prompt.endswith("machine") and 1 <= b.rounds <= 8 for b in made)
    strong = [b for b in made if abs(b.evidence) > 3]
    assert strong and all((b.evidence > 0) == (b.better == "A") for b in strong)
    assert all(b.prompt.endswith("cafe") for b in bandits(4, words="cafes"))


def test_a_displacement_of_the_last_token_is_the_edit_at_the_last_token() -> None:
    from actlas.circuits.last_token import LastToken

    model = tiny()
    prompts = ["Machine A paid. So I play machine", "A and B. I go to", "Why, said the other"]
    texts = ["glad", "sad and grim", "a fine long day", "rain"]
    d = fit_direction(model, texts, "blocks.1.resid_post", method="cov", y=[1.0, 2.0, 0.5, 3.0])
    runs = LastToken(model, prompts, "blocks.1.resid_post")
    moved = runs.logits(runs.values + d.unit * d.reference * 0.5)
    for i, prompt in enumerate(prompts):
        with model.edit(d.steer(0.5).at(positions="last")):
            torch.testing.assert_close(moved[i], model.logits(prompt)[0, -1], rtol=1e-3, atol=1e-4)


def repe_run(over_base: float, over_random: float, half: float = 0.01, ratio: float = 1.0) -> Measured:
    found = [Measurement("KL at strength 0", 0.0, "nats", 9), measured("KL rise with strength", 0.1)]
    for name in ("KL over the closed form", "a quarter of KL at twice the strength, over KL"):
        found.append(measured(name, ratio))
    for task in repe_reasoning.TASKS:
        found += [
            measured(repe_reasoning.OVER_BASE, over_base, half, task=task),
            measured(repe_reasoning.OVER_RANDOM, over_random, half, task=task),
            measured("answer probability over the plain model", over_base, half, task=task),
        ]
    return Measured(found)


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (repe_run(0.1, 0.1), "holds"),
        (repe_run(0.1, 0.1, ratio=2.0), "partly"),
        (repe_run(0.1, -0.1), "partly"),
        (repe_run(-0.1, -0.1), "does not hold here"),
        (repe_run(0.0, 0.0), "not testable here"),
    ],
)
def test_the_judge_of_repe_reasoning(run: Measured, verdict: str) -> None:
    assert verdict_of(repe_reasoning.judge(run)) == verdict


def test_a_price_at_strength_0_fails() -> None:
    run = repe_run(0.1, 0.1)
    bad = Measured([*(m for m in run.all if m.name != "KL at strength 0"),
                    Measurement("KL at strength 0", 1e-9, "nats", 9)])  # fmt: skip
    assert next(c for c in repe_reasoning.judge(bad) if "strength 0" in c.name).passed is False


def test_deduction_items_have_one_right_answer_that_follows_from_the_facts() -> None:
    made = deduction_items(40, seed=1)
    assert len({i.prompt for i in made}) == 40 and made == deduction_items(60, seed=1)[:40]
    assert Counter(i.answer for i in made) == dict.fromkeys((f" {v}" for v in ANIMALS.values()), 10)
    for item in made:
        name = item.prompt.split(". ")[-1].split()[0]
        kind = item.prompt.split(f"{name} is a ")[1].split(".")[0]
        fact = f"{ANIMALS[kind].capitalize()} are afraid of{item.answer}."
        assert fact in item.prompt and item.prompt.endswith(f"{name} is afraid of")
        assert sorted(item.choices) == sorted(f" {v}" for v in ANIMALS.values())


def test_random_letters_are_as_long_as_asked() -> None:
    import random

    for length in (1, 7, 60):
        text = random_text(length, random.Random(0))
        assert text.strip() and abs(len(text) - length) <= 1
