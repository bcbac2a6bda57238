"""Small floats for a linear layer: which format, which largest value, and a power of two for each channel.

A grid of E exponent and M mantissa bits with a real-valued bias b is the grid of `core.numbers` times a
scale, since `2^-b` multiplies every level:

    largest value = (2 - 2^-M) 2^(2^E - 1 - b),      scale = 2^(own bias - b)

**Search.** From the ranges of weights (one bias a row) and inputs (one for all), in turns: each candidate
largest value `c max`, c from 0.01 to 1.2, is tried, and the one that leaves the least squared error of the
layer's output is kept; then the format that does. `variant="official"` multiplies the bias itself by c, as
the released code does, where a bias near 0 hardly moves and a negative one moves the other way.

**Pre-shift.** Channels of the inputs differ by powers of two that a shared bias wastes. With b_j the bias
that channel j alone would have,

    rho = min_j b_j,   k_j = clip(round(b_j) - round(rho), 0, 2^E - 1),   x_hat_j = 2^-k_j FP(2^k_j x_j)

and 2^-k_j times column j of a floating-point weight only changes that column's exponent bias, exactly.

Source: Liu et al. 2023, "LLM-FP4" (arXiv 2310.16836) and its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers import QuantSpec
from actlas.core.numbers.floats import largest, round_to_float

Variant = Literal["range", "official"]
FORMATS = ("e3m0", "e2m1", "e1m2")
_LEAST = 1e-30


def parse_format(name: str) -> tuple[int, int]:
    """Return (E, M) of a name like `"e2m1"`.

    Raises:
        InputError: no such name.
    """
    parts = name.lower().removeprefix("e").split("m")
    if len(parts) != 2 or not all(p.isdigit() for p in parts) or not int(parts[0]):
        raise InputError(f"{name!r} is no float format; it must be like e2m1 (exponent bits, mantissa bits)")
    return int(parts[0]), int(parts[1])


def bias_of(scale: Tensor, exp_bits: int) -> Tensor:
    """Return the real-valued bias b that a scale of `core.numbers`' grid stands for."""
    return (2 ** (exp_bits - 1) - 1) - torch.log2(scale)


def scale_of(bias: Tensor, exp_bits: int) -> Tensor:
    """Return the scale that a real-valued bias stands for."""
    return torch.exp2((2 ** (exp_bits - 1) - 1) - bias)


def range_scale(most: Tensor, exp_bits: int, man_bits: int) -> Tensor:
    """Return the scale whose largest level is `most`; 1 where that is 0."""
    return torch.where(most > 0, most / largest(exp_bits, man_bits), torch.ones_like(most))


def round_scaled(x: Tensor, scale: Tensor, exp_bits: int, man_bits: int) -> Tensor:
    """Return x on the grid times a scale that broadcasts; the same numbers as `core.numbers.quantize`."""
    return round_to_float(x / scale, exp_bits, man_bits) * scale


def channel_shifts(absmax: Tensor, exp_bits: int, man_bits: int) -> Tensor:
    """Return the integer shifts k `[channels]` of the pre-shifted exponent bias, int64.

    Args:
        absmax: largest magnitude of each channel; silent channels get the largest shift.
        exp_bits, man_bits: of the inputs' format; k lies in `[0, 2^E - 1]`.

    Raises:
        NonFiniteError: NaN or infinite ranges. InputError: all channels are silent.
    """
    if not bool(torch.isfinite(absmax).all()):
        raise NonFiniteError("the ranges of the channels hold NaN or infinity")
    if not bool((absmax > 0).any()):
        raise InputError("all channels are silent, so that there is nothing to shift")
    bias = bias_of(range_scale(absmax.double().clamp_min(_LEAST), exp_bits, man_bits), exp_bits)
    rho = bias.min()
    return (bias.round() - rho.round()).clamp(0, 2**exp_bits - 1).long()


def shifted_scale(scale: Tensor | float, shifts: Tensor) -> Tensor:
    """Return the scale of each channel, `scale 2^-k`, float32 `[channels]`; exact."""
    base = torch.as_tensor(scale, dtype=torch.float32)
    return torch.ldexp(base.expand(len(shifts)), -shifts.to(torch.int32))


def candidates(scale: Tensor, exp_bits: int, multipliers: Sequence[float], variant: Variant) -> list[Tensor]:
    """Return the scales that a search tries; see the module's text."""
    if variant == "range":
        return [scale * c for c in multipliers]
    bias = bias_of(scale, exp_bits)
    return [scale_of(bias * c, exp_bits) for c in multipliers]


@dataclass(frozen=True)
class FloatChoice:
    """What a search found for one layer.

    Attributes:
        weight_format, act_format: names; `act_format` is `""` where inputs are not rounded.
        weight_scale: `[out, 1]`.
        act_scale: `[1]`, or `[channels]` with shifts.
        shifts: k `[channels]`, or `None`.
        error: relative squared error of the layer's output.
        before: the same with the formats' full ranges (the first candidate format), for comparison.
    """

    weight_format: str
    act_format: str
    weight_scale: Tensor
    act_scale: Tensor | None
    shifts: Tensor | None
    error: float
    before: float

    def weight_spec(self) -> QuantSpec:
        """The weights' format, one scale a row."""
        e, m = parse_format(self.weight_format)
        return QuantSpec(1 + e + m, "float", granularity="channel", exp_bits=e)

    def act_spec(self) -> QuantSpec:
        """The inputs' format, static."""
        e, m = parse_format(self.act_format)
        kind: Literal["tensor", "channel"] = "tensor" if self.shifts is None else "channel"
        return QuantSpec(1 + e + m, "float", granularity=kind, exp_bits=e)


