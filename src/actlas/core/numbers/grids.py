"""Scales of a tensor, codes of its entries, and back: the one place where numbers are rounded.

    params = params_of(w, spec)             # scales [rows, groups], zero points, from the range of the values
    codes = encode(w, spec, params)         # integers of w's shape, 0 to 2^bits - 1
    w_hat = decode(codes, spec, params)     # float32
    w_hat = quantize(w, spec)               # all in one, in w's dtype

Equations, in groups that share a scale s:

    int, zero_point "int"     s = (max - min) / (2^b - 1), z = round(-min / s) in [0, 2^b - 1]
                              (the range holds 0),  q = clip(round(x / s) + z, 0, 2^b - 1),  x_hat = s (q - z)
    int, zero_point "float"   q = clip(round((x - min) / s), 0, 2^b - 1),  x_hat = s q + min
    int, symmetric            s = max|x| / (2^(b-1) - 1), q = clip(round(x / s), -2^(b-1), 2^(b-1) - 1)
    int, centred              x_hat = s (q - (2^b - 1) / 2), s = 2 max|x| / (2^b - 1)
    float                     s = max|x| / largest level
    mx                        s = 2^(floor(log2 max|x|) - exponent of the largest level)
    nvfp4                     s = t e4m3(max|x| / (6 t)),  t = max|X| / (6 * 448) over the tensor

All-zero groups get scale 1. Numbers are computed in float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers.floats import float_codes, float_values, largest, round_to_float
from actlas.core.numbers.spec import QuantSpec
from actlas.core.numbers.tables import (
    code_signs,
    greedy_signs,
    log2_codes,
    log2_values,
    nearest,
    nf4_levels,
    signed_sums,
)

_HALF_LEAST, _HALF_MOST = 6.2e-5, 6.5e4


@dataclass(frozen=True)
class QuantParams:
    """Scales and zero points.

    Attributes:
        scale: `[rows, groups]`; of binary codes `[rows, groups, bits]`.
        zero: `[rows, groups]`: the integer zero point, or the minimum; `None`: there is none.
        outer: a scale of the whole tensor (nvfp4), which `scale` already contains.
    """

    scale: Tensor
    zero: Tensor | None = None
    outer: float = 1.0

    def stored(self, spec: QuantSpec) -> QuantParams:
        """Return them as they are stored: rounded to 16 bits where 16 bits can hold all of them.

        Codes must be made with what is stored. Scales of microscaling formats are stored exactly in 8 bits.
        """
        if spec.grid in ("mx", "nvfp4", "log2"):
            return self
        parts = [self.scale.abs()]
        if self.zero is not None and spec.zero_point == "float":
            parts.append(self.zero.abs())
        values = torch.cat([p.flatten().float() for p in parts])
        values = values[values > 0]
        if len(values) and (float(self.scale.abs().min()) < _HALF_LEAST or float(values.max()) > _HALF_MOST):
            return replace(
                self, scale=self.scale.float(), zero=None if self.zero is None else self.zero.float()
            )
        zero = self.zero
        if zero is not None and spec.zero_point == "float":
            zero = zero.half()
        return replace(self, scale=self.scale.half(), zero=zero)

    def to(self, device: torch.device) -> QuantParams:
        """Return them on a device."""
        return replace(
            self, scale=self.scale.to(device), zero=None if self.zero is None else self.zero.to(device)
        )

    @property
    def scale_bits(self) -> int:
        """How many bits a scale takes."""
        return self.scale.element_size() * 8


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(like.shape)


def ranges(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of each group, `[rows, groups]`."""
    groups = _wide(spec.groups(x))
    low, high = groups.aminmax(dim=-1)
    return low, high


