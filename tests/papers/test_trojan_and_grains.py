"""The criteria of trojan-activation and grains on invented numbers."""

import pytest

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, recipe, verdict_of
from actlas.papers.reproductions.grains import FLIPPED, MAIN, MEAN, RANDOM, TOKENS
from actlas.papers.reproductions.trojan_activation import FALL, JS, MARGIN, RANK, RATIO


def m(name, value, low=None, high=None, **group):
    return Measurement(name, value, "", 10, low, high, group=group)


def judged(slug, measured):
    checks = recipe(slug).judge(Measured(measured))
    return verdict_of(checks), {c.name: c.passed for c in checks}


FREE = {"form": "free", "strength": "0.8"}
TROJAN = [
    m(FALL, 0.3, 0.2, 0.4, choice=JS, **FREE),
    m(FALL, 0.5, 0.4, 0.6, choice=JS, form="free", strength="1.6"),
    m(FALL, 0.4, 0.3, 0.5, choice=MARGIN, **FREE),
    m(FALL, 0.2, 0.1, 0.3, choice=JS, form="letters", strength="0.8"),
    m(RANK, 0.1, choice=JS),
    m("flipped minus attack", 0.3, 0.2, 0.4, choice=MARGIN, **FREE),
    m(RATIO, 1.02, 1.0, 1.04, under="attack"),
    m("injections detected", 1.0, 0.8, 1.0, look="any", way="all"),
    m("injections detected", 1.0, 0.8, 1.0, look="re-execution", way="all but triggers and weights"),
    m("audit false alarms", 0.0, 0.0, 0.3),
    m("cosine of the vector found with the one injected", 1.0, 1.0, 1.0),
    m(
        "detected minus false alarms",
        0.8,
        0.6,
        0.9,
        monitor="direction",
        calibrated="prompts",
        strength="0.8",
    ),
]


def changed(measured, new):
    kept = [x for x in measured if (x.name, dict(x.group)) != (new.name, dict(new.group))]
    assert len(kept) == len(measured) - 1
    return [*kept, new]


def test_trojan_holds_only_if_all_of_it_does():
    assert judged("trojan-activation", TROJAN)[0] == "holds"
    for new, verdict in (
        (m(FALL, 0.3, -0.1, 0.4, choice=JS, **FREE), "partly"),
        (m(RANK, 0.9, choice=JS), "partly"),
        (m(RANK, 0.5, choice=JS), "partly"),
        (m(RATIO, 1.3, 1.2, 1.4, under="attack"), "partly"),
        (m("injections detected", 0.9, 0.7, 1.0, look="any", way="all"), "partly"),
        (m("audit false alarms", 0.1, 0.0, 0.4), "partly"),
    ):
        assert judged("trojan-activation", changed(TROJAN, new))[0] == verdict


def test_trojan_fails_with_a_random_effect_at_a_bad_layer():
    failing = changed(TROJAN, m(FALL, -0.1, -0.2, -0.05, choice=JS, **FREE))
    assert judged("trojan-activation", changed(failing, m(RANK, 1.0, choice=JS)))[0] == "does not hold here"
    undecided = changed(TROJAN, m(FALL, 0.0, -0.2, 0.2, choice=JS, **FREE))
    assert judged("trojan-activation", changed(undecided, m(RANK, 0.5, choice=JS)))[0] == "not testable here"


GAP = "margin gained, GrAInS minus control"
GRAINS = [
    m(GAP, 0.5, 0.3, 0.7, control=TOKENS, site=MAIN),
    m(GAP, 0.5, 0.3, 0.7, control=RANDOM, site=MAIN),
    m(GAP, 0.1, -0.1, 0.3, control=MEAN, site=MAIN),
    m(GAP, 0.9, 0.7, 1.1, control=FLIPPED, site=MAIN),
    m("completeness error", 0.01, 0.005, 0.015, steps="64", baseline="mean"),
    m("country among the top 3", 0.9, 0.8, 0.95),
    m("country among the top 3, minus chance", 0.5, 0.4, 0.6),
]


@pytest.mark.parametrize(
    ("new", "verdict", "check", "passed"),
    [
        (m(GAP, 0.0, -0.2, 0.2, control=TOKENS, site=MAIN), "partly", "beats erasing random tokens", None),
        (
            m(GAP, -0.5, -0.7, -0.3, control=MEAN, site=MAIN),
            "partly",
            "no less than the mean difference",
            False,
        ),
        (
            m(GAP, -0.1, -0.3, 0.1, control=MEAN, site=MAIN),
            "partly",
            "no less than the mean difference",
            None,
        ),
        (
            m("completeness error", 0.5, 0.3, 0.7, steps="64", baseline="mean"),
            "partly",
            "attributions add up at 64 steps",
            False,
        ),
    ],
)
def test_grains_needs_every_check(new, verdict, check, passed):
    assert judged("grains", GRAINS)[0] == "holds"
    found, checks = judged("grains", changed(GRAINS, new))
    assert found == verdict and checks[check] is passed


def test_grains_fails_where_random_tokens_do_as_well():
    bad = changed(GRAINS, m(GAP, -0.5, -0.7, -0.3, control=TOKENS, site=MAIN))
    assert judged("grains", changed(bad, m(GAP, -0.1, -0.2, -0.05, control=RANDOM, site=MAIN)))[0] == (
        "does not hold here"
    )
