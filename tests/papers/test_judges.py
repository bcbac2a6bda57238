"""Every criterion on invented numbers: each verdict that it can give, and what decides it."""

import pytest

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, recipe, verdict_of


def m(name, value, low=None, high=None, *, details=None, baseline=None, **group):
    return Measurement(name, value, "", 10, low, high, group=group, details=details or {}, baseline=baseline)


def replaced(measured, name, new, **group):
    """The list with the measurements of this name and group replaced."""
    kept = [
        x for x in measured if not (x.name == name and all(x.group.get(k) == v for k, v in group.items()))
    ]
    assert len(kept) < len(measured), f"nothing called {name}"
    return [*kept, *new]


def judged(slug, measured):
    checks = recipe(slug).judge(Measured(measured))
    return verdict_of(checks), {c.name: c.passed for c in checks}


def test_every_criterion_is_written_down():
    for slug in (
        "model-cards",
        "hf-model-reuse",
        "fast-model-scaling",
        "void",
        "sparsing-law",
        "hash-encoders",
    ):
        made = recipe(slug)
        assert len(made.criterion) > 100 and made.claim.endswith(".")


# model-cards

CARDS = [
    m("planted cell named", 1.0, 0.6, 1.0),
    m("a gap flagged, cells shuffled", 0.05, 0.02, 0.1),
    m("that cell named without planting", 0.0, 0.0, 0.4),
    m("overall accuracy lost", 0.01, 0.005, 0.015),
    m("cell error over overall error", 9.0, 7.0, 11.0),
    m("identities broken", 0),
    m("interval coverage", 0.95, interval="wilson"),
    m("extra cost of the edit on prose over code", 0.3, 0.2, 0.4),
]


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("identities broken", m("identities broken", 0), "holds"),
        ("planted cell named", m("planted cell named", 0.8, 0.4, 0.95), "partly"),
        ("a gap flagged, cells shuffled", m("a gap flagged, cells shuffled", 0.3, 0.2, 0.4), "partly"),
        ("that cell named without planting", m("that cell named without planting", 0.4), "partly"),
        ("overall accuracy lost", m("overall accuracy lost", 0.05, 0.03, 0.07), "partly"),
        ("identities broken", m("identities broken", 1), "partly"),
        ("interval coverage", m("interval coverage", 0.9, interval="wilson"), "partly"),
        ("extra cost of the edit on prose over code", m("other", 0), "partly"),
    ],
)
def test_model_cards(name, value, verdict):
    assert judged("model-cards", replaced(CARDS, name, [value]))[0] == verdict


def test_model_cards_fails_if_the_planted_cell_is_missed_and_alarms_are_false():
    bad = replaced(CARDS, "planted cell named", [m("planted cell named", 0.2)])
    bad = replaced(bad, "a gap flagged, cells shuffled", [m("a gap flagged, cells shuffled", 0.5, 0.4, 0.6)])
    assert judged("model-cards", bad)[0] == "does not hold here"


# hf-model-reuse

REUSE = [
    m("section precision", 1.0, 0.97, 1.0),
    m("section recall", 0.97, 0.93, 0.99),
    m("greatest score of an unfilled template", 0.0),
    m("Spearman, greatest error", 0.0),
    m("Mann-Kendall, greatest error", 1e-14),
    m("p-value, greatest error", 0.03),
    m("flat series called a trend", 0.05, 0.03, 0.07),
    m("completeness", 0.3, source="package", package="a", text="README"),
    m("completeness", 0.0, source="package", package="a", text="description"),
    m("completeness", 0.1, source="package", package="b", text="description"),
    m("completeness", 1.0, source="actlas card", model="minilm", fill="filled in"),
]


def test_hf_model_reuse_is_at_most_partly_because_the_survey_cannot_be_rerun():
    verdict, checks = judged("hf-model-reuse", REUSE)
    assert verdict == "partly"
    assert all(passed for name, passed in checks.items() if not name.startswith("the survey"))


def test_hf_model_reuse_does_not_hold_where_packages_are_documented():
    full = replaced(
        REUSE, "completeness", [m("completeness", 0.8, source="package", package="a", text="README")]
    )
    assert judged("hf-model-reuse", full)[0] == "does not hold here"


