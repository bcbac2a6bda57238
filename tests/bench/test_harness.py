"""The benchmark harness: processes of their own, taking turns; medians of ratios; verdicts."""

from __future__ import annotations

import json

import pytest

from bench import harness
from bench.harness import Figure, fresh, interleave, ratio, report

TOY = "tests.bench.toy_benchmark"


def test_variants_warm_up_once_and_take_turns() -> None:
    samples, unavailable = interleave(TOY, ["counting", "missing", "timed"], rounds=3)
    assert samples["counting"]["calls"] == [2, 3, 4]  # the first step is not recorded
    assert unavailable == {"missing": "a library is not installed"}
    assert len(samples["timed"]["seconds"]) == len(samples["timed"]["cpu"]) == 3
    assert min(samples["timed"]["seconds"]) > 0


def test_short_variants_may_do_several_steps_in_a_turn() -> None:
    samples, _ = interleave(TOY, ["counting"], rounds=2, steps={"counting": 3})
    assert samples["counting"]["calls"] == [3, 6]  # the means of 2, 3, 4 and of 5, 6, 7


def test_fresh_runs_one_step_without_warming_up() -> None:
    assert fresh(TOY, "counting") == {"calls": 1}


def test_ratio_is_the_median_within_rounds() -> None:
    mine = {"seconds": [2.0, 9.0, 1.0], "cpu": [1.0, 1.0, 1.0]}
    base = {"seconds": [1.0, 3.0, 1.0], "cpu": [2.0, 2.0, 4.0]}
    figure = ratio("a", mine, base, most=2.0)
    assert figure.measured == pytest.approx(2.0)
    assert figure.samples == pytest.approx([2.0, 3.0, 1.0])
    assert figure.note == "rounds 1 to 3 x; processor time 0.5 x"


@pytest.mark.parametrize(
    ("measured", "most", "verdict"),
    [(1.0, 1.0, "met"), (1.1, 1.0, "MISSED"), (None, 1.0, "not measured"), (3.0, None, "")],
)
def test_verdicts(measured: float | None, most: float | None, verdict: str) -> None:
    assert Figure("a", measured, "x", most).verdict == verdict


def test_report_tells_a_missed_target_and_stores_the_environment(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    figures = [Figure("quick", 1.0, "s", 2.0), Figure("slow", 3.0, "s", 2.0)]
    assert not report("toy", "A toy", figures)
    assert report("toy", "A toy", figures[:1])
    assert "MISSED" in capsys.readouterr().out
    stored = json.loads((tmp_path / "toy.json").read_text())
    assert stored["figures"][0]["verdict"] == "met"
    assert stored["environment"]["versions"]["torch"]