def fp_search(
    weight: Tensor,
    x: Tensor,
    *,
    absmax: Tensor | None = None,
    formats: Sequence[str] = FORMATS,
    act_formats: Sequence[str] | None = None,
    preshift: bool = True,
    steps: int = 100,
    rounds: int = 3,
    low: float = 0.01,
    high: float = 1.2,
    variant: Variant = "range",
) -> FloatChoice:
    """Search formats and ranges of one layer's weights and inputs.

    Args:
        weight: `[out, in]`.
        x: inputs on calibration text, `[n, in]`; the error is measured on them.
        absmax: largest magnitude of each input channel over more text; default: of `x`.
        formats: for weights; of equal or different bits.
        act_formats: for inputs; default the same; `()`: inputs are not rounded.
        preshift: a power of two for each input channel.
        steps, low, high: of the candidates.
        rounds: how often weights and inputs take turns.
        variant: what a candidate multiplies; see the module's text.

    Raises:
        InputError: no formats, steps or rounds below 1, limits that make no sense.
        NonFiniteError: NaN or infinity in weights, inputs or errors.
    """
    if variant not in ("range", "official"):
        raise InputError(f"variant is {variant!r}; it must be 'range' or 'official'")
    if steps < 1 or rounds < 1 or not 0 < low <= high:
        raise InputError(
            f"steps={steps}, rounds={rounds}, low={low:g}, high={high:g}: a search needs at least 1 of each"
        )
    if not formats:
        raise InputError("no formats were given; e.g. ('e3m0', 'e2m1', 'e1m2')")
    weight, x = weight.detach().float(), x.detach().float()
    for what, value in (("weight", weight), ("inputs", x)):
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"the {what} hold NaN or infinity")
    acts = list(formats if act_formats is None else act_formats)
    most = x.abs().amax(0) if absmax is None else absmax.detach().float()
    multipliers = torch.linspace(low, high, steps).tolist() if steps > 1 else [1.0]
    target = x @ weight.T
    total = float(target.double().square().sum()) or 1.0

    w_start = {f: range_scale(weight.abs().amax(1, keepdim=True), *parse_format(f)) for f in formats}
    shifts = {f: channel_shifts(most, *parse_format(f)) if preshift else None for f in acts}
    a_start = {f: range_scale(most.max(), *parse_format(f)) for f in acts}

    def rounded_inputs(f: str, scale: Tensor) -> Tensor:
        k = shifts[f]
        return round_scaled(x, scale if k is None else shifted_scale(scale, k), *parse_format(f))

    w_format, w_scale = formats[0], w_start[formats[0]]
    a_format, a_scale = (acts[0], a_start[acts[0]]) if acts else ("", None)
    w_hat = round_scaled(weight, w_scale, *parse_format(w_format))
    x_hat = x if a_scale is None else rounded_inputs(a_format, a_scale)
    before = error = _error(target, x_hat @ w_hat.T)
    for _ in range(rounds):
        best: tuple[float, str, Tensor] | None = None
        for f in formats:
            found = _best_rows(weight, x_hat, target, w_start[f], f, multipliers, variant)
            if best is None or found[0] < best[0]:
                best = (found[0], f, found[1])
        assert best is not None
        if best[0] <= error:
            error, w_format, w_scale = best
            w_hat = round_scaled(weight, w_scale, *parse_format(w_format))
        for f in acts:
            e, _ = parse_format(f)
            for scale in [a_start[f], *candidates(a_start[f], e, multipliers, variant)]:
                tried = rounded_inputs(f, scale)
                found_error = _error(target, tried @ w_hat.T)
                if found_error < error:
                    error, a_format, a_scale, x_hat = found_error, f, scale, tried
    if not error < float("inf"):
        raise NonFiniteError("the error of the layer's output is not finite")
    k = shifts[a_format] if a_format else None
    final = None if a_scale is None else (a_scale.reshape(1) if k is None else shifted_scale(a_scale, k))
    return FloatChoice(w_format, a_format, w_scale, final, k, error / total, before / total)


def _best_rows(
    weight: Tensor,
    x_hat: Tensor,
    target: Tensor,
    start: Tensor,
    name: str,
    multipliers: Sequence[float],
    variant: Variant,
) -> tuple[float, Tensor]:
    """Return the least error over candidates, row by row, and the scale of each row."""
    e, m = parse_format(name)
    best_error: Tensor | None = None
    best = start
    for scale in [start, *candidates(start, e, multipliers, variant)]:
        error = (x_hat @ round_scaled(weight, scale, e, m).T - target).square().sum(0)
        if best_error is None:
            best_error, best = error, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better.unsqueeze(1), scale, best)
    assert best_error is not None
    return float(best_error.double().sum()), best


def _error(target: Tensor, value: Tensor) -> float:
    return float((value - target).double().square().sum())