@pytest.mark.parametrize(
    "broken",
    [
        m("section recall", 0.9),
        m("section precision", 0.9),
        m("greatest score of an unfilled template", 0.1),
    ],
)
def test_hf_model_reuse_is_not_testable_with_an_unfit_detector(broken):
    assert judged("hf-model-reuse", replaced(REUSE, broken.name, [broken]))[0] == "not testable here"


def test_hf_model_reuse_counts_the_better_text_of_a_package():
    two = [
        *replaced(REUSE, "completeness", [], source="package"),
        m("completeness", 0.6, source="package", package="a", text="README"),
        m("completeness", 0.0, source="package", package="a", text="description"),
    ]
    assert judged("hf-model-reuse", two)[0] == "does not hold here"


# fast-model-scaling


def scaling(activations=0.6, exact=0.6, fast=0.010, slow=0.020, by_activations=0.6, by_work=0.5):
    return [
        m("exponent of activations", exact, details={"law": 0.6}, strategy="dWr", sizes="exact"),
        m("exponent of activations", activations, details={"law": 0.6}, strategy="dWr", sizes="whole"),
        m("exponent of parameters", 0.9, details={"law": 0.9}, strategy="dWr", sizes="exact"),
        m("exponent of parameters", 0.93, details={"law": 0.9}, strategy="dWr", sizes="whole"),
        m("forward-time", fast, fast - 0.001, fast + 0.001, network="dWr"),
        m("forward-time", slow, slow - 0.001, slow + 0.001, network="d"),
        m("forward-time", slow, slow - 0.001, slow + 0.001, network="r"),
        m("correlation of activation-elements with time", by_activations),
        m("correlation of multiply-adds with time", by_work),
        m("exponent of activations, EfficientNet-Lite 0 to 2", 0.81),
    ]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"exact": 0.61}, "partly"),
        ({"activations": 0.75}, "partly"),
        ({"slow": 0.0105}, "partly"),
        ({"by_work": 0.7}, "partly"),
        ({"activations": 0.9, "fast": 0.03, "by_work": 0.9}, "does not hold here"),
    ],
)
def test_fast_model_scaling(changed, verdict):
    assert judged("fast-model-scaling", scaling(**changed))[0] == verdict


@pytest.mark.parametrize(
    ("low", "high", "passed"), [(-0.005, 0.01, True), (-0.03, -0.02, False), (-0.02, 0.0, None)]
)
def test_fast_model_scaling_asks_for_equal_accuracy_in_full_mode(low, high, passed):
    found = judged("fast-model-scaling", [*scaling(), m("accuracy of dWr minus dwr", 0.0, low, high)])[1]
    assert found["dWr costs at most 1 point of accuracy against dwr"] is passed


# void


def void(distance=(0.05, 0.04, 0.06), gaps=((1.0, 0.5), (2.0, 1.5)), skip=1.05, accuracy=(0.0, -0.1, 0.1)):
    halves = m("profile-distance", 0.02, 0.01, 0.03)
    extra = "extra loss of random skipping over true skipping"
    return [
        m("profile-distance", *distance, baseline=halves),
        *(m(extra, v, low, v + 1, alpha=str(i)) for i, (v, low) in enumerate(gaps)),
        m("void-perplexity", skip, details={"usage": 0.7}, mode="skip", alpha="0.1"),
        m("void-perplexity", 1.05, details={"usage": 0.8}, mode="readout", alpha="0.1"),
        m("change of accuracy", *accuracy, mode="skip"),
    ]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"skip": 5.0}, "partly"),
        ({"accuracy": (-0.5, -0.6, -0.4)}, "partly"),
        ({"distance": (0.025, 0.02, 0.03)}, "partly"),
        ({"gaps": ((1.0, 0.5), (0.1, -0.2))}, "partly"),
        ({"gaps": ((0.0, -0.5), (0.1, -0.2))}, "partly"),
        ({"distance": (0.01, 0.005, 0.02), "gaps": ((0.0, -0.5),)}, "does not hold here"),
        ({"distance": (0.025, 0.02, 0.03), "gaps": ()}, "not testable here"),
    ],
)
def test_void(changed, verdict):
    assert judged("void", void(**changed))[0] == verdict