def params_of(
    x: Tensor,
    spec: QuantSpec,
    low: Tensor | None = None,
    high: Tensor | None = None,
    where: str = "the tensor",
) -> QuantParams:
    """Return scales and zero points for the range of x, or for given ends of the range `[rows, groups]`.

    Raises:
        NonFiniteError: x holds NaN or infinities. InputError: the group size does not divide the rows.
    """
    if x.numel() == 0:
        raise InputError(f"{where} is empty; a range needs at least one value")
    if low is None or high is None:
        found = ranges(x, spec)
        low = found[0] if low is None else low
        high = found[1] if high is None else high
    if not (bool(torch.isfinite(low).all()) and bool(torch.isfinite(high).all())):
        raise NonFiniteError(f"{where} holds NaN or infinite values; numbers on a grid must be finite")
    low, high = _wide(low), _wide(high)
    most = torch.maximum(low.abs(), high.abs())
    one = torch.ones_like(most)
    bits = spec.bits
    if spec.grid == "int":
        if spec.scale_rule == "gaussian":
            from actlas.core.numbers.ranges import gaussian_scale

            rms = _wide(spec.groups(x)).square().mean(-1).sqrt()
            most = gaussian_scale(bits) * rms
        if spec.centred:
            scale = 2 * most / (2**bits - 1)
            return QuantParams(torch.where(scale > 0, scale, one))
        if spec.symmetric:
            scale = most / (2 ** (bits - 1) - 1)
            return QuantParams(torch.where(scale > 0, scale, one))
        if spec.zero_point == "int":
            low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / (2**bits - 1)
        if spec.zero_point == "float":
            return QuantParams(torch.where(scale > 0, scale, one), low)
        scale = torch.where(scale > 0, scale, one)
        return QuantParams(scale, (-low / scale).round().clamp(0, 2**bits - 1))
    if spec.grid in ("float", "mx", "nvfp4"):
        e = spec.exp_bits or 2
        top = largest(e, bits - 1 - e)
        if spec.grid == "float":
            return QuantParams(torch.where(most > 0, most / top, one))
        if spec.grid == "mx":
            exponent = torch.frexp(most).exponent - torch.frexp(torch.tensor(top)).exponent
            return QuantParams(torch.where(most > 0, torch.ldexp(one, exponent.clamp(-127, 127)), one))
        outer = float(most.max()) / (6 * 448) or 1.0
        inner = round_to_float(most / 6 / outer, 4, 3)
        return QuantParams(torch.where(inner > 0, inner * outer, one * outer * 2.0**-9), None, outer)
    if spec.grid == "table":
        return QuantParams(torch.where(most > 0, most, one))
    if spec.grid == "log2":
        return QuantParams(one)
    return QuantParams(greedy_signs(_wide(spec.groups(x)), bits)[0])


def encode(x: Tensor, spec: QuantSpec, params: QuantParams) -> Tensor:
    """Return the codes of x, integers of its shape, 0 to `2^bits - 1` (uint8, or int32 over 8 bits).

    Raises:
        InputError: values that the format has no codes for.
    """
    groups = _wide(spec.groups(x))
    scale = params.scale.to(groups)
    bits, top = spec.bits, 2**spec.bits - 1
    if spec.grid == "binary":
        return code_signs(groups, scale).reshape(x.shape)
    s = scale.unsqueeze(-1)
    if spec.grid == "int":
        if spec.centred:
            code = (groups / s + top / 2).round().clamp(0, top)
        elif spec.symmetric:
            half = 2 ** (bits - 1)
            code = (groups / s).round().clamp(-half, half - 1) + half
        else:
            assert params.zero is not None
            zero = params.zero.to(groups).unsqueeze(-1)
            code = (
                ((groups - zero) / s).round() if spec.zero_point == "float" else (groups / s).round() + zero
            )
            code = code.clamp(0, top)
        whole: Tensor = code.to(torch.uint8 if bits <= 8 else torch.int32)
        return whole.reshape(x.shape)
    if spec.grid in ("float", "mx", "nvfp4"):
        e = spec.exp_bits or 2
        return float_codes(round_to_float(groups / s, e, bits - 1 - e), e, bits - 1 - e).reshape(x.shape)
    if spec.grid == "table":
        return nearest(groups / s, nf4_levels()).to(torch.uint8).reshape(x.shape)
    if bool((groups < 0).any()):
        raise InputError(
            f"{spec.name} holds values from 0 to 1 (probabilities); the tensor has negative ones"
        )
    return log2_codes(groups, bits).reshape(x.shape)


