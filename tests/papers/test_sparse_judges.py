"""The judges of the post-training sparsity papers, on invented numbers."""

from __future__ import annotations

import json

import pytest

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import chess, coreinfer, r_sparse, wina
from tests.core.tiny import TEXTS, tiny


def _extra(rule: str, over: str, asked: str, value: float, width: float = 0.01) -> Measurement:
    group = {"rule": rule, "over": over, "asked": asked}
    return Measurement("extra-loss", value, "nats/token", 8, value - width, value + width, group=group)


def test_wina_needs_both_levels() -> None:
    def judged(low: float, high: float) -> str:
        found = [_extra("wina", "magnitude", "0.4", low), _extra("wina", "magnitude", "0.5", high)]
        return verdict_of(wina.judge(Measured(found)))

    assert judged(-0.05, -0.05) == "partly"  # the other checks were not measured
    assert judged(0.05, 0.05) == "does not hold here"
    checks = wina.judge(Measured([_extra("wina", "magnitude", "0.4", -0.005)]))
    assert checks[0].passed is None and checks[1].passed is None


def test_chess_central_checks() -> None:
    found = [
        _extra("chess", "cats", "gates 0.7", -0.1),
        _extra("selective", "all four", "attention", 0.1),
    ]
    passed = {c.name: c.passed for c in chess.judge(Measured(found)) if c.central}
    assert passed == {"CHESS beats CATS at 0.7": True, "Q and O only beat all four": False}


def test_r_sparse_allows_one_percent() -> None:
    alphas = [
        Measurement("alpha", a, "fraction", 9, group={"kind": k})
        for k, a in zip("qkv", (1.0, 0.9, 0.5), strict=True)
    ]
    for value, want in ((-0.02, True), (0.0, None), (0.05, False)):
        checks = r_sparse.judge(Measured([_extra("searched", "columns only", "0.5", value, 0.015), *alphas]))
        assert checks[0].central and checks[0].passed is want
        assert checks[1].passed is True


def test_coreinfer_overlap_must_exceed_chance() -> None:
    for low, want in ((0.65, True), (0.55, None)):
        overlap = Measurement(
            "overlap of prompt and continuation", 0.7, "fraction", 8, low, 0.75, details={"chance": 0.6}
        )
        random = Measurement(
            "extra loss over the published set", 0.3, "nats/token", 8, 0.2, 0.4, group={"arm": "random"}
        )
        checks = coreinfer.judge(Measured([overlap, random]))
        assert [c.passed for c in checks if c.central] == [want, True]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reproductions run on a tiny random model and short texts."""
    lines = [" ".join([t] * 2)[:60] for t in TEXTS if len(t) > 10]
    monkeypatch.setattr("actlas.models.load", lambda name: tiny())
    for module in (wina, chess, r_sparse):
        monkeypatch.setattr(module, "texts", lambda seed: (lines, lines))
        monkeypatch.setattr(module, "CONTEXT", 60)


def test_the_runs_measure_what_the_judges_ask(small: None) -> None:
    sizes = {"seed": 0, "tokens": 240, "calibration": 240}
    runs = {
        chess: chess.chess(**sizes, gradients=120),
        r_sparse: r_sparse.r_sparse(**sizes, evaluations=3, search_tokens=120),
        wina: wina.wina(**sizes, gradients=120, levels=(0.4, 0.5)),
    }
    for module, found in runs.items():
        names = [(m.name, tuple(m.group.items())) for m in found.measured]
        assert len(names) == len(set(names))
        json.dumps([m.to_json() for m in found.measured], allow_nan=False)
        checks = module.judge(Measured(found.measured))
        assert sum("not measured" not in c.said for c in checks) >= len(checks) // 2