def test_void_random_skipping_that_is_as_good_falsifies_the_causal_claim():
    checks = judged("void", void(gaps=((0.0, -0.5), (0.1, -0.2))))[1]
    assert checks["true skipping beats random skipping"] is False
    assert checks["prompt and response use different layers"] is True


# sparsing-law


def rule(name, low, high, off=0.0):
    middle = (low + high) / 2
    return m(
        "extra loss over CETT", middle, low, high, details={"ratio_difference": off}, rule=name, ratio="0.3"
    )


def law(activation, first, last, data=100.0):
    name = "activation ratio at +1% perplexity"
    return [
        m(name, first, first - 0.02, first + 0.02, details={"data": 1.0}, activation=activation),
        m(name, last, last - 0.02, last + 0.02, details={"data": data}, activation=activation),
        m("variance explained by the law", 0.95, activation=activation),
    ]


RULES = [rule("topk", 0.5, 0.7), rule("fat", 0.1, 0.3), rule("random", 5.0, 6.0)]


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ([*RULES, *law("relu", 0.5, 0.2), *law("silu", 0.4, 0.45)], "holds"),
        ([*RULES, *law("relu", 0.5, 0.2), *law("silu", 0.5, 0.2)], "partly"),
        ([*RULES, *law("relu", 0.2, 0.5), *law("silu", 0.4, 0.45)], "partly"),
        (RULES, "partly"),
        ([rule("topk", -0.7, -0.5), rule("fat", -0.3, -0.1), rule("random", 5, 6)], "does not hold here"),
        ([rule("topk", 0.5, 0.7, 0.1), rule("fat", 0.1, 0.3, 0.1)], "not testable here"),
    ],
)
def test_sparsing_law(measured, verdict):
    assert judged("sparsing-law", measured)[0] == verdict


@pytest.mark.parametrize(
    ("first", "last", "data", "passed"),
    [(0.5, 0.2, 100, True), (0.2, 0.5, 100, False), (0.3, 0.29, 100, None), (0.5, 0.2, 5, None)],
)
def test_sparsing_law_wants_a_fall_over_ten_times_the_data(first, last, data, passed):
    checks = judged("sparsing-law", [*RULES, *law("relu", first, last, data)])[1]
    assert checks["the ratio of ReLU models falls with training"] is passed


# hash-encoders


def codes(
    widths=((4, 0.9), (16, 0.3), (64, 0.001)), gap=(0.02, 0.01, 0.03), times=((0, 0.4), (40, 0.2)), same=0.5
):
    name = "redundancy of codes"
    close = 0.0005
    chance = m("same-token-by-chance", 0.01)
    return [
        *(m(name, v, v - close, v + close, sweep="width", width=str(w), inputs="train") for w, v in widths),
        *(m(name, v, v - close, v + close, sweep="epochs", epochs=str(e), inputs="train") for e, v in times),
        m(name, 0.3, 0.29, 0.31, sweep="samples", inputs="test", end="few"),
        m(name, 0.2, 0.19, 0.21, sweep="samples", inputs="test", end="many"),
        m(name, 0.3, sweep="arms", arm="plain", inputs="train"),
        m(name, 0.8, sweep="arms", arm="half the width", inputs="train"),
        m(name, 0.25, sweep="arms", arm="weight decay", inputs="train"),
        m(name, 0.35, sweep="arms", arm="label noise", inputs="train"),
        m("network minus K-NN on codes", *gap),
        m("code-neighbour-same-token", same, same - 0.05, same + 0.05, baseline=chance),
        m("code-redundancy", 0.01, 0.005, 0.015),
    ]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"times": ((0, 0.2), (3, 0.4), (40, 0.3))}, "partly"),
        ({"same": 0.02}, "partly"),
        ({"gap": (0.3, 0.25, 0.35)}, "partly"),
        ({"widths": ((4, 0.3), (16, 0.9), (64, 0.001))}, "partly"),
        ({"widths": ((4, 0.3), (16, 0.9), (64, 0.5)), "gap": (0.3, 0.25, 0.35)}, "does not hold here"),
    ],
)
def test_hash_encoders(changed, verdict):
    assert judged("hash-encoders", codes(**changed))[0] == verdict
