"""Compound scaling: grow a network's depth, width and resolution, and predict what that costs.

    scale_arch(spec, factor, strategy="dWr", *, alpha=None, rounding=True) -> ConvArch | DecoderArch
    scaling_factors(factor, strategy, alpha=None) -> Factors(depth, width, group, resolution)
    growth_exponents(strategy, alpha=None) -> {"multiply-adds": 1, "parameters": ..., "activations": ...}
    closed_form(spec) -> ArchCost(macs, parameters, activations, scores)
    fit_exponent(factors, values) -> slope of log(value) against log(factor)

A stage of `d` layers, `w` channels and `r x r` positions costs `d w^2 r^2` multiply-adds, `d w^2`
parameters and `d w r^2` activation elements. Scaling by `s` with exponents `(e_d, e_w, e_r)` of sum 1

    d <- d s^{e_d}      w <- w s^{e_w / 2}      r <- r s^{e_r / 2}

multiplies the multiply-adds by `s`, the parameters by `s^{1 - e_r}` and the activations by
`s^{1 - e_w / 2}`: only width is cheap in activations. *Fast compound scaling* (`"dWr"`) takes
`e_w = alpha = 0.8` and shares the rest between depth and resolution. Group widths grow with the
width (`g <- g s^{e_w / 2}`), or grouped convolutions would be linear in `w`; depthwise stages
(group width 1) stay depthwise.

For a decoder the sequence length plays the part of `r^2`; attention scores grow with its square and
are given apart.

Source: Dollar, Singh, Girshick 2021, "Fast and Accurate Model Scaling" (arXiv 2103.06877), sections
3-4; rounding as in its code, pycls `models/scaler.py`, `models/blocks.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, overload

from actlas.core.errors import InputError
from actlas.measure.arch_cost import ArchCost, closed_form, fit_exponent
from actlas.measure.architectures import ConvArch, DecoderArch, Stage

__all__ = [
    "ArchCost",
    "ConvArch",
    "DecoderArch",
    "Stage",
    "closed_form",
    "fit_exponent",
    "growth_exponents",
    "scale_arch",
    "scaling_factors",
]

FAST = 0.8  # alpha of fast compound scaling
Strategy = str | Mapping[str, float]


class Factors(NamedTuple):
    """What depth, width, group width and resolution are multiplied by."""

    depth: float
    width: float
    group: float
    resolution: float


def scaling_factors(factor: float, strategy: Strategy = "dWr", alpha: float | None = None) -> Factors:
    """Return the four multipliers for `factor` times the multiply-adds.

    Args:
        factor: how many times the multiply-adds; below 1 shrinks.
        strategy: letters of `d`, `w`, `r` with equal weight (`"dw"`); `"dWr"` for the fast compound
            strategy; a pycls string (`"d1_w8_g8_r1"`), whose `g` counts as given; or a mapping
            from letter to weight. Where `g` is not given, group widths grow with the width.
        alpha: the share of the width, `e_w`, the rest equally to depth and resolution; overrides
            `strategy`.

    Raises:
        InputError: a factor that is not positive, unknown letters, negative or all-zero weights.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise InputError(f"the scaling factor must be a positive number, not {factor}")
    d, w, r, g = _weights(strategy, alpha)
    return Factors(factor**d, factor ** (w / 2), factor ** (g / 2), factor ** (r / 2))


def growth_exponents(strategy: Strategy = "dWr", alpha: float | None = None) -> dict[str, float]:
    """Return the exponents of `s` with which the cost terms grow, for exact (unrounded) scaling."""
    _, w, r, _ = _weights(strategy, alpha)
    return {"multiply-adds": 1.0, "parameters": 1 - r, "activations": 1 - w / 2}


@overload
def scale_arch(
    spec: ConvArch,
    factor: float,
    strategy: Strategy = ...,
    *,
    alpha: float | None = ...,
    rounding: bool = ...,
) -> ConvArch: ...
@overload
def scale_arch(
    spec: DecoderArch,
    factor: float,
    strategy: Strategy = ...,
    *,
    alpha: float | None = ...,
    rounding: bool = ...,
) -> DecoderArch: ...
def scale_arch(
    spec: ConvArch | DecoderArch,
    factor: float,
    strategy: Strategy = "dWr",
    *,
    alpha: float | None = None,
    rounding: bool = True,
) -> ConvArch | DecoderArch:
    """Return the architecture with about `factor` times the multiply-adds.

    Args:
        spec: what to scale.
        factor, strategy, alpha: see `scaling_factors`.
        rounding: depth to an integer of at least 1, widths to multiples of 8, group widths to 1, 2, 4 or
            multiples of 8 with the inner width made divisible, resolution to a multiple of 4; for a
            decoder whole heads with the same grouping of keys and values. Rounding moves small networks
            by 10-30%: compare at realised cost. `False` gives the exact real-valued sizes.

    Raises:
        InputError: as `scaling_factors`; or a stage whose inner width its group width does not divide.
    """
    by = scaling_factors(factor, strategy, alpha)
    if isinstance(spec, DecoderArch):
        return _scale_decoder(spec, by, rounding)
    _check_groups(spec)
    return _scale_conv(spec, by, rounding)


