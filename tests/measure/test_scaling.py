"""The paper's growth table, exactly before rounding and nearly after it."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError
from actlas.measure.anynet import build_anynet, efficientnet_lite, scaling_report
from actlas.measure.complexity import complexity
from actlas.measure.scaling import (
    ConvArch,
    DecoderArch,
    Stage,
    closed_form,
    fit_exponent,
    growth_exponents,
    scale_arch,
    scaling_factors,
)

TABLE = {
    "d": (1, 1),
    "w": (1, 1 / 2),
    "r": (0, 1),
    "dw": (1, 3 / 4),
    "dwr": (2 / 3, 5 / 6),
    "dWr": (0.9, 0.6),
}
FACTORS = (1, 2, 4, 8, 16)
NET = ConvArch((Stage(8, 32), Stage(16, 64), Stage(24, 128), Stage(16, 256)), resolution=112, stem_width=32)
SMALL = ConvArch((Stage(1, 32), Stage(2, 64), Stage(3, 128), Stage(2, 256)), resolution=112, stem_width=32)


@pytest.mark.parametrize("strategy", TABLE)
def test_growth_before_rounding_is_the_table(strategy: str) -> None:
    # one stage with its width kept: no projection, so every term scales alike
    spec = ConvArch((Stage(4, 32, 1),), resolution=32, stem_width=32)
    costs = []
    for s in FACTORS:
        scaled = scale_arch(spec, s, strategy, rounding=False)
        # the stem's width stays; take the stage's own
        costs.append(closed_form(scaled if strategy in "dr" else _same_stem(scaled), ends=False))
    params, acts = TABLE[strategy]
    assert fit_exponent(FACTORS, [c.macs for c in costs]) == pytest.approx(1, abs=1e-9)
    assert fit_exponent(FACTORS, [c.parameters for c in costs]) == pytest.approx(params, abs=1e-9)
    assert fit_exponent(FACTORS, [c.activations for c in costs]) == pytest.approx(acts, abs=1e-9)
    exponents = growth_exponents(strategy)
    assert exponents["parameters"] == pytest.approx(params)
    assert exponents["activations"] == pytest.approx(acts)


def _same_stem(spec: ConvArch) -> ConvArch:
    from dataclasses import replace

    return replace(spec, stem_width=spec.stages[0].width)


@pytest.mark.parametrize("strategy", TABLE)
def test_growth_after_rounding_is_near_the_table(strategy: str) -> None:
    costs = [closed_form(scale_arch(NET, s, strategy)) for s in FACTORS]
    macs = fit_exponent(FACTORS, [c.macs for c in costs])
    params, acts = TABLE[strategy]
    assert macs == pytest.approx(1, abs=0.1)
    assert fit_exponent(FACTORS, [c.parameters for c in costs]) == pytest.approx(params, abs=0.1)
    assert fit_exponent(FACTORS, [c.activations for c in costs]) == pytest.approx(acts, abs=0.1)


def test_factor_one_changes_nothing() -> None:
    assert scale_arch(NET, 1) == NET
    assert scale_arch(efficientnet_lite(0), 1, "dwr") == efficientnet_lite(0)


@pytest.mark.parametrize("strategy", TABLE)
def test_scaled_networks_build_and_count(strategy: str) -> None:
    spec = scale_arch(SMALL, 2, strategy)
    side = int(spec.resolution)
    counted = complexity(build_anynet(spec), torch.randn(1, 3, side, side))
    one = closed_form(spec)
    assert (counted.macs, counted.activations, counted.parameters) == (
        one.macs,
        one.activations,
        one.parameters,
    )


def test_strategies_are_read() -> None:
    fast = scaling_factors(4, "dWr")
    assert fast == pytest.approx(scaling_factors(4, "d1_w8_g8_r1"))
    assert fast == pytest.approx(scaling_factors(4, alpha=0.8))
    assert fast == pytest.approx(scaling_factors(4, {"d": 1, "w": 8, "r": 1}))
    assert fast.depth * fast.width**2 * fast.resolution**2 == pytest.approx(4)
    assert scaling_factors(4, "d1_w1_r1").group == 1  # pycls: g as given
    assert scaling_factors(4, "dwr").group == pytest.approx(4 ** (1 / 6))  # here: with the width


@pytest.mark.parametrize(
    ("factor", "strategy", "said"),
    [
        (0, "dWr", "positive"),
        (-2, "w", "positive"),
        (2, "dx", "unknown"),
        (2, "d0_w0_r0", "zero"),
        (2, "", "unknown"),
    ],
)
def test_bad_strategies_are_refused(factor: float, strategy: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        scale_arch(NET, factor, strategy)


def test_groups_that_do_not_divide_are_refused() -> None:
    bad = ConvArch((Stage(1, 40, group_width=16),))
    with pytest.raises(InputError, match="does not divide"):
        scale_arch(bad, 2)
    with pytest.raises(InputError, match="does not divide"):
        build_anynet(bad)
    with pytest.raises(InputError, match="whole"):
        build_anynet(scale_arch(NET, 2, rounding=False))


def test_depthwise_stays_depthwise_and_groups_divide() -> None:
    spec = ConvArch((Stage(1, 32, group_width=1), Stage(2, 64, expansion=0.5, group_width=16)))
    for s in (0.3, 2, 5, 11):
        scaled = scale_arch(spec, s, "w")
        assert scaled.stages[0].group_width == 1
        assert (scaled.stages[1].width * 0.5) % scaled.stages[1].group_width == 0


def test_decoders_scale_with_whole_heads() -> None:
    spec = DecoderArch(depth=30, heads=9, kv_heads=3, head_dim=64, d_mlp=1536, vocab=49152)
    wide = scale_arch(spec, 4, "w")
    assert (wide.depth, wide.kv_heads, wide.heads, wide.width, wide.d_mlp) == (30, 6, 18, 1152, 3072)
    longer = scale_arch(spec, 4, "r")
    assert longer.context == 4 * spec.context
    costs = [closed_form(scale_arch(spec, s, "r", rounding=False), ends=False) for s in FACTORS]
    assert fit_exponent(FACTORS, [c.scores for c in costs]) == pytest.approx(2)
    assert fit_exponent(FACTORS, [c.activations for c in costs]) == pytest.approx(1)


def test_report_counts_and_correlates() -> None:
    tiny = ConvArch((Stage(1, 16, group_width=8), Stage(1, 32, group_width=8)), resolution=32, stem_width=8)
    report = scaling_report({s: scale_arch(tiny, 2, s) for s in ("d", "w", "r", "dWr")}, repeats=2)
    assert set(report.rows) == {"d", "w", "r", "dWr"}
    assert {m.name for m in report.rows["w"]} == {
        "parameters",
        "multiply-adds",
        "activation-elements",
        "forward-time",
    }
    assert set(report.correlation) == {"activation-elements", "multiply-adds"}
    with pytest.raises(InputError, match="two or more"):
        scaling_report({"one": tiny})
