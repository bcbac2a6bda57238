"""What a described architecture costs, by formula.

    closed_form(spec) -> ArchCost(macs, parameters, activations, scores)
    fit_exponent(factors, values) -> slope of log(value) against log(factor)

The conventions are those of `opcount`; on whole sizes the formulas equal what `complexity` counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from actlas.core.errors import InputError
from actlas.measure.architectures import ConvArch, DecoderArch, Stage


class ArchCost(NamedTuple):
    """Closed-form cost of one image (ConvArch) or one sequence (DecoderArch).

    `activations` leave attention scores out; they are in `scores`.
    """

    macs: float
    parameters: float
    activations: float
    scores: float = 0.0

    def __add__(self, other: ArchCost) -> ArchCost:  # type: ignore[override]
        return ArchCost(*(a + b for a, b in zip(self, other, strict=True)))


def closed_form(spec: ConvArch | DecoderArch, *, ends: bool = True) -> ArchCost:
    """Return multiply-adds, parameters and activation elements by formula.

    Equal to what `complexity` counts on the built network (tested). Norm parameters are part of
    `parameters` only with `ends`.

    Args:
        spec: sizes may be real numbers (`scale_arch(..., rounding=False)`).
        ends: `False` leaves out the stem, the head, norms and the embedding, whose sizes the
            scaling laws do not describe.
    """
    if isinstance(spec, DecoderArch):
        return _decoder_cost(spec, ends)
    total, side, width = ArchCost(0, 0, 0), spec.resolution, spec.stem_width
    exact = not ends
    side = _strided(side, spec.stem_stride, exact)
    if ends:
        total = _conv(spec.channels, width, 3, side, norm=True)
    for s in spec.stages:
        for i in range(math.ceil(s.depth)):
            share = min(1.0, s.depth - i)  # a real-valued depth counts its last block in part
            before, side = side, _strided(side, s.stride if i == 0 else 1, exact)
            block = _block(spec, s, width, before, side, s.stride if i == 0 else 1, norm=ends)
            total += ArchCost(*(share * v for v in block))
            width = s.width
    if ends:
        if spec.head_width:
            total += _conv(width, spec.head_width, 1, side, norm=True)
            width = spec.head_width
        total += ArchCost(width * spec.classes, width * spec.classes + spec.classes, spec.classes)
    return total


def _strided(side: float, stride: int, exact: bool) -> float:
    return side / stride if exact else (side - 1) // stride + 1


def _conv(
    w_in: float, w_out: float, kernel: int, side: float, group: float = 0, norm: bool = False
) -> ArchCost:
    """A convolution without bias; `group` is the width of a group (0: dense)."""
    weights = w_out * (group or w_in) * kernel**2
    return ArchCost(weights * side**2, weights + (2 * w_out if norm else 0), w_out * side**2)


def _block(
    spec: ConvArch, s: Stage, w_in: float, before: float, side: float, stride: int, norm: bool
) -> ArchCost:
    if spec.block == "inverted":
        inner = w_in * s.expansion
        expand = _conv(w_in, inner, 1, before, norm=norm) if s.expansion != 1 else ArchCost(0, 0, 0)
        return (
            expand + _conv(inner, inner, s.kernel, side, 1, norm) + _conv(inner, s.width, 1, side, norm=norm)
        )
    inner = s.width * s.expansion
    total = _conv(w_in, inner, 1, before, norm=norm)
    total += _conv(inner, inner, s.kernel, side, s.group_width, norm)
    total += _conv(inner, s.width, 1, side, norm=norm)
    if w_in != s.width or stride != 1:
        total += _conv(w_in, s.width, 1, side, norm=norm)
    return total


def _decoder_cost(spec: DecoderArch, ends: bool) -> ArchCost:
    n, d, kv = spec.context, spec.width, spec.kv_heads * spec.head_dim
    mlp = (3 if spec.gated else 2) * d * spec.d_mlp
    linear = 2 * d * d + 2 * d * kv + mlp
    written = d + 2 * kv + d + d + ((2 if spec.gated else 1) * spec.d_mlp) + d  # q, k+v, z, out, mlp, mlp out
    total = ArchCost(
        spec.depth * (n * linear + 2 * spec.heads * n * n * spec.head_dim),
        spec.depth * (linear + (2 * d if ends else 0)),
        spec.depth * n * written,
        spec.depth * spec.heads * n * n,
    )
    if ends:
        head = d * spec.vocab
        total += ArchCost(n * head, head * (1 if spec.tied else 2) + d, n * spec.vocab)
    return total


def fit_exponent(factors: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope of `log(value)` against `log(factor)`."""
    if len(factors) != len(values) or len(factors) < 2:
        raise InputError(
            f"a slope needs two or more pairs, not {len(factors)} factors and {len(values)} values"
        )
    if min(*factors, *values) <= 0:
        raise InputError(f"a log-log slope needs positive numbers, not {min(*factors, *values)}")
    return float(np.polyfit(np.log(factors), np.log(values), 1)[0])
