"""Linear layers packed for decoding: weights of few bits in the order in which one product reads them.

    w = pack(weight, "q4")             # 4 bits, a float16 scale and minimum for each row and 32 inputs
    y = packed_product(w, x)           # x [tokens, columns] -> [tokens, rows]
    w.dequantised()                    # the weights that the bytes stand for

Formats (the layout of the bytes is in `native/packed.hpp`):

    q8 q4 q3 q2   integers of as many bits, with float16 scales for groups of 32, 64 or 128 inputs of a row:
                      offset none       w = scale * (q - 2^(bits - 1))
                      offset minimum    w = scale * q + offset
                      offset integer    w = scale * (q - offset)
    f4            floats of 1 sign, 2 exponent and 1 mantissa bits (e2m1), times such a scale
    e4m3 e5m2     8-bit floats, with a float32 scale for each row, or for groups of it
    bf16 f32      as they are

Weights that lie on such a grid already (GGUF's Q8_0 and Q4_1: groups of 32) are packed without loss, and
`pack_codes` takes integers and scales that a method has chosen. In a product with packed integers or f4,
activations become integers too, with a scale for each run of 32: of two bytes (`scale = max |x| / 16256`, an
error far below that of the weights), or of one (`max |x| / 127`), as llama.cpp does. The PyTorch reference
does the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from actlas.kernels.loading import native, threads, triton_products
from actlas.kernels.memory import in_large_pages
from actlas.kernels.packed_layout import FLOAT4, ROWS, RUN, bytes_of, codes_of, nearest_float4

Format = Literal["f32", "bf16", "q8", "q4", "q3", "q2", "f4", "e4m3", "e5m2"]
Offset = Literal["none", "minimum", "integer"]
GROUP = 32
__all__ = ["BITS", "GROUP", "ROWS", "Format", "Offset", "Packed", "pack", "pack_codes", "packed_product"]
BITS = {"f32": 32, "bf16": 16, "q8": 8, "q4": 4, "q3": 3, "q2": 2, "f4": 4, "e4m3": 8, "e5m2": 8}
_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, eq=False)
class Packed:
    """One packed linear layer.

    Attributes:
        format: see the module docstring.
        data: uint8 `[bytes]`.
        rows, columns: size of the weight.
        bias: float32 `[rows]` or `None`.
        group: inputs that share a scale.
        offset: of integer formats; `None`: `"none"` for q8 and f4, else `"minimum"`.
    """

    format: Format
    data: Tensor
    rows: int
    columns: int
    bias: Tensor | None = None
    group: int = GROUP
    offset: Offset | None = None

    @property
    def bytes(self) -> int:
        """Memory that a product reads for it."""
        return self.data.numel()

    @property
    def kind(self) -> Offset:
        """The offset, in words."""
        return self.offset or ("none" if self.format in ("q8", "f4") else "minimum")

    def codes(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes uint8 `[rows, columns]`, scale and offset float32 `[rows, groups]`."""
        with_offset = self.kind != "none"
        return codes_of(self.data, self.rows, self.columns, BITS[self.format], self.group, with_offset)

    def dequantised(self) -> Tensor:
        """Return the weight that the bytes stand for, float32 `[rows, columns]`."""
        if self.format in ("f32", "bf16"):
            dtype = torch.float32 if self.format == "f32" else torch.bfloat16
            return self.data.view(dtype).view(self.rows, self.columns).float()
        if self.format in _FLOAT8:
            n = self.rows * self.columns
            codes = self.data[:n].view(_FLOAT8[self.format]).float().view(self.rows, -1, self.group)
            scale = self.data[n:].clone().view(torch.float32).view(self.rows, -1)
            return (codes * scale.unsqueeze(-1)).view(self.rows, self.columns)
        values, scale, offset = self.centred()
        w = values.view(self.rows, -1, self.group) * scale.unsqueeze(-1)
        if offset is not None:
            w = w + offset.unsqueeze(-1)
        return w.view(self.rows, self.columns)

    def centred(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return v `[rows, columns]`, scale and offset `[rows, groups]` with `w = scale v + offset`."""
        q, scale, offset = self.codes()
        if self.format == "f4":
            return torch.tensor(FLOAT4, dtype=torch.float32, device=q.device)[q.long()], scale, None
        if offset is None:
            return q.float() - 2 ** (BITS[self.format] - 1), scale, None
        return q.float(), scale, offset if self.kind == "minimum" else -scale * offset

    def handle(self) -> Any:
        """Return the native description of this layer, for the decoder.

        Raises:
            ValueError: there are no native kernels here.
        """
        module = native()
        if module is None:
            raise ValueError("packed layers need the native kernels; install Actlas with a C++ compiler")
        return module.packed_linear(
            self.format, self.data, self.rows, self.columns, self.bias, self.group, self.kind
        )


def pack(
    weight: Tensor,
    format: Format = "q4",
    bias: Tensor | None = None,
    *,
    group: int | None = None,
    offset: Offset | None = None,
) -> Packed:
    """Pack a weight `[rows, columns]`, rounding to the nearest value of the format.

    Args:
        weight: floating point, finite, on any device; a contiguous float32 weight on the CPU is not copied
            for `"f32"`.
        format: see the module docstring.
        bias: `[rows]`, kept in float32.
        group: inputs that share a scale; `None`: 32, and the whole row for 8-bit floats.
        offset: of integer formats, see the module docstring; `None`: `"none"` for q8, else `"minimum"`.

    Raises:
        ValueError: an unknown format, or a number of columns that is not a multiple of the group.
            It is not a matrix, or holds NaN or infinity.
    """
    if format not in BITS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(map(repr, BITS))}")
    if offset is not None and (offset not in get_args(Offset) or (format[0] != "q" and offset != "none")):
        raise ValueError(f"offset is {offset!r}; of {format} it must be 'none'{_kinds(format)}")
    b = None if bias is None else bias.detach().to("cpu", torch.float32).contiguous()
    if format in ("f32", "bf16"):
        w = check_weight(weight, "f32")
        stored = w if format == "f32" else in_large_pages(w.bfloat16())
        return Packed(format, stored.view(torch.uint8).flatten(), w.shape[0], w.shape[1], b)
    if format in _FLOAT8:
        group = group or (weight.shape[1] if weight.ndim == 2 else GROUP)
        w = check_weight(weight, format, group if group in (32, 64, 128) else None)
        rows, columns = w.shape
        if columns % group:
            raise ValueError(f"a weight of {columns} columns does not divide into groups of {group}")
        most = torch.finfo(_FLOAT8[format]).max
        groups = w.view(rows, -1, group)
        step = groups.abs().amax(-1) / most
        codes = (groups / _nonzero(step).unsqueeze(-1)).clamp(-most, most).to(_FLOAT8[format])
        data = in_large_pages(
            torch.cat([codes.view(torch.uint8).flatten(), step.view(torch.uint8).flatten()])
        )
        return Packed(format, data, rows, columns, b, group)
    group = group or GROUP
    w = check_weight(weight, format, group)
    kind = offset or ("none" if format in ("q8", "f4") else "minimum")
    groups = w.view(w.shape[0], -1, group)
    levels = 2 ** BITS[format] - 1
    zero: Tensor | None = None
    if format == "f4":
        scale = (groups.abs().amax(-1) / 12).half()
        q = nearest_float4(groups / _nonzero(scale).unsqueeze(-1))
    elif kind == "none":
        scale = (groups.abs().amax(-1) / (levels // 2)).half()
        q = (groups / _nonzero(scale).unsqueeze(-1)).round() + levels // 2 + 1
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        if kind == "integer":  # zero is a value of the grid
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / levels).half()
        step = _nonzero(scale)
        zero = low.half() if kind == "minimum" else (-low / step).round().clamp(0, levels).half()
        shifted = (groups - zero.float().unsqueeze(-1)) if kind == "minimum" else groups
        q = (shifted / step.unsqueeze(-1)).round()
        if kind == "integer":
            q = q + zero.float().unsqueeze(-1)
    codes = q.clamp(0, levels).to(torch.uint8).view(w.shape)
    data = bytes_of(codes, BITS[format], scale, zero)
    return Packed(format, data, w.shape[0], w.shape[1], b, group, offset)


def pack_codes(
    codes: Tensor,
    scale: Tensor,
    offset_values: Tensor | None,
    format: Format,
    *,
    offset: Offset = "minimum",
    bias: Tensor | None = None,
) -> Packed:
    """Pack the integers that a quantization method has chosen.

    Args:
        codes: `[rows, columns]`, from 0 to `2^bits - 1`.
        scale: `[rows, columns / group]`, rounded to float16.
        offset_values: the same, minima or integers as `offset` says; `None` for `"none"`.
        format: `"q8"`, `"q4"`, `"q3"`, `"q2"` or `"f4"`.
        offset: what `offset_values` mean.
        bias: `[rows]`.

    Raises:
        ValueError: codes beyond the format, a group other than 32, 64 or 128, or shapes that do not fit.
    """
    if format not in ("q8", "q4", "q3", "q2", "f4"):
        raise ValueError(f"format is {format!r}; codes are packed as 'q8', 'q4', 'q3', 'q2' or 'f4'")
    (rows, columns), bits = codes.shape, BITS[format]
    group = columns // scale.shape[1] if scale.ndim == 2 and scale.shape[1] else 0
    if group not in (32, 64, 128) or columns % group or scale.shape != (rows, columns // group):
        raise ValueError(
            f"scale must be [rows, columns / group] with a group of 32, 64 or 128, not {list(scale.shape)}"
        )
    if (offset_values is None) != (offset == "none") or (
        offset_values is not None and offset_values.shape != scale.shape
    ):
        raise ValueError("offset_values must have the shape of scale, and be None for the offset 'none'")
    if int(codes.min()) < 0 or int(codes.max()) >= 2**bits:
        raise ValueError(f"codes of {format} lie in 0 to {2**bits - 1}")
    zero = None if offset_values is None else offset_values.cpu()
    data = bytes_of(codes.to("cpu", torch.uint8), bits, scale.cpu(), zero)
    b = None if bias is None else bias.detach().to("cpu", torch.float32).contiguous()
    return Packed(format, data, rows, columns, b, group, offset)


def check_weight(weight: Tensor, format: str, group: int | None = GROUP) -> Tensor:
    """Return a weight as a contiguous float32 matrix on the CPU.

    Raises:
        ValueError: as `pack`.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"a weight is a float matrix [rows, columns], not {weight.dtype} {list(weight.shape)}"
        )
    columns = weight.shape[1]
    if group is not None and group not in (32, 64, 128):
        raise ValueError(f"group is {group}; weights are packed in groups of 32, 64 or 128")
    if format != "f32" and group is not None and columns % group:
        fits = [g for g in (32, 64, 128) if columns % g == 0]
        raise ValueError(
            f"a weight of {columns} columns cannot be packed as {format}; it needs a multiple of {group}"
            + (f" (groups of {', '.join(map(str, fits))} fit)" if fits else "")
        )
    w = weight.detach().to("cpu", torch.float32).contiguous()
    if not bool(torch.isfinite(w.sum(0)).all()):
        raise ValueError("the weight holds NaN or infinity; all must be finite")
    return w


