"""The judges of uncurl, moetuner, home and blockffn on invented numbers, and what their runs are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actlas.core.measurement import Measurement
from actlas.measure.routing import RoutingTrace
from actlas.papers.reproduction import Measured, reproduce, verdict_of
from actlas.papers.reproductions import blockffn, byte_mixtral, home, moetuner, uncurl


def m(name: str, value: float, half: float = 0.001, **group: str) -> Measurement:
    return Measurement(name, value, "", 50, value - half, value + half, group=group)


def merged(random: float = -0.01, usage: float = -0.01, align: float = -0.01) -> Measured:
    after = {"experts": "8", "tuned": "yes"}
    return Measured(
        [
            m("loss over", random, arm=uncurl.RANDOM, **after),
            m("loss over", 1.0, arm=uncurl.RANDOM, experts="4", tuned="no"),
            m("loss over", usage, arm=uncurl.USAGE, **after),
            m("loss over", align, arm=uncurl.UNALIGNED, experts="8", tuned="no"),
            m("loss over", -0.01, arm=uncurl.SCRATCH, **after),
            m("loss of 4 over 8 experts", 0.1),
        ]
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"align": 0.01}, "partly"),
        ({"usage": 0.0}, "partly"),
        ({"usage": 0.01, "random": 0.01}, "does not hold here"),
        ({"usage": 0.0, "random": 0.0}, "not testable here"),
    ],
)
def test_merging_must_beat_random_merging_and_pruning(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(uncurl.judge(merged(**given))) == verdict


def placed(latency: float = 0.9, load: float = 0.8, drift: float = 0.9) -> Measured:
    found = [m("tail load ratio after drift", drift)]
    for links in moetuner.SLOW:
        for metric in moetuner.METRICS:
            for over in (moetuner.BEST, moetuner.USUAL, moetuner.LOAD):
                value = {"latency": latency, "tail load": load}.get(metric, 0.7)
                found.append(m("ratio", value, metric=metric, over=over, links=links))
    return Measured(found)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"drift": 1.1}, "partly"),
        ({"latency": 1.02}, "partly"),
        ({"latency": 1.02, "load": 1.02}, "does not hold here"),
    ],
)
def test_placement_must_beat_the_best_random_one(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(moetuner.judge(placed(**given))) == verdict


def cured(spread: float = -2.0, own: float = 0.5, zeros: float = 0.0, auc: float = 0.0) -> Measured:
    return Measured(
        [
            m("log dispersion", spread, over="PLE"),
            m("own share", own, over="PLE"),
            m("own share", own, over="HoME without self gates"),
            m("zero rate", zeros, arm="HoME"),
            m("zero rate", 0.5, arm="PLE"),
            m("zero rate", 0.5, arm="HoME without norm and Swish"),
            m("AUC gain", auc, over="PLE"),
        ]
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"auc": -0.1}, "partly"),
        ({"zeros": 0.2}, "partly"),
        ({"own": -0.2}, "partly"),
        ({"own": -0.2, "spread": 0.2}, "does not hold here"),
    ],
)
def test_home_must_cure_both(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(home.judge(cured(**given))) == verdict


def chunked(over_l1: float = 0.2, over_topk: float = 0.2, tokens: float = 0.0, loss: float = 0.0) -> Measured:
    found = [m("loss over", loss, over=blockffn.TOPK)]
    for arm, gain in ((blockffn.TOPK, over_topk), (blockffn.L1, over_l1)):
        found += [m("chunk-level sparsity gain", gain, over=arm), m("locality gain", 0.1, over=arm)]
        found.append(m("token-level sparsity gain", tokens, over=arm))
    return Measured(found)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"over_topk": 0.1}, "partly"),
        ({"loss": 0.1}, "partly"),
        ({"tokens": 0.1}, "partly"),  # sparser tokens alone make sparser chunks: left open
        ({"over_topk": 0.1, "over_l1": -0.1}, "does not hold here"),
    ],
)
def test_chunks_must_be_sparser_at_equal_token_sparsity(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(blockffn.judge(chunked(**given))) == verdict


def test_traces_by_document_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    active = tuple(torch.rand(30, 4, generator=generator) < 0.5 for _ in range(3))
    gates = tuple(a.float() for a in active)
    ids = np.arange(30) // 10
    trace = RoutingTrace((0, 1, 2), gates, active, gates, ids, ids)
    loads, transitions = moetuner.by_document(trace)
    assert loads.shape == (3, 3, 4) and np.array_equal(loads.sum(0), trace.loads())
    assert np.array_equal(transitions.sum(0), trace.transitions())
    both = moetuner._joined([trace, trace])
    assert len(both) == 60 and len(np.unique(both.documents)) == 6
    assert np.array_equal(both.loads(), 2 * trace.loads())


def test_kinds_of_text_do_not_overlap() -> None:
    found = byte_mixtral.domains(0, documents=20)
    assert set(found) == set(byte_mixtral.DOMAINS)
    for learn, fit, judged in found.values():
        assert learn and fit and judged
        assert not set(learn) & set(judged) and not set(fit) & set(judged)
    line = found["sums"][0][0].splitlines()[0]
    a, b = line.split("=")[0].split("+")
    assert int(a) + int(b) == int(line.split("=")[1])


def test_arms_of_home_have_equally_many_parameters() -> None:
    sizes = [sum(p.numel() for p in home.build(arm).parameters()) for arm in home.ARMS]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slug", "settings"),
    [
        ("uncurl", {"steps": 4, "tune": 1, "layers": 2, "eval_tokens": 512, "calibration": 256}),
        ("moetuner", {"steps": 4, "layers": 3, "tokens": 2048}),
        ("home", {"seeds": 1, "steps": 4}),
        ("blockffn", {"steps": 4, "width": 48, "layers": 2, "eval_tokens": 2048}),
    ],
)
def test_small_runs_give_every_check_a_number(slug: str, settings: dict[str, Any]) -> None:
    found = reproduce(slug, seed=5, settings=settings)
    assert all("not measured" not in check.said for check in found.checks)
