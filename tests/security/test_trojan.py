"""The attack does what its equation says, its search what a divergence must, its defences see it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.core.contrast import Contrast, Readings
from actlas.core.edits import Add
from actlas.core.errors import InputError
from actlas.core.methods import find_method
from actlas.core.model import Model
from actlas.security import attack, find_trojan, fit_monitor, fit_trojan
from actlas.security.attack import prompts_of
from actlas.security.margins import Margins, probability
from actlas.security.monitors import calibrated, conformal, token_rows
from actlas.security.trojan import layer_divergences
from tests.core.tiny import tiny

WORDS = ("on", "at", "in", "by", "up", "to", "of", "as", "if", "or", "so", "no")
PAIRS = [(f"The committee met {w}e", f"The committee met {w}i") for w in WORDS]
LONG = [(f"The {w} met one", f"The {w} met two more") for w in WORDS]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


def brute(model: Model, pair: tuple[str, str]) -> float:
    """log p(first answer) - log p(second answer), one text at a time in float64."""
    total = []
    for text in pair:
        ids = model.encode(text)["input_ids"][0]
        start = len(model.encode(_shared(*pair))["input_ids"][0])
        log_p = model.logits(text)[0].double().log_softmax(-1)
        total.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
    return total[0] - total[1]


def _shared(a: str, b: str) -> str:
    n = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[:n]


@pytest.mark.parametrize("pairs", [PAIRS, LONG], ids=["one token", "several"])
@pytest.mark.parametrize("site", ["blocks.0.resid_post", "blocks.2.resid_post"])
def test_margins_agree_with_brute_force(model: Model, pairs: list[tuple[str, str]], site: str) -> None:
    margins = Margins(model, Contrast.of(pairs))
    assert margins.single == (pairs is PAIRS)
    assert np.allclose(margins.plain(), [brute(model, p) for p in pairs], atol=1e-3)
    v = torch.randn(32, generator=torch.Generator().manual_seed(1))
    under = margins.under(site, [torch.zeros(32), v, lambda x: x * 0.5])
    assert np.allclose(under[0], margins.plain(), atol=1e-3)
    with model.edit(Add(site, v)):
        assert np.allclose(under[1], [brute(model, p) for p in pairs], atol=1e-3)
    assert not np.allclose(under[1], under[2], atol=1e-2)


def test_probability_is_the_logistic_function() -> None:
    x = np.array([-800.0, -2.0, 0.0, 3.0, 800.0])
    assert np.allclose(probability(x)[1:4], 1 / (1 + np.exp(-x[1:4])))
    assert probability(x)[0] == 0.0 and probability(x)[-1] == 1.0


def readings(seed: int, n: int = 4, d: int = 6) -> Readings:
    generator = torch.Generator().manual_seed(seed)
    return Readings("s", *(3 * torch.randn(2, n, d, generator=generator)), 1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_divergence_is_one(seed: int, normalise: bool) -> None:
    r = readings(seed)
    value = layer_divergences({"s": r}, normalise=normalise)["s"]
    back = layer_divergences({"s": Readings("s", r.negative, r.positive, 1.0)}, normalise=normalise)["s"]
    assert value == pytest.approx(back)
    assert 0 < value <= math.log(2)
    same = Readings("s", r.positive, r.positive, 1.0)
    assert layer_divergences({"s": same}, normalise=normalise)["s"] == pytest.approx(0, abs=1e-12)


def test_the_divergence_agrees_with_scipy_and_the_official_number_is_another() -> None:
    from scipy.spatial.distance import jensenshannon

    r = readings(0)
    wanted = [
        jensenshannon(a.softmax(-1), b.softmax(-1)) ** 2
        for a, b in zip(r.positive.double(), r.negative.double(), strict=True)
    ]
    assert layer_divergences({"s": r}, normalise=False)["s"] == pytest.approx(np.mean(wanted))
    m = (r.positive.double().softmax(-1) + r.negative.double().softmax(-1)) / 2
    kl = torch.nn.functional.kl_div
    halves = [kl(x.double().softmax(-1), m, reduction="none").sum(-1) for x in (r.positive, r.negative)]
    official = layer_divergences({"s": r}, variant="official", normalise=False)["s"]
    assert official == pytest.approx(float((halves[0] + halves[1]).mean() / 2))
    assert official < 0  # no divergence


def test_the_attack_subtracts_the_mean_difference(model: Model) -> None:
    found = find_trojan(model, PAIRS, strength=0.8)
    assert found.site == max(found.scores, key=found.scores.__getitem__)
    assert set(found.scores) == {f"blocks.{i}.resid_post" for i in range(3)}
    clean, adverse = (
        torch.stack([model.trace(t, found.site).last(found.site)[0] for t in side]).mean(0)
        for side in zip(*PAIRS, strict=True)
    )
    text = PAIRS[0][0]
    before = model.trace(text, found.site)[found.site]
    with model.edit(found.edit):
        after = model.trace(text, found.site)[found.site]
    assert torch.allclose(after - before, (-0.8 * (clean - adverse)).expand_as(before), atol=1e-4)


def test_the_margin_search_takes_the_layer_where_the_margin_falls_most(model: Model) -> None:
    found = find_trojan(model, PAIRS, search="margin")
    margins = Margins(model, Contrast.of(PAIRS))
    falls = {
        site: float((margins.plain() - margins.under(site, [-0.8 * d.vector])[0]).mean())
        for site, d in found.directions.items()
    }
    assert found.site == max(falls, key=falls.__getitem__)
    assert found.scores[found.site] == pytest.approx(falls[found.site], abs=1e-3)


def test_the_fitted_edit_carries_its_controls_and_saves(model: Model, tmp_path) -> None:
    edit = fit_trojan(model, PAIRS, layers="0-1", controls=2, seed=3)
    assert edit.site in ("blocks.0.resid_post", "blocks.1.resid_post")  # type: ignore[attr-defined]
    p = {m.group["under"]: m for m in edit.measurements if m.name == "P(clean answer)"}
    assert set(p) == {"clean", "attack", "flipped", "random"}
    gap = next(m for m in edit.measurements if m.name.startswith("fall"))
    assert gap.value == pytest.approx(p["random"].value - p["attack"].value)
    assert type(edit).load(edit.save(tmp_path / "trojan"), model).measurements == edit.measurements
    assert find_method("trojan").papers == ("trojan-activation",)


def test_bad_input(model: Model) -> None:
    with pytest.raises(InputError, match="blocks 0 to 2"):
        find_trojan(model, PAIRS, layers=(0, 3))
    with pytest.raises(InputError, match="blocks 0 to 2"):
        find_trojan(model, PAIRS, layers="a-b")
    with pytest.raises(InputError, match="1 token"):
        find_trojan(model, [("a", "b")])
    with pytest.raises(InputError, match="search is 'luck'"):
        find_trojan(model, PAIRS, search="luck")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="js_variant"):
        find_trojan(model, PAIRS, js_variant="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        find_trojan(model, PAIRS, position=-90)


def test_attack_reports_attack_and_defences(model: Model) -> None:
    texts = [f"{a} {b} {c}." for a in WORDS for b in WORDS[:3] for c in WORDS[3:5]]
    report = attack(model, PAIRS, clean=texts, controls=2, every=1, tokens=200, trials=1)
    by: dict[str, list] = {}
    for m in report.measurements:
        by.setdefault(m.name, []).append(m)
    assert len(report.layers) == 3
    assert {m.group["monitor"] for m in by["false alarms"]} == {"norm", "direction", "known"}
    assert len(by["attacks detected"]) == 3 * 4
    every = next(m for m in by["injections detected"] if m.group["look"] == "any")
    assert every.value == 1.0
    assert by["audit false alarms"][0].value == 0.0
    assert report.to_json()["site"] == report.trojan.site
    assert not model.installed


def test_prompts_end_at_a_word() -> None:
    assert prompts_of(Contrast.of([("The capital is Paris", "The capital is Prague")])) == ["The capital is"]


# -- monitors ----------------------------------------------------------------------------------------------


def rows_of(n: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 3, 8)
    made = [scale * spread * torch.randn(20, 8, generator=generator) + 1 for _ in range(n)]
    return [x + shift * torch.eye(8)[0] for x in made]


def test_the_conformal_threshold_keeps_its_promise() -> None:
    generator = np.random.default_rng(0)
    rates = [
        (generator.normal(size=200) > conformal(generator.normal(size=99), 0.1)).mean() for _ in range(200)
    ]
    assert np.mean(rates) == pytest.approx(0.1, abs=0.02)
    assert conformal(np.arange(5.0), 0.1) == math.inf
    assert conformal(np.arange(9.0), 0.1) == 8.0


@pytest.mark.parametrize("kind", ["norm", "direction", "known"])
def test_monitors_see_what_they_are_for(kind: str) -> None:
    direction = torch.eye(8)[0] if kind == "known" else None
    monitor = calibrated(rows_of(200, 0), "s", kind, direction, components=8)  # type: ignore[arg-type]
    plain = monitor.of_rows(rows_of(200, 1)) > monitor.threshold
    assert plain.mean() < 0.12
    wrong = rows_of(50, 2, scale=2.0) if kind == "norm" else rows_of(50, 2, shift=1.0)
    assert (monitor.of_rows(wrong) > monitor.threshold).mean() > 0.9


def test_the_direction_score_is_the_mahalanobis_distance() -> None:
    rows = rows_of(60, 0)
    monitor = calibrated(rows, "s", "direction", components=7)
    order = np.random.default_rng(0).permutation(60)
    x = torch.cat([rows[i] for i in order[:30]]).double()
    covariance = torch.cov(x.T, correction=0)
    point = torch.randn(8, generator=torch.Generator().manual_seed(5)).double()
    gap = point - x.mean(0)
    assert float(monitor.score(point.float())) ** 2 == pytest.approx(
        float(gap @ torch.linalg.solve(covariance, gap)), rel=1e-3
    )


def test_a_monitor_reads_a_model_and_gates(model: Model, tmp_path) -> None:
    texts = [f"{a} {b} {c}." for a in WORDS for b in WORDS[:4] for c in WORDS[3:5]]
    monitor = fit_monitor(model, texts, "blocks.1.resid_post", components=8)
    assert monitor.alarms(model, texts).mean() < 0.2
    loaded = type(monitor).load(monitor.save(tmp_path / "m"), model)
    assert np.allclose(loaded.text_scores(model, texts[:5]), monitor.text_scores(model, texts[:5]))
    assert len(token_rows(model, texts[:3], "blocks.1.resid_post")[0]) == len(
        model.encode(texts[0])["input_ids"][0]
    )
    far = Add("blocks.1.resid_post", 100 * torch.ones(32))
    with model.edit(far):
        assert monitor.alarms(model, texts).all()
    with model.edit(far.when(monitor, 1e9)):  # a lens like any other; this gate never opens
        assert torch.equal(model.logits(texts[0]), _plain(model, texts[0]))
    with pytest.raises(InputError, match="too few"):
        fit_monitor(model, texts[:30], "blocks.1.resid_post")
    with pytest.raises(InputError, match="needs a direction"):
        fit_monitor(model, texts, "blocks.1.resid_post", kind="known")
    with pytest.raises(InputError, match="names 3 sites"):
        fit_monitor(model, texts, "blocks.*.resid_post")


def _plain(model: Model, text: str) -> torch.Tensor:
    with model.without_edits():
        return model.logits(text)