def integers(codes: Tensor, spec: QuantSpec, params: QuantParams) -> Tensor:
    """Return what integer arithmetic works with, int32 of the codes' shape: `q - z`, or q of symmetric ones.

    Raises:
        InputError: the format is not one of integers with an integer zero point.
    """
    if spec.grid != "int" or spec.centred or (not spec.symmetric and spec.zero_point == "float"):
        raise InputError(f"{spec.name} has no integers; they need an integer zero point, or symmetry")
    groups = spec.groups(codes).int()
    if spec.symmetric:
        return _shaped(groups - 2 ** (spec.bits - 1), codes)
    assert params.zero is not None
    return _shaped(groups - params.zero.int().unsqueeze(-1), codes)


def decode(codes: Tensor, spec: QuantSpec, params: QuantParams) -> Tensor:
    """Return what codes stand for, float32 (or the scales' wider dtype), of the codes' shape."""
    groups = spec.groups(codes)
    scale = _wide(params.scale).to(codes.device)
    if spec.grid == "binary":
        return signed_sums(scale).gather(-1, groups.long()).reshape(codes.shape)
    s = scale.unsqueeze(-1)
    if spec.grid == "int":
        if spec.centred:
            value = s * (groups.to(s) - (2**spec.bits - 1) / 2)
        elif not spec.symmetric and spec.zero_point == "float":
            assert params.zero is not None
            value = s * groups.to(s) + params.zero.to(s).unsqueeze(-1)
        elif spec.symmetric:
            value = s * (groups.to(s) - 2 ** (spec.bits - 1))
        else:
            assert params.zero is not None
            value = s * (groups.to(s) - params.zero.to(s).unsqueeze(-1))
        return _shaped(value, codes)
    if spec.grid in ("float", "mx", "nvfp4"):
        e = spec.exp_bits or 2
        return (float_values(groups, e, spec.bits - 1 - e).to(s) * s).reshape(codes.shape)
    if spec.grid == "table":
        return (nf4_levels().to(s)[groups.long()] * s).reshape(codes.shape)
    return log2_values(codes, spec.bits)


def quantize(
    x: Tensor, spec: QuantSpec, params: QuantParams | None = None, where: str = "the tensor"
) -> Tensor:
    """Return x on the grid, same shape and dtype: `decode(encode(x))`.

    Args:
        x: floating point.
        spec: the format.
        params: scales; default: those of x's own range (dynamic quantization).
        where: what x is, for messages.
    """
    if params is None:
        params = params_of(x, spec, where=where)
    return decode(encode(x, spec, params), spec, params).to(x.dtype)


def representable(spec: QuantSpec, params: QuantParams) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value that each group can hold, `[rows, groups]` float32."""
    scale = _wide(params.scale)
    if spec.grid == "binary":
        total = scale.abs().sum(-1)
        return -total, total
    if spec.grid == "int":
        top = 2**spec.bits - 1
        if spec.centred:
            return -scale * top / 2, scale * top / 2
        if spec.symmetric:
            half = 2 ** (spec.bits - 1)
            return -scale * half, scale * (half - 1)
        assert params.zero is not None
        zero = params.zero.to(scale)
        if spec.zero_point == "float":
            return zero, zero + scale * top
        return -scale * zero, scale * (top - zero)
    if spec.grid in ("float", "mx", "nvfp4"):
        e = spec.exp_bits or 2
        most = scale * largest(e, spec.bits - 1 - e)
        return -most, most
    if spec.grid == "table":
        return -scale, scale
    return torch.zeros_like(scale), torch.ones_like(scale)
