"""The criterion of entity-tracking-finetuning on invented numbers, and its prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, recipe, verdict_of
from actlas.papers.reproductions import entity_tracking_finetuning as paper
from actlas.papers.reproductions.box_prompts import LABELS, OBJECTS, Boxes, BoxWorld


def m(name: str, value: float, spread: float = 0.05, **group: str) -> Measurement:
    return Measurement(name, value, "fraction", 48, value - spread, value + spread, group=group)


def found(**changed: float) -> list[Measurement]:
    v = {
        "base": 0.2,
        "tuned": 0.97,
        "p": 0.001,
        "beyond": 0.7,
        "gain": 0.8,
        "object": 0.8,
        "gap": 0.7,
    } | changed
    shared = [
        Measurement(
            "shared heads", 10.0, "count", 15, group={"models": f"{name}, tuned"},
            details={"p": v["p"], "chance": 4.0},
        )
        for name in ("early", "base")
    ]  # fmt: skip
    gains = [
        m("CMAP gain", value, run=run, into=into, what=what)
        for into in ("early", "base")
        for run, value in (("group", v["gain"]), ("group minus random", v["beyond"]))
        for what in ("out", "q")
    ]
    return [
        m("accuracy", v["base"], model="base"), m("accuracy", v["tuned"], model="tuned"), *shared, *gains,
        m("target rate, group minus nothing", v["object"], desideratum="object"),
        m("target rate, object minus position", v["gap"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"gain": 0.4}, "partly"),
        ({"p": 0.4}, "partly"),  # other heads than before
        ({"beyond": -0.2}, "partly"),  # random heads do as well
        ({"beyond": 0.02}, "partly"),  # undecided
        ({"beyond": -0.2, "p": 0.4}, "does not hold here"),
    ],
)
def test_it_is_judged(changed: dict[str, float], verdict: str) -> None:
    assert verdict_of(paper.judge(Measured(found(**changed)))) == verdict


def test_without_measurements_nothing_can_be_decided() -> None:
    assert verdict_of(paper.judge(Measured([]))) == "not testable here"
    assert recipe("entity-tracking-finetuning").quick["prompts"] == 48


def test_shared_heads_are_judged_against_heads_of_the_same_blocks() -> None:
    late = [(b, h) for b in (27, 28, 29) for h in range(5)]
    same = paper._shared(late, late, 9, "x", 0)
    assert same.value == 15 and same.details["p"] < 0.01
    assert same.details["chance"] == pytest.approx(15 * 5 / 9, abs=0.2)
    other = [(b, h) for b in (27, 28, 29) for h in range(4, 9)]
    few = paper._shared(late, other, 9, "x", 0)
    assert few.value == 3 and few.details["p"] > 0.9
    effects = torch.zeros(30, 9)
    effects[29, 3], effects[2, 8] = 2.0, 1.0
    assert paper._top(effects)[:2] == [(29, 3), (2, 8)]


class _Tokenizer:
    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": text.split()}


@pytest.fixture
def world() -> BoxWorld:
    return BoxWorld(SimpleNamespace(tokenizer=_Tokenizer()), 3, 0)  # type: ignore[arg-type]


def test_prompts_say_what_is_where() -> None:
    boxes = Boxes(("apple", "bell", "drum"), ("F", "C", "Q"), 1)
    assert (
        boxes.prompt
        == "The apple is in Box F, the bell is in Box C, the drum is in Box Q. Box C contains the"
    )
    assert boxes.answer == " bell"
    assert Boxes(("apple",), ("F",), 0, "Z").prompt.endswith("Box Z contains the")
    assert len(set(OBJECTS)) == len(OBJECTS) and len(set(LABELS)) == len(LABELS)


def test_objects_of_training_and_test_are_apart(world: BoxWorld) -> None:
    taught = {word for prompt, _ in world.training(50) for word in prompt.split()}
    tested = {o for _ in range(50) for o in world.draw("test").objects}
    assert not taught & tested
    assert BoxWorld(SimpleNamespace(tokenizer=_Tokenizer()), 3, 0).training(5) == BoxWorld(  # type: ignore[arg-type]
        SimpleNamespace(tokenizer=_Tokenizer()),  # type: ignore[arg-type]
        3,
        0,
    ).training(5)


def test_desiderata_change_one_thing(world: BoxWorld) -> None:
    drawn = [world.draw("test") for _ in range(20)]
    wanted = world.desiderata(drawn)
    for d, (base, source, target) in zip(drawn, wanted["object"], strict=True):
        assert base == d.prompt and target.strip() in source and target.strip() not in base
        place = [part.split()[1] for part in source.split(". ")[0].split(", ")].index(target.strip())
        assert place == d.asked
    for d, (base, source, target) in zip(drawn, wanted["position"], strict=True):
        assert target != d.answer and target.strip() in base and target.strip() not in source
        label = source.split("Box ")[-1].split()[0]
        place = [part.split()[-1] for part in source.split(". ")[0].split(", ")].index(label)
        assert target.strip() == d.objects[place]