def packed_product(w: Packed, x: Tensor, *, two_bytes: bool = True, level: str = "best") -> Tensor:
    """Return `x W^T + b` for rows `[tokens, columns]`, float32 `[tokens, rows]`.

    Args:
        w: the weights.
        x: activations.
        two_bytes: round the activations of packed products to two bytes, else to one.
        level: the instruction set: `"best"`, `"avx512"`, `"avx2"` or `"baseline"`.

    Raises:
        ValueError: x has not the weight's columns.
    """
    if x.ndim != 2 or x.shape[1] != w.columns:
        raise ValueError(f"x must be [tokens, {w.columns}], not {list(x.shape)}")
    if x.device.type == "cuda" and w.format[0] in "qf" and w.format != "f32" and triton_products():
        found: Tensor = triton_products().packed_product(w, x)  # type: ignore[union-attr]
        return found
    module = native()
    if module is None or x.device.type != "cpu":
        return packed_product_reference(w, x, two_bytes=two_bytes)
    rows = x.detach().float().contiguous()
    out = torch.empty(len(rows), w.rows)
    if len(rows):
        module.rows_product(
            w.format, w.data, w.rows, w.columns, w.group, w.kind, w.bias, rows, out, two_bytes, threads(),
            level,
        )  # fmt: skip
    return out


