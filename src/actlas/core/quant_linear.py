"""QuantLinear: a linear layer that is stored as codes and scales.

    y = W_hat Q_a(R (x - shift) / s) + U D x' + b

    layer = QuantLinear.of(linear, QuantSpec.parse("int4-g64"))
    layer.weight                    # what the layer multiplies with, float32 [out, in]
    layer.stored_bytes              # codes, scales, zero points, bias and everything else that is kept

The parts that quantization methods add are optional: activations on a grid (`ActQuant`), a scale and a shift
of the inputs that could not be folded away, an online Hadamard rotation R of the inputs (the codes are then
those of the rotated weight), a low-rank branch on the inputs before they are rounded, and single weights that
are kept in 16 bits. The layer is saved as it is stored, and loaded from data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError
from actlas.core.hadamard import block_hadamard
from actlas.core.layout import weight_matrix
from actlas.core.numbers import (
    QuantParams,
    QuantSpec,
    decode,
    encode,
    pack,
    params_of,
    quantize,
    unpack,
)
from actlas.core.swap import register_module


@dataclass(frozen=True)
class ActQuant:
    """How a layer's inputs are rounded.

    Attributes:
        spec: the format; `"channel"` is one scale a token.
        params: a static range: one scale, or one a column `[1, columns]`. `None`: dynamic.
        clip: share of the range that is kept (dynamic ranges).
    """

    spec: QuantSpec
    params: QuantParams | None = None
    clip: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return x `[..., columns]` on the grid."""
        if self.params is not None:
            return round_static(x, self.spec, self.params)
        if self.clip == 1.0:
            return quantize(x, self.spec, where="the activations")
        params = params_of(x, self.spec)
        zero = params.zero
        return quantize(x, self.spec, QuantParams(params.scale * self.clip, zero, params.outer))


def round_static(x: Tensor, spec: QuantSpec, params: QuantParams) -> Tensor:
    """Return x `[..., columns]` on a grid with fixed scales: one, or one a column."""
    if params.scale.numel() == 1:
        whole = QuantSpec(**{**spec.__dict__, "granularity": "tensor", "group_size": None})
        return quantize(x, whole, params)
    if params.scale.numel() != x.shape[-1]:
        raise ShapeError(f"{params.scale.numel()} static scales do not fit inputs of {x.shape[-1]} columns")
    columns = QuantSpec(**{**spec.__dict__, "granularity": "channel", "group_size": None})
    zero = None if params.zero is None else params.zero.reshape(-1, 1)
    flat = x.reshape(-1, x.shape[-1]).T.contiguous()
    done = quantize(flat, columns, QuantParams(params.scale.reshape(-1, 1), zero, params.outer))
    return done.T.reshape(x.shape)


