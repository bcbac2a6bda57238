"""Judges of awq, zeroquant-v2 and q-bert on invented measurements."""

from __future__ import annotations

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import awq, q_bert, zeroquant_v2


def _pair(value: float, variant: str, over: str, name: str = "extra-kl") -> Measurement:
    width = 0.1 * abs(value)
    group = {"variant": variant, "over": over}
    return Measurement(name, value, "nats/token", 9, value - width, value + width, group=group)


def _one(name: str, value: float, **group: str) -> Measurement:
    return Measurement(name, value, "ratio", 9, group=group)


def _awq(scale: float, clipped: float, permuted: float, differing: float = 0.0) -> list[Measurement]:
    return [
        _pair(scale, "awq-scale", "rtn"),
        _pair(clipped, "awq", "rtn", "kl minus 0.8 of it"),
        _pair(permuted, "awq-scale", "permuted"),
        _pair(-0.1, "weight-scale", "rtn"),
        _pair(-0.1, "awq-scale", "weight-scale"),
        _one("codes that differ at ratio 0", differing),
        _one("folded against in place", 1e-6),
    ]


def test_awq_verdicts() -> None:
    assert verdict_of(awq.judge(Measured(_awq(-0.3, -0.2, -0.4)))) == "holds"
    assert verdict_of(awq.judge(Measured(_awq(-0.3, -0.2, -0.4, differing=3.0)))) == "partly"
    assert verdict_of(awq.judge(Measured(_awq(-0.3, 0.2, -0.4)))) == "partly"
    assert verdict_of(awq.judge(Measured(_awq(0.3, 0.2, 0.4)))) == "does not hold here"


def _zeroquant(branch: float, eight: float, four: float, tail: float = 1.0) -> list[Measurement]:
    return [
        _pair(branch, "rank 8", "rtn"),
        _pair(eight, "W8 per channel", "A8 per token"),
        _pair(four, "W4 per channel", "A4 per token"),
        _pair(-0.1, "rank 8", "rank 2"),
        _pair(-0.1, "rank 32", "rank 8"),
        _pair(-0.1, "rank 8, weighted", "rank 8"),
        Measurement(
            "extra-kl",
            0.0,
            "nats/token",
            9,
            -0.1,
            0.1,
            group={"variant": "rank 8, 8-bit factors", "over": "rank 8"},
        ),
        _pair(-0.1, "rank 8", "rtn, groups of 32"),
        _one("weight error over the tail of singular values", tail),
    ]


def test_zeroquant_verdicts() -> None:
    assert verdict_of(zeroquant_v2.judge(Measured(_zeroquant(-0.1, -0.1, -0.1)))) == "holds"
    assert verdict_of(zeroquant_v2.judge(Measured(_zeroquant(-0.1, -0.1, -0.1, tail=1.2)))) == "partly"
    assert verdict_of(zeroquant_v2.judge(Measured(_zeroquant(0.1, -0.1, -0.1)))) == "partly"
    assert verdict_of(zeroquant_v2.judge(Measured(_zeroquant(0.1, 0.1, 0.1)))) == "does not hold here"


def _qbert(groups: float, reverse: float, mean: float, rank: float) -> list[Measurement]:
    found = [
        _one("loss", 1.0, part="groups", groups=str(g), variant=f"{g} {how}")
        for g in (1, 96)
        for how in ("trained",)
    ]
    return [
        *found,
        _pair(groups, "96 trained", "1 trained", "extra loss"),
        _pair(groups, "96 rounded", "1 rounded", "extra loss"),
        _pair(reverse, "omega", "reversed", "extra loss"),
        _pair(mean, "omega", q_bert.RANDOM, "extra loss"),
        _one("rank of Omega's choice", rank),
        _one("power iteration over eigvalsh", 0.999),
    ]


def test_q_bert_verdicts() -> None:
    assert verdict_of(q_bert.judge(Measured(_qbert(-0.1, -0.1, -0.1, 0.05)))) == "holds"
    assert verdict_of(q_bert.judge(Measured(_qbert(-0.1, -0.1, -0.1, 0.5)))) == "partly"
    assert verdict_of(q_bert.judge(Measured(_qbert(0.1, 0.1, 0.1, 0.5)))) == "does not hold here"