def packed_product_reference(w: Packed, x: Tensor, *, two_bytes: bool = True) -> Tensor:
    """The same in PyTorch, with sums in float64."""
    bias = 0.0 if w.bias is None else w.bias.to(x.device)
    if w.format in ("f32", "bf16", *_FLOAT8):
        found: Tensor = (x.double() @ w.dequantised().to(x.device).double().T).float() + bias
        return found
    values, scale, offset = (t if t is None else t.to(x.device).double() for t in w.centred())
    assert values is not None and scale is not None
    step, rounded = round_activations(x.float().view(len(x), -1, RUN), two_bytes)
    runs = step.double().unsqueeze(-1) * rounded.double()  # [tokens, columns / 32, 32]
    groups = runs.view(len(x), -1, w.group)
    dots = torch.einsum("rgi,tgi->trg", values.view(w.rows, -1, w.group), groups)
    sums = (dots * scale).sum(-1)
    if offset is not None:
        sums = sums + groups.sum(-1) @ offset.T
    found = sums.float() + bias
    return found


def round_activations(groups: Tensor, two_bytes: bool) -> tuple[Tensor, Tensor]:
    """Return the scale `[...]` and the integers (as floats) `[..., 32]` of runs of activations."""
    most = 16256 if two_bytes else 127
    largest = groups.abs().amax(-1)
    inverse = torch.where(largest > 0, most / largest, torch.zeros_like(largest))
    return largest / most, (groups * inverse.unsqueeze(-1)).round()


def _nonzero(scale: Tensor) -> Tensor:
    wide = scale.float()
    return torch.where(wide > 0, wide, torch.ones_like(wide))


def _kinds(format: str) -> str:
    return ", 'minimum' or 'integer'" if format[0] == "q" else ""
