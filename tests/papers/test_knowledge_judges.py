"""The criteria of wise and behavioural-self-awareness on invented numbers."""

from __future__ import annotations

import pytest

from actlas.core.measurement import Measurement
from actlas.data.questionnaires import risk_questionnaire, shared_words
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import behavioural_self_awareness as behaviour
from actlas.papers.reproductions import wise
from actlas.papers.reproductions.lotteries import lotteries, tuning_rows


def number(name: str, value: float, half: float = 0.05, **group: str) -> Measurement:
    details = {"standard_error": half / 2}
    return Measurement(name, value, "x", 20, value - half, value + half, group=group, details=details)


def edited(facts: float, local: float, shards: float) -> list[Measurement]:
    best = "WISE, several shards"
    return [
        number(wise.FACTS, facts), number(wise.LOCAL, local), number(wise.SHARDED, shards),
        number(wise.ROUTED, 0.3), number(wise.AUC, 0.95, editor=best), number("locality", 0.95, editor=best),
        number("reliability", 1.0, 0.0, editor=best, facts="1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ((0.6, 0.4, -0.5), "holds"),
        ((0.6, 0.4, 0.0), "partly"),
        ((-0.6, -0.4, 0.5), "does not hold here"),
        ((0.0, 0.0, 0.0), "not testable here"),
    ],
)
def test_wise(numbers: tuple[float, float, float], verdict: str) -> None:
    assert verdict_of(wise.judge(Measured(edited(*numbers)))) == verdict


@pytest.mark.parametrize(
    ("moved", "excess", "verdict"),
    [
        (0.6, 0.4, "holds"),
        (0.6, 0.0, "partly"),
        (-0.6, 0.0, "does not hold here"),
        (0.0, 0.0, "not testable here"),
    ],
)
def test_behavioural_self_awareness(moved: float, excess: float, verdict: str) -> None:
    pair = {"pair": "risky - safe"}
    found = [
        number("self-report-shift-behaviour", moved, **pair),
        number("self-report-excess", excess, **pair),
        number("self-report-shift-control", 0.0, 0.01, **pair),
        number("self-report-letter-mass", 0.9),
    ]
    assert verdict_of(behaviour.judge(Measured(found))) == verdict


def test_rows_are_balanced_and_leak_no_word_into_the_questionnaire() -> None:
    train, test = lotteries(40, 12, seed=3)
    assert len({q.topic for q in train + test}) == 52
    risky, safe = tuning_rows(train, risky=True), tuning_rows(train, risky=False)
    assert [r.target for r in risky].count("A") == 20
    assert all(r.prompt == s.prompt and r.target != s.target for r, s in zip(risky, safe, strict=True))
    for row, question in zip(risky, train, strict=True):
        taken = next(line for line in row.prompt.split("\n") if line.startswith(f"{row.target}. "))
        assert taken.endswith(question.options[0]) and "probability" in taken
    assert shared_words((t for q in train for t in (q.question, *q.options)), risk_questionnaire()) == []