def _scale_conv(spec: ConvArch, by: Factors, rounding: bool) -> ConvArch:
    stages = []
    for s in spec.stages:
        depth, width = s.depth * by.depth, s.width * by.width
        group = 1.0 if s.group_width == 1 else s.group_width * by.group
        if rounding:
            depth = max(1, round(depth))
            width = max(1, round(width / 8)) * 8
            group = max(1, round(group))
            group = group if group <= 2 else 4 if group <= 5 else round(group / 8) * 8
            if spec.block == "bottleneck":
                width, group = _compatible(int(width), s.expansion, int(group))
        stages.append(replace(s, depth=depth, width=width, group_width=group))
    stem, head, resolution = spec.stem_width, spec.head_width, spec.resolution * by.resolution
    if spec.scale_ends:
        stem, head = stem * by.width, head * by.width
    if rounding:
        resolution = max(1, round(resolution / 4)) * 4
        if spec.scale_ends:
            stem = max(1, round(stem / 8)) * 8
            head = max(1, round(head / 8)) * 8 if head else 0
    return replace(spec, stages=tuple(stages), stem_width=stem, head_width=head, resolution=resolution)


def _compatible(width: int, expansion: float, group: int) -> tuple[int, int]:
    """Make the inner width a multiple of the group width (pycls `adjust_block_compatibility`)."""
    inner = int(max(1, width * expansion))
    group = min(group, inner)
    multiple = math.lcm(group, int(expansion)) if expansion > 1 and expansion == int(expansion) else group
    inner = max(multiple, round(inner / multiple) * multiple)
    return int(inner / expansion), group


def _scale_decoder(spec: DecoderArch, by: Factors, rounding: bool) -> DecoderArch:
    share = spec.heads / spec.kv_heads
    depth, kv = spec.depth * by.depth, spec.kv_heads * by.width
    d_mlp, context = spec.d_mlp * by.width, spec.context * by.resolution**2
    if rounding:
        depth, kv, context = max(1, round(depth)), max(1, round(kv)), max(1, round(context))
        d_mlp = max(1, round(d_mlp / 8)) * 8
    return replace(spec, depth=depth, kv_heads=kv, heads=kv * share, d_mlp=d_mlp, context=context)


# Reading strategies ------------------------------------------------------------------------------


def _weights(strategy: Strategy, alpha: float | None) -> tuple[float, float, float, float]:
    """Return `(e_d, e_w, e_r, e_g)`, the first three of sum 1."""
    if alpha is not None:
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha is the width's share and must lie in [0, 1], not {alpha}")
        weights = {"d": (1 - alpha) / 2, "w": alpha, "r": (1 - alpha) / 2}
    elif isinstance(strategy, Mapping):
        weights = dict(strategy)
    elif strategy == "dWr":
        weights = {"d": (1 - FAST) / 2, "w": FAST, "r": (1 - FAST) / 2}
    elif re.fullmatch(r"[dwgr]+", strategy):
        weights = dict.fromkeys(strategy, 1.0)
    elif all(re.fullmatch(r"[a-zA-Z]\d*\.?\d+", part) for part in strategy.split("_")):
        weights = {"g": 0.0} | {part[0]: float(part[1:]) for part in strategy.split("_")}
    else:
        weights = {strategy or " ": 1.0}
    unknown = [k for k in weights if k not in ("d", "w", "g", "r")]
    if unknown:
        raise InputError(
            f"unknown scaling strategy {strategy!r}: use letters of d, w, r (e.g. dw), dWr, or d1_w8_g8_r1"
        )
    if any(v < 0 or not math.isfinite(v) for v in weights.values()):
        raise InputError(f"scaling weights must not be negative: {strategy!r}")
    total = sum(weights.get(k, 0.0) for k in "dwr")
    if total == 0:
        raise InputError(
            f"all scaling weights of d, w and r are zero in {strategy!r}: give one of them a share"
        )
    d, w, r = (weights.get(k, 0.0) / total for k in "dwr")
    return d, w, r, weights["g"] / total if "g" in weights else w


def _check_groups(spec: ConvArch) -> None:
    if not spec.stages:
        raise InputError("the architecture has no stages")
    for i, s in enumerate(spec.stages):
        inner = s.width * s.expansion
        if spec.block == "bottleneck" and math.remainder(inner, s.group_width) != 0:
            raise InputError(
                f"stage {i}: group width {s.group_width:g} does not divide the inner width {inner:g}"
                f" (width {s.width:g} x expansion {s.expansion:g})"
            )
