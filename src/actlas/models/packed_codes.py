"""Quantised layers as the decoding kernels hold them: the same codes, in the order of a product.

    packed_codes(layer)        # Packed, or None where the kernels have no such format
    column_codes(layer)        # PackedColumns, for layers that skip inputs

Integers of 2 to 8 bits in groups of 32, 64, 128 or a multiple (a longer group repeats its scale) keep their
codes and float16 scales: nothing is rounded a second time. Layers with other parts or formats are packed from
their dequantised weights instead.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from actlas.core.quant_linear import QuantLinear
from actlas.kernels.columns import PackedColumns, pack_column_codes
from actlas.kernels.packed import Format, Packed, pack_codes

_GROUPS = (128, 64, 32)


def packed_codes(layer: nn.Module) -> Packed | None:
    """Return a quantised layer's codes for the kernels, or `None` if they do not hold it as it is."""
    found = _codes(layer)
    if found is None:
        return None
    quant, codes, scale, zero, format = found
    if zero is None:
        return pack_codes(codes, scale, None, format, offset="none", bias=quant.bias)
    kind = "minimum" if quant.spec.zero_point == "float" else "integer"
    return pack_codes(codes, scale, zero, format, offset=kind, bias=quant.bias)  # type: ignore[arg-type]


def column_codes(layer: nn.Module) -> PackedColumns | None:
    """Return a quantised layer's codes by columns, or `None`. Offsets become float16 minima."""
    found = _codes(layer)
    if found is None:
        return None
    quant, codes, scale, zero, format = found
    if format == "q8":
        return pack_column_codes(codes, scale, None, "q8") if zero is None else None
    columns: Literal["q4", "q2"] = "q2" if format == "q2" else "q4"
    step = scale.float()
    if zero is None:
        minimum = -step * (1 << (quant.spec.bits - 1))
    elif quant.spec.zero_point == "float":
        minimum = zero.float()
    else:
        minimum = -step * zero.float()
    return pack_column_codes(codes, scale, minimum.half(), columns)


def _codes(layer: nn.Module) -> tuple[QuantLinear, Tensor, Tensor, Tensor | None, Format] | None:
    if not isinstance(layer, QuantLinear):
        return None
    spec = layer.spec
    other = (
        layer.up,
        layer.outlier_index,
        layer.input_scale,
        layer.input_shift,
        layer.rotate,
        layer.act_spec,
    )
    if any(part is not None for part in other) or spec.grid != "int" or spec.centred or spec.bits > 8:
        return None
    size = {"group": spec.group_size or 0, "channel": layer.in_features}.get(spec.granularity, 0)
    group = next((g for g in _GROUPS if size and size % g == 0), None)
    params = layer.params
    if group is None or params.scale.dtype != torch.float16:
        return None
    repeat = layer.in_features // group // params.scale.shape[1]
    scale = params.scale.repeat_interleave(repeat, 1)
    zero = None if params.zero is None else params.zero.float().repeat_interleave(repeat, 1)
    format: Format = {2: "q2", 3: "q3", 4: "q4"}.get(spec.bits, "q8")  # type: ignore[assignment]
    codes = layer.unpacked
    if format == "q8" and spec.bits < 8:
        if zero is not None:
            return None
        codes = codes + (128 - (1 << (spec.bits - 1)))
    return layer, codes, scale, zero, format
