"""The criteria of the subspace, knob and head reproductions on invented numbers, and their prompts."""

from __future__ import annotations

import pytest

from actlas.circuits.illusion import EFFECT, GAP, PARTS, READABLE
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.data.facts_table import COUNTRIES
from actlas.papers.reproduction import Measured, recipe, verdict_of
from actlas.papers.reproductions import capital_prompts as prompts
from actlas.papers.reproductions import context_knob, factual_recall_heads, subspace_patching_illusion


def m(name: str, value: float, spread: float = 0.05, note: str = "", **group: str) -> Measurement:
    return Measurement(name, value, "fraction", 50, value - spread, value + spread, group=group, note=note)


def illusion(**changed: float) -> list[Measurement]:
    v = {"error": 1e-16, "mlp": 0.3, "random": 0.0, "parts": 0.4, "gap": -0.3, "unread": 0.0, "found": 1.0,
         "read": 0.9} | changed  # fmt: skip
    mlp, residual = subspace_patching_illusion.MLP, subspace_patching_illusion.RESIDUAL
    return [
        Measurement("deviation of the distilled network", v["error"], "absolute", 64),
        m(PARTS, 0.0, note="illusion: as it must", case="distilled, v = (0, 1, 1)"),
        m(PARTS, 1.0, note="faithful: as it must", case="distilled, v = (1, 0, 0)"),
        m(EFFECT, v["mlp"], site=mlp, part="subspace"),
        m(EFFECT, v["random"], 0.01, site=mlp, part="random"),
        m(EFFECT, v["unread"], 0.0, site=mlp, part="unreadable"),
        m(PARTS, v["parts"], site=mlp),
        m(GAP, v["gap"], site=mlp),
        m(PARTS, v["found"], site=residual),
        m(READABLE, v["read"], site=residual),
    ]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"parts": 0.95}, "partly"),  # the readable part carries the effect: no illusion
        ({"gap": 0.2}, "partly"),  # the whole MLP is as strong
        ({"error": 1e-3}, "partly"),
        ({"read": 0.3}, "partly"),
        ({"mlp": -0.3, "parts": 0.95, "gap": 0.2, "found": 0.3, "error": 1.0}, "does not hold here"),
    ],
)
def test_the_illusion_is_judged(changed: dict[str, float], verdict: str) -> None:
    checks = subspace_patching_illusion.judge(Measured(illusion(**changed)))
    assert verdict_of(checks) == verdict


def test_swapped_verdicts_of_the_distilled_network_fail() -> None:
    found = illusion()
    found[1], found[2] = (
        m(PARTS, 1.0, note="faithful: wrong", case="distilled, v = (0, 1, 1)"),
        m(PARTS, 0.0, note="illusion: wrong", case="distilled, v = (1, 0, 0)"),
    )
    checks = subspace_patching_illusion.judge(Measured(found))
    assert checks[0].passed is False and checks[0].central


def knob(**changed: float) -> list[Measurement]:
    v = {"pairs": 0.95, "turned": 0.9, "context": 0.6, "between": 0.7, "memory": 0.2, "das": 0.8, "late": 0.9}
    v |= changed
    return [
        m("pair accuracy", v["pairs"], model="tuned"),
        m("pair accuracy", 0.0, model="original"),
        m("turned", v["turned"], knob="mean_diff", by="set"),
        m("turned", v["das"], knob="das", by="set"),
        m("context share beyond random", v["context"], knob="mean_diff"),
        m("memory share beyond random", v["memory"], knob="mean_diff"),
        m("context share, context minus prior value", v["between"], knob="mean_diff"),
        m("turned by everything minus by the direction", v["late"], block="26"),
        m("share of the parts", 1.0, note="faithful: 98%", knob="mean_diff"),
    ]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"memory": 0.0}, "partly"),  # undecided
        ({"context": 0.0}, "partly"),  # no better than random directions
        ({"context": 0.0, "turned": 0.1, "between": 0.0}, "does not hold here"),
    ],
)
def test_the_knob_is_judged(changed: dict[str, float], verdict: str) -> None:
    assert verdict_of(context_knob.judge(Measured(knob(**changed)))) == verdict


def heads(**changed: float) -> list[Measurement]:
    v = {"base": 0.05, "gain": 0.6, "beyond": 0.5, "rate": 0.65, "other": 0.2, "order": 0.5, "else": 0.2}
    v |= changed
    one = {"heads": "one", "relation": "capital"}
    return [
        m("rate", v["base"], **one, edit="none", outcome="answer"),
        m(factual_recall_heads.GAIN, v["gain"], **one),
        m(factual_recall_heads.BEYOND, v["beyond"], **one),
        m("rate", v["rate"], **one, edit="tuned", outcome="answer"),
        m("rate", v["other"], **one, edit="tuned", outcome="other"),
        m(factual_recall_heads.AGREEMENT, v["order"]),
        m(factual_recall_heads.GAIN, v["else"], heads="one", relation="continent"),
    ]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"rate": 0.52}, "partly"),
        ({"beyond": -0.2}, "partly"),  # random heads reach half of it
        ({"beyond": -0.2, "gain": 0.1}, "does not hold here"),
    ],
)
def test_the_heads_are_judged(changed: dict[str, float], verdict: str) -> None:
    assert verdict_of(factual_recall_heads.judge(Measured(heads(**changed)))) == verdict


@pytest.mark.parametrize("slug", ["subspace-patching-illusion", "context-knob", "factual-recall-heads"])
def test_they_are_registered(slug: str) -> None:
    made = recipe(slug)
    assert len(made.criterion) > 200 and set(made.quick) == set(made.full)


def test_the_prompts() -> None:
    france, italy = (next(c for c in COUNTRIES if c.name == name) for name in ("France", "Italy"))
    draw = (france, italy)
    assert prompts.prompt(draw) == (
        "The capital of France is the city of Rome. The capital of France is the city of"
    )
    assert prompts.prompt(draw, "prior").count("Answer from your memory.") == 1
    assert (prompts.answer(draw, "context"), prompts.answer(draw, "prior")) == (" Rome", " Paris")
    pair = prompts.intent_pair(draw)
    assert (pair["answer"], pair["wrong"]) == (" Paris", " Rome") and "context" in pair["corrupt"]
    plain = prompts.plain_pair(draw)
    assert plain["answer"] == " Rome" and "city of Paris." in plain["corrupt"]
    draws = prompts.wrong_contexts([france, italy], COUNTRIES, each=5, seed=1)
    assert len(set(draws)) == 10 and all(a.capital != o.capital for a, o in draws)
    assert draws == prompts.wrong_contexts([france, italy], COUNTRIES, each=5, seed=1)


def test_a_capital_of_two_tokens_is_refused() -> None:
    from tests.core.tiny import tiny

    with pytest.raises(InputError, match="not one token"):
        prompts.answer_ids(tiny(), [(COUNTRIES[0], COUNTRIES[1])], "", "context")
