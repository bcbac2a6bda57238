"""The criteria of neurofeedback, los-net and code-authorship on invented numbers, and their data."""

from __future__ import annotations

import numpy as np
import pytest

from actlas.core.measurement import Measurement
from actlas.data.facts_table import COUNTRIES
from actlas.papers.reproduction import Check, Measured, recipe, verdict_of
from actlas.papers.reproductions.code_authorship import _dedent, _headers
from actlas.papers.reproductions.los_net_facts import CURRENCY, facts
from actlas.papers.reproductions.neurofeedback import sentences
from tests.measure.small_models import llama


def m(name: str, value: float, low: float, high: float, **group: str) -> Measurement:
    return Measurement(name, value, "", 10, low, high, group=group, details={"chance": 0.2})


def judged(slug: str, measured: list[Measurement]) -> tuple[str, dict[str, Check]]:
    checks = recipe(slug).judge(Measured(measured))
    return verdict_of(checks), {c.name: c for c in checks}


def with_value(measured: list[Measurement], name: str, low: float, high: float) -> list[Measurement]:
    assert any(x.name == name for x in measured)
    return [m(name, (low + high) / 2, low, high, **x.group) if x.name == name else x for x in measured]


LATE = {"axis": "means", "examples": "late"}
FEEDBACK = [
    m("report AUC", 0.9, 0.8, 1.0, **LATE),
    m("report accuracy", 0.7, 0.6, 0.8, **LATE),
    m("report AUC above the shuffled axis", 0.3, 0.1, 0.5, **LATE),
    m("report AUC below the semantic axis", 0.3, 0.1, 0.5, axis="pc32", examples="late"),
    m("explicit control above components", 0.8, 0.2, 1.4, axis="means"),
    m("implicit control", 0.3, 0.1, 0.5, axis="means"),
]
SIGNATURES = [
    x
    for task in ("hallucination", "membership")
    for x in (
        m("AUC above the best hand-made score", 0.05, 0.01, 0.1, task=task),
        m("output-probe AUC", 0.8, 0.7, 0.9, task=task, detector="los-net"),
        m("AUC above the number of rows", 0.3, 0.2, 0.4, task=task),
        m("AUC above shuffled labels", 0.3, 0.2, 0.4, task=task),
    )
] + [m("transfer AUC", 0.7, 0.6, 0.8)]
TFIDF = {"features": "tfidf", "text": "whole"}
AUTHORS = [
    m("authorship accuracy", 0.6, 0.5, 0.7, **TFIDF),
    m("authorship accuracy above shuffled authors", 0.4, 0.3, 0.5, **TFIDF),
    m("authorship accuracy above length only", 0.3, 0.2, 0.4, **TFIDF),
    m("random split above grouped split", 0.1, 0.05, 0.15, **TFIDF),
    m("loss without comments", 0.1, 0.05, 0.15),
    m("unseen authors told by confidence", 0.7, 0.6, 0.8),
]


@pytest.mark.parametrize(
    ("slug", "measured", "central", "side"),
    [
        (
            "neurofeedback",
            FEEDBACK,
            ("report AUC", "report AUC above the shuffled axis", "explicit control above components"),
            "implicit control",
        ),
        ("los-net", SIGNATURES, ("AUC above the best hand-made score",), "transfer AUC"),
        (
            "code-authorship",
            AUTHORS,
            (
                "authorship accuracy",
                "authorship accuracy above shuffled authors",
                "authorship accuracy above length only",
            ),
            "loss without comments",
        ),
    ],
)
def test_every_verdict_can_come_out(
    slug: str, measured: list[Measurement], central: tuple[str, ...], side: str
) -> None:
    assert judged(slug, measured)[0] == "holds"
    assert judged(slug, with_value(measured, side, -0.4, -0.1))[0] == "partly"
    lost, open_ = measured, measured
    for name in central:
        lost, open_ = with_value(lost, name, -0.4, -0.1), with_value(open_, name, -0.4, 0.95)
    assert judged(slug, lost)[0] == "does not hold here"
    assert judged(slug, open_)[0] == "not testable here"
    assert judged(slug, [x for x in measured if x.name == side])[0] == "not testable here"


def test_facts_name_countries_of_the_table() -> None:
    names = {c.name for c in COUNTRIES}
    assert set(CURRENCY) <= names and len(CURRENCY) > 60
    made = facts()
    assert len({f.prompt for f in made}) == len(made) == 2 * len(COUNTRIES) + len(CURRENCY)
    fact = next(f for f in made if f.country == "Japan" and f.relation == "currency")
    assert fact.right(" yen, of course") and not fact.right(" dollar")


def test_sentences_are_balanced_pairs() -> None:
    made = sentences(48)
    assert len(made) == 48 and len({t for pair in made for t in pair}) == 96
    assert made[:48] == sentences(72)[:48] and len(sentences(72)) == 72


def test_headers_of_the_standard_library_have_bodies_of_people() -> None:
    found = _headers(llama(), 5, 60, seed=1)
    assert len(found) == 5
    for head, body in found:
        assert head.startswith("def ") and head.endswith(":\n") and "\n" not in head.strip()
        assert body.startswith("    ") and not body.startswith("        ")
    assert _dedent("        a\n            b", "    def f():") == "    a\n        b"
    assert np.all([len(b.strip()) > 20 for _, b in found])
