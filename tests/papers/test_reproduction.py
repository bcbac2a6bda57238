"""The machinery: checks, verdicts, records, storing."""

import json
import math

import pytest

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.papers import reproduction as room
from actlas.papers.reproduction import (
    Check,
    Findings,
    Measured,
    Plot,
    Reproduction,
    reproduce,
    reproduction,
    verdict_of,
)


def number(value, low=None, high=None, name="x", **group):
    return Measurement(name, value, "fraction", 10, low, high, group=group)


@pytest.mark.parametrize(
    ("value", "low", "high", "above", "below"),
    [
        (0.5, 0.4, 0.6, True, False),
        (0.1, 0.05, 0.2, False, True),
        (0.3, 0.2, 0.4, None, None),
        (0.5, None, None, True, False),
        (math.nan, None, None, None, None),
    ],
)
def test_a_check_asks_on_which_side_the_whole_interval_lies(value, low, high, above, below):
    m = number(value, low, high)
    assert Check.above("q", m, 0.3).passed is above
    assert Check.below("q", m, 0.3).passed is below


def test_what_was_not_measured_leaves_a_check_open():
    assert Check.above("q", None, 0.0).passed is None


def checks(*outcomes):
    return [Check(str(i), passed, "", central) for i, (passed, central) in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([(True, True), (True, False)], "holds"),
        ([(True, True), (False, False)], "partly"),
        ([(True, True), (None, False)], "partly"),
        ([(True, True), (False, True)], "partly"),
        ([(True, True), (None, True)], "partly"),
        ([(False, True), (True, False)], "does not hold here"),
        ([(False, True), (None, True)], "does not hold here"),
        ([(None, True), (True, False)], "not testable here"),
    ],
)
def test_the_verdict_rule(outcomes, verdict):
    assert verdict_of(checks(*outcomes)) == verdict


def test_a_criterion_without_a_central_check_decides_nothing():
    with pytest.raises(InputError, match="central"):
        verdict_of(checks((True, False)))


def test_looking_up_measurements():
    m = Measured(
        [number(1.0, name="loss", mode="a"), number(2.0, name="loss", mode="b"), number(3.0, name="only")]
    )
    assert m.get("loss", mode="b").value == 2.0
    assert m["only"].value == 3.0
    assert m.get("loss", mode="c") is None
    assert len(m.every("loss")) == 2
    with pytest.raises(InputError, match="2 measurements"):
        m.get("loss")
    with pytest.raises(InputError, match="did you mean only"):
        m["onlly"]


def judge(m):
    """Holds if x is above 0.5."""
    return [Check.above("x is large", m["x"], 0.5, central=True)]


@pytest.fixture
def recipe(monkeypatch):
    """A tiny reproduction in the place of `void`'s."""
    monkeypatch.setattr(room, "_recipes", dict(room._recipes))
    monkeypatch.setattr(room.importlib, "import_module", lambda name: None)

    @reproduction("void", claim="x is large.", judge=judge, quick={"value": 0.9}, full={"value": 0.1})
    def run(*, seed, value):
        plot = Plot("x by y", [{"x": 1, "y": value}, {"x": 2, "y": 0.4}], "x", "y")
        control = number(0.5, name="control")
        measured = [
            Measurement("x", value, "fraction", 3, value - 0.05, value + 0.05, seed=seed, baseline=control)
        ]
        return Findings(measured, f"x is {value}", "Published: 1. Ours: another.", [plot])

    return run


def test_quick_and_full_mode_and_the_record(recipe):
    quick, full = reproduce("void", seed=3), reproduce("void", quick=False)
    assert (quick.verdict, full.verdict) == ("holds", "does not hold here")
    assert quick.command == "actlas reproduce void --quick --seed 3"
    assert quick.criterion == "Holds if x is above 0.5." and quick.claim == "x is large."
    assert quick.environment["python"] and quick.seconds >= 0
    again = Reproduction.from_json(json.loads(json.dumps(quick.to_json(), allow_nan=False)))
    assert again == quick
    text = str(quick)
    for word in ("claim", "criterion", "holds", "Published", "control: 0.5", "seed 3"):
        assert word in text
    page = quick.to_markdown()
    assert page.startswith("# Void in Language Models") and "**holds**" in page and "| x | 0.9 |" in page


def test_settings_shrink_a_run_but_cannot_be_stored(recipe):
    assert reproduce("void", settings={"value": 0.2}).verdict == "does not hold here"
    with pytest.raises(InputError, match="no setting 'valu'; did you mean value"):
        reproduce("void", settings={"valu": 1})
    with pytest.raises(InputError, match="cannot be stored"):
        reproduce("void", settings={"value": 1}, store=True)


def test_a_stored_result_is_found_again(recipe, tmp_path, monkeypatch):
    from actlas.papers import catalogue

    monkeypatch.setattr(room, "RESULTS", tmp_path)
    monkeypatch.setattr(catalogue, "RESULTS", tmp_path)
    catalogue.forget_stored()
    try:
        assert room.stored("void") is None and catalogue.paper("void").result == ""
        made = reproduce("void", store=True)
        assert room.stored("void") == made
        assert made.command == "actlas reproduce void --quick --seed 0 --store"
        assert catalogue.paper("void").result == "holds: x is 0.9"
    finally:
        monkeypatch.undo()
        catalogue.forget_stored()


def test_a_recipe_must_be_written_down():
    def silent(m):
        return []

    with pytest.raises(InputError, match="docstring"):
        reproduction("void", claim="", judge=silent, quick={}, full={})
    with pytest.raises(InputError, match="differ in \\['b'\\]"):
        reproduction("void", claim="", judge=judge, quick={"a": 1}, full={"a": 1, "b": 2})
    with pytest.raises(InputError, match="did you mean void"):
        reproduction("viod", claim="", judge=judge, quick={}, full={})
