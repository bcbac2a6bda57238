"""Products of quantised numbers in exact integer arithmetic: the reference of every integer kernel.

A number on an asymmetric grid is `s (q - z)`. In a product of two of them only the codes need be multiplied:

    sum (x - z_x)(w - z_w) = sum x w - z_x sum w - z_w sum x + n z_x z_w

and a multiplier of four bits is enough for codes of eight, in two halves: `x = 16 hi + lo`.

The products here are computed by floating-point matrix multiplication, which is exact as long as no partial
sum leaves the 2^24 integers that float32 holds; wider numbers are split in halves first. So the results are
those of 32-bit accumulators, bit for bit, at the speed of the BLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError
from actlas.core.numbers import integers
from actlas.core.quant_linear import QuantLinear

_EXACT = 2**24
_LARGEST = 2**31 - 1


def integer_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` of integers, exact, int64.

    Args:
        x: integers `[..., in]`.
        weight: integers `[out, in]`.

    Raises:
        ShapeError: they do not fit. InputError: no integers, or a sum that 32 bits cannot hold.
    """
    if x.is_floating_point() or weight.is_floating_point():
        raise InputError(f"integer_linear multiplies integers, not {x.dtype} and {weight.dtype}")
    if x.shape[-1] != weight.shape[-1]:
        raise ShapeError(f"inputs of {x.shape[-1]} do not fit a weight of {list(weight.shape)}")
    n = x.shape[-1]
    most_x, most_w = _most(x), _most(weight)
    if n * most_x * most_w < _EXACT:
        return F.linear(x.float(), weight.float()).long()
    if n * most_x * most_w > 2**53:
        raise InputError(f"{n} products of up to {most_x} x {most_w} exceed what is exact in 53 bits")
    if most_x <= 255 and n * 16 * most_w < _EXACT:
        hi, lo = split_halves(x)
        return 16 * F.linear(hi.float(), weight.float()).long() + F.linear(lo.float(), weight.float()).long()
    return F.linear(x.double(), weight.double()).long()


def split_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `hi`, `lo` with `x = 16 hi + lo` and lo from 0 to 15: codes of eight bits for a 4-bit
    multiplier."""
    return x >> 4, x & 15


def affine_product(x: Tensor, x_zero: Tensor | int, weight: Tensor, weight_zero: Tensor | int) -> Tensor:
    """Return `sum (x - z_x)(w - z_w)` from the product of the codes alone and three corrections, int64.

    Args:
        x: codes `[..., in]`.
        x_zero: zero point of the inputs, one, or one a row `[..., 1]`.
        weight: codes `[out, in]`.
        weight_zero: zero point of the weight, one, or one a row `[out]`.
    """
    n = x.shape[-1]
    x, weight = x.long(), weight.long()
    zx = torch.as_tensor(x_zero).long()
    zw = torch.as_tensor(weight_zero).long()
    return integer_linear(x, weight) - zx * weight.sum(-1) - x.sum(-1, keepdim=True) * zw + n * zx * zw


def integer_forward(layer: QuantLinear, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return what a layer gives on integer hardware: codes times codes, then one scale a row, then the bias.

        y_i = s_i a (sum_j (q_ij - z_i) x_j) + b_i,    x_j = clip(round(x / a))

    Args:
        layer: integer weights with one scale a row, inputs rounded with one static scale a (which is 1 after
            pre-executed dequantisation), and nothing else.
        x: inputs `[..., in]`.
        dtype: in which the accumulators are scaled.

    Raises:
        InputError: a layer that integer hardware cannot run so, with the reason.
    """
    act, spec = layer.act, layer.spec
    if act is None or act.params is None or act.params.scale.numel() != 1 or act.spec.grid != "int":
        said = "inputs are not rounded" if act is None else f"inputs are {act.spec.name}"
        raise InputError(f"an integer product needs inputs with one static scale; this layer's {said}")
    if spec.grid != "int" or spec.granularity == "group":
        raise InputError(f"an integer product needs one scale a row of the weight, not {spec.name}")
    for name in ("up", "outlier_index", "input_scale", "input_shift", "rotate"):
        if getattr(layer, name, None) is not None:
            raise InputError(f"the layer has a part in floating point ({name}); it has no integer product")
    weight = integers(layer.unpacked, spec, layer.params)
    taken = input_integers(layer, x)
    total = integer_linear(taken, weight)
    if int(total.abs().max()) > _LARGEST:
        raise InputError(f"a sum of {int(total.abs().max())} exceeds a 32-bit accumulator")
    scale = layer.scale.to(dtype).flatten() * act.params.scale.to(dtype).flatten()
    out = total.to(dtype) * scale
    return out if layer.bias is None else out + layer.bias.to(dtype)


def input_integers(layer: QuantLinear, x: Tensor) -> Tensor:
    """Return the integers that stand for a layer's inputs under its static scale, int64 `[..., in]`."""
    act = layer.act
    assert act is not None and act.params is not None
    step = act.params.scale.to(torch.promote_types(x.dtype, torch.float32)).flatten()
    code = (x.to(step.dtype) / step).round()
    half = 2 ** (act.spec.bits - 1)
    if act.spec.symmetric:
        return code.clamp(-half, half - 1).long()
    zero = torch.zeros(1) if act.params.zero is None else act.params.zero
    low = -zero.to(code).flatten()
    return code.clamp(low, low + 2**act.spec.bits - 1).long()


def _most(x: Tensor) -> int:
    return int(x.abs().max()) if x.numel() else 0
