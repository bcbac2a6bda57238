"""The judges of the reproductions of quantization-aware training, on invented numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import edgeqat, lr_qat, quantnas, quest_llm
from actlas.papers.reproductions.rounded_bytes import gap_over_seeds


def number(name, value, low=None, high=None, **group):
    return Measurement(name, value, "", 3, low, high, group=group)


def around(name, value, **group):
    return number(name, value, value - 0.01, value + 0.01, **group)


def lr_numbers(way, over_gptq=-0.1, changed=0.0):
    return Measured(
        [
            number("logits that merging changes", changed),
            around("share of the way from full training to GPTQ", way),
            around("extra loss of LR-QAT", over_gptq, over="gptq"),
            around("extra loss of LR-QAT", over_gptq - 0.1, over="rtn"),
            around("extra loss of LR-QAT", -0.1, over="lora"),
            around("extra loss of LR-QAT", -0.1, over="lower rank"),
            number("optimiser state over the count's prediction", 1.01),
            number("training bytes over full training", 0.7),
            number("saved bytes over keeping the rounded weight", 0.8),
            number("integers that the first steps flip", 10.0, downcast="fixed8"),
            number("integers that the first steps flip", 0.0, downcast="int"),
        ]
    )


def test_lr_qat_must_be_nearer_to_full_training_than_to_gptq_and_merge_exactly():
    assert verdict_of(lr_qat.judge(lr_numbers(0.2))) == "holds"
    assert verdict_of(lr_qat.judge(lr_numbers(0.8))) == "partly"
    assert verdict_of(lr_qat.judge(lr_numbers(0.2, changed=3.0))) == "partly"
    assert not next(c for c in lr_qat.judge(lr_numbers(0.2, over_gptq=0.1)) if "than GPTQ" in c.name).passed


def quest_numbers(one, two=-0.1, loss=2.0):
    return Measured(
        [
            number("largest distance to the table, 1 to 5 bits", 1e-4),
            number("largest distance to the table, 6 to 8 bits", 1e-4),
            around("loss", loss, arm="quest", bits="1"),
            around("loss", 1.5, arm="quest", bits="2"),
            number("loss of byte frequencies", 3.0),
            around("extra loss of QuEST", one, over="ste", bits="1"),
            around("extra loss of QuEST", two, over="ste", bits="2"),
            around("extra loss of QuEST", -0.1, over="trust, not rotated", bits="1"),
            around("cosine to the float gradient, QuEST minus ste", 0.1),
        ]
    )


def test_quest_must_beat_straight_through_training_and_be_stable():
    assert verdict_of(quest_llm.judge(quest_numbers(-0.1))) == "holds"
    assert verdict_of(quest_llm.judge(quest_numbers(0.1))) == "partly"
    checks = {c.name: c.passed for c in quest_llm.judge(quest_numbers(-0.1, loss=3.5))}
    assert checks["1-bit training is stable"] is False
    assert {c.name: c.passed for c in quest_llm.judge(quest_numbers(0.0))}[
        "QuEST beats straight-through at 1 bit"
    ] is None


def edge_numbers(gain, tokens):
    return Measured(
        [
            number("cosine of attention maps", 0.9, arm="and both"),
            number("cosine of attention maps", 0.8, arm="distillation"),
            number("variance of queries and keys", 2.0, arm="and entropy"),
            number("variance of queries and keys", 1.0, arm="distillation"),
            number("cosine after minimising the released loss, minus before", -0.1),
            around("extra divergence", gain, arm="and both", over="distillation"),
            around("extra divergence", -0.1, arm="distillation", over="next-token loss"),
            around("extra divergence", tokens, arm="first_token", over="random"),
            around("extra divergence", 0.1, arm="inverse", over="random"),
        ]
    )


def test_edgeqat_must_beat_plain_distillation_and_chance():
    assert verdict_of(edgeqat.judge(edge_numbers(-0.1, -0.1))) == "holds"
    assert verdict_of(edgeqat.judge(edge_numbers(0.1, -0.1))) == "partly"
    assert verdict_of(edgeqat.judge(edge_numbers(-0.1, 0.1))) == "partly"


def nas_numbers(ratio, line, gap, cost=1.0):
    return Measured(
        [
            number("seconds a step over rounding's", ratio),
            number("bit operations over rounding's", cost),
            around("PSNR over the network found by rounding", gap),
            around("PSNR over the uniform line", line),
            *(number("bit operations of the found network", c, search="noise", penalty=str(p))
              for p, c in ((0, 4e6), (1, 2e6))),
            number("largest probability", 0.9, entropy="on"),
            number("largest probability", 0.4, entropy="off"),
            around("PSNR of the adaptive norm", 0.1, over="batch"),
            around("PSNR of the adaptive norm", 0.1, over="none"),
            number("identities that fail", 0.0),
        ]
    )  # fmt: skip


def test_quantnas_must_be_fast_and_not_below_the_line():
    assert verdict_of(quantnas.judge(nas_numbers(0.6, 0.1, 0.05))) == "holds"
    assert verdict_of(quantnas.judge(nas_numbers(1.2, -0.5, -0.5))) == "does not hold here"
    checks = {c.name: c.passed for c in quantnas.judge(nas_numbers(0.6, 0.1, -0.5, cost=1.3))}
    assert checks["noise finds what rounding finds"] is None  # not at equal cost


def test_the_gap_over_seeds_is_the_mean_and_covers_the_seeds():
    from actlas.measure.likelihood import Losses

    fields = {f.name: () for f in dataclasses.fields(Losses)}

    def run(nll):
        return Losses(**{**fields, "nll": np.array(nll), "tokens": np.array([10.0, 20.0, 10.0])})

    first, second = [run([5.0, 9.0, 4.0]), run([6.0, 9.0, 4.0])], [run([4.0, 8.0, 4.0]), run([4.0, 8.0, 3.0])]
    found = gap_over_seeds("gap", first, second)
    assert found.value == pytest.approx((2 + 4) / 2 / 40)
    assert found.low <= found.value <= found.high and found.details["by_seed"] == [0.05, 0.1]