@register_module
class QuantLinear(nn.Module):
    """See the module's text; make one with `of`.

    Args:
        config: sizes, formats and which parts there are, as `config()` returns it.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_shift: Tensor | None
    act_scale: Tensor | None
    act_zero: Tensor | None
    up: Tensor | None
    down: Tensor | None
    outlier_index: Tensor | None
    outlier_value: Tensor | None

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._config = dict(config)
        c = self._config
        self.in_features, self.out_features = int(c["in_features"]), int(c["out_features"])
        self.spec = QuantSpec.parse(c["spec"])
        self.act_spec = QuantSpec.parse(c["act"]) if c.get("act") else None
        self.act_clip = float(c.get("act_clip", 1.0))
        self.rotate: int | None = c.get("rotate")
        self.outer = float(c.get("outer", 1.0))
        rows, columns = self.out_features, self.in_features
        n = rows * columns
        bits = self.spec.bits
        size = n if bits >= 8 else -(-n // 8) * bits
        self._hold("codes", torch.empty(size, dtype=torch.uint8 if bits <= 8 else torch.int32))
        groups = self.spec.groups(torch.empty(rows, columns, device="meta")).shape[:2]
        shape = (*groups, bits) if self.spec.grid == "binary" else groups
        self._hold("scale", torch.empty(shape, dtype=getattr(torch, c["scale_dtype"])))
        zero = c.get("zero_dtype")
        self._hold("zero", torch.empty(groups, dtype=getattr(torch, zero)) if zero else None)
        self._hold("bias", torch.empty(rows) if c["bias"] else None)
        self._hold("input_scale", torch.empty(columns) if c.get("input_scale") else None)
        self._hold("input_shift", torch.empty(columns) if c.get("input_shift") else None)
        width = c.get("act_scales", 0)
        self._hold("act_scale", torch.empty(1, width) if width else None)
        self._hold("act_zero", torch.empty(1, width) if width and c.get("act_zero") else None)
        rank, kept = c.get("rank", 0), c.get("outliers", 0)
        half = torch.float16
        self._hold("up", torch.empty(rows, rank, dtype=half) if rank else None)
        self._hold("down", torch.empty(rank, columns, dtype=half) if rank else None)
        self._hold("outlier_index", torch.empty(kept, dtype=torch.int32) if kept else None)
        self._hold("outlier_value", torch.empty(kept, dtype=half) if kept else None)
        #: Keep the dequantised weight between calls; set while an edit is installed.
        self.keep_dense = False
        self._dense: Tensor | None = None

    def _hold(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value)

    @classmethod
    def of(
        cls,
        linear: nn.Module,
        spec: QuantSpec | str,
        *,
        params: QuantParams | None = None,
        codes: Tensor | None = None,
        act: ActQuant | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
        outliers: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_shift: Tensor | None = None,
        rotate: int | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        where: str = "the layer",
    ) -> QuantLinear:
        """Return a linear layer with its weight in a number format.

        Args:
            linear: `nn.Linear`, `Conv1D`, or anything with a `weight` `[out, in]`.
            spec: the format of the weight.
            params: scales; rounded to what is stored. Default: from the weight's range.
            codes: codes `[out, in]`, made with `params.stored(spec)`; default: round to nearest.
            act: format of the inputs.
            low_rank: (up `[out, r]`, down `[r, in]`), kept in float16.
            outliers: `[out, in]`, 0 where there is none: weights that replace the dequantised ones, float16.
            input_scale: `[in]`: inputs are divided by it. The codes are those of `weight * input_scale`,
                which the caller has multiplied in (`weight` is the multiplied one).
            input_shift: `[in]`, subtracted from the inputs; the caller has corrected the bias.
            rotate: block size of the online Hadamard rotation of the inputs; the weight is rotated here
                unless `codes` are given.
            weight, bias: instead of the layer's own.
            where: the layer's name, for messages.

        Raises:
            InputError: the group size does not divide the inputs, or parts that do not fit.
            NonFiniteError: the weight holds NaN or infinities.
        """
        spec = QuantSpec.parse(spec)
        if spec.grid == "log2":
            raise InputError(
                f"{where}: {spec.name} holds probabilities, not weights; take int, fp, nf4 or binary"
            )
        matrix = (weight_matrix(linear) if weight is None else weight).detach()
        own = getattr(linear, "bias", None) if bias is None else bias
        rows, columns = matrix.shape
        spec.check(columns, where)
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if codes is None:
            if rotate:
                wide = block_hadamard(wide, rotate)
            if outliers is not None:
                wide = torch.where(outliers != 0, torch.zeros_like(wide), wide)
            params = (params or params_of(wide, spec, where=where)).stored(spec)
            codes = encode(wide, spec, params)
        elif params is None:
            raise InputError(f"{where}: codes need the scales that they were made with")
        else:
            params = params.stored(spec)
        if codes.shape != matrix.shape:
            raise ShapeError(f"{where}: codes are {list(codes.shape)}; the weight is {list(matrix.shape)}")
        static = act.params if act is not None else None
        scale, outer = _stored_scale(params, spec)
        zero = None
        if params.zero is not None:
            whole = spec.zero_point == "int"
            zero = params.zero.to(torch.uint8 if spec.bits <= 8 else torch.int32) if whole else params.zero
        config = {
            "in_features": columns,
            "out_features": rows,
            "spec": spec.name,
            "bias": own is not None,
            "scale_dtype": str(scale.dtype).removeprefix("torch."),
            "zero_dtype": None if zero is None else str(zero.dtype).removeprefix("torch."),
            "outer": outer,
            "act": act.spec.name if act is not None else None,
            "act_clip": act.clip if act is not None else 1.0,
            "act_scales": static.scale.numel() if static is not None else 0,
            "act_zero": static is not None and static.zero is not None,
            "rank": low_rank[0].shape[1] if low_rank is not None else 0,
            "outliers": int((outliers != 0).sum()) if outliers is not None else 0,
            "rotate": rotate,
            "input_scale": input_scale is not None,
            "input_shift": input_shift is not None,
        }
        layer = cls(config)
        layer.codes = pack(codes, spec.bits) if spec.bits <= 8 else codes.flatten()
        layer.scale, layer.zero = scale.contiguous(), zero
        layer.bias = None if own is None else own.detach().float().clone()
        layer.input_scale = None if input_scale is None else input_scale.detach().float()
        layer.input_shift = None if input_shift is None else input_shift.detach().float()
        if static is not None:
            layer.act_scale = static.scale.detach().float().reshape(1, -1)
            layer.act_zero = None if static.zero is None else static.zero.float().reshape(1, -1)
        if low_rank is not None:
            up, down = low_rank
            if up.shape != (rows, down.shape[0]) or down.shape[1] != columns:
                raise ShapeError(
                    f"{where}: a low-rank branch of {list(up.shape)} and {list(down.shape)} does not fit "
                    f"a weight of {rows} x {columns}"
                )
            layer.up, layer.down = up.detach().half(), down.detach().half()
        if outliers is not None and config["outliers"]:
            flat = outliers.detach().flatten()
            index = flat.nonzero().flatten()
            layer.outlier_index, layer.outlier_value = index.int(), flat[index].half()
        return layer.to(matrix.device).eval()

    # -- what is stored -------------------------------------------------------------------------

    @property
    def params(self) -> QuantParams:
        """Scales and zero points, as numbers."""
        scale = self.scale
        if self.spec.grid == "mx":
            scale = torch.ldexp(torch.ones(scale.shape, device=scale.device), scale.int() - 127)
        elif self.spec.grid == "nvfp4":
            scale = scale.float() * self.outer
        return QuantParams(scale, self.zero, self.outer)

    @property
    def unpacked(self) -> Tensor:
        """The codes, integers `[out, in]`."""
        shape = (self.out_features, self.in_features)
        return unpack(self.codes, self.spec.bits, shape) if self.spec.bits <= 8 else self.codes.view(shape)

    @property
    def act(self) -> ActQuant | None:
        """How inputs are rounded."""
        if self.act_spec is None:
            return None
        static = None if self.act_scale is None else QuantParams(self.act_scale, self.act_zero)
        return ActQuant(self.act_spec, static, self.act_clip)

    def dequantized(self) -> Tensor:
        """Return the matrix of codes and outliers, float32 `[out, in]` (in the rotated basis, if any)."""
        matrix = decode(self.unpacked, self.spec, self.params)
        if self.outlier_index is not None and self.outlier_value is not None:
            matrix.view(-1)[self.outlier_index.long()] = self.outlier_value.float()
        return matrix

    @property
    def weight(self) -> Tensor:
        """The linear map from the layer's inputs to its outputs, without rounding of activations, float32."""
        matrix = self.dequantized()
        if self.rotate:
            matrix = block_hadamard(matrix, self.rotate)
        if self.up is not None and self.down is not None:
            matrix = matrix + self.up.float() @ self.down.float()
        return matrix if self.input_scale is None else matrix / self.input_scale

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that the layer keeps."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, the bias not counted."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return 8 * (self.stored_bytes - bias) / (self.in_features * self.out_features)

    # -- a module -------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self._dense is None or self._dense.device != x.device:
            matrix = self.dequantized()
            self._dense = matrix if self.keep_dense else None
        else:
            matrix = self._dense
        h = x
        if self.input_shift is not None:
            h = h - self.input_shift.to(h.dtype)
        if self.input_scale is not None:
            h = h / self.input_scale.to(h.dtype)
        branch = None
        if self.up is not None and self.down is not None:
            branch = F.linear(F.linear(h, self.down.to(h.dtype)), self.up.to(h.dtype))
        if self.rotate:
            h = block_hadamard(h, self.rotate)
        act = self.act
        if act is not None:
            h = act(h)
        out = F.linear(h, matrix.to(h.dtype), None if self.bias is None else self.bias.to(h.dtype))
        return out if branch is None else out + branch

    def drop(self) -> None:
        """Forget the dequantised weight."""
        self._dense = None

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantLinear:
        """Build an empty one of these sizes and formats."""
        return cls(config)

    def extra_repr(self) -> str:
        """Return sizes and formats."""
        act = f", inputs {self.act_spec.name}" if self.act_spec is not None else ""
        return f"{self.in_features}, {self.out_features}, {self.spec.name}{act}"


def _stored_scale(params: QuantParams, spec: QuantSpec) -> tuple[Tensor, float]:
    if spec.grid == "mx":
        return (torch.frexp(params.scale).exponent - 1 + 127).clamp(0, 254).to(torch.uint8), 1.0
    if spec.grid == "nvfp4":
        return (params.scale / params.outer).to(torch.float8_e4m3fn), params.outer
    return params.scale, params.outer
