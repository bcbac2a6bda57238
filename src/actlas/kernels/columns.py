"""Products that read only the columns whose input is not zero.

    w = pack_columns(weight, "q4")
    y = column_product(w, x)              # x [columns], zeros are skipped -> [rows]
    y = column_products(w, x)             # a few tokens, x [tokens, columns] -> [tokens, rows]

At batch 1 a product is bound by the memory of the weights, so a skipped input saves its column's share of
the time, if columns are contiguous (the layout is in `native/columns.hpp`). Formats: `"f32"`, `"bf16"`, and
`"q8"`, `"q4"` and `"q2"` as in `kernels/packed.py`, in groups of 32, 64 or 128 inputs, whose scales are read
if one input of the group is active. With groups of 32, scales are a fifth of the bytes of a q4 weight and are
nearly all read at 50% sparsity, so that a product needs 0.60 of the dense one's bytes; with 128 it is 0.53.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actlas.kernels.loading import native, threads, triton_products
from actlas.kernels.memory import in_large_pages
from actlas.kernels.packed import GROUP, check_weight, round_activations

Format = Literal["f32", "bf16", "q8", "q4", "q2"]
_BITS = {"f32": 32, "bf16": 16, "q8": 8, "q4": 4, "q2": 2}


@dataclass(frozen=True, eq=False)
class PackedColumns:
    """A weight by columns.

    Attributes:
        format: see the module docstring.
        data: uint8 `[bytes]`.
        rows, columns: size of the weight.
        scale, minimum: float32 `[columns / group, rows]` of packed formats, for the reference.
        group: inputs that share a scale.
    """

    format: Format
    data: Tensor
    rows: int
    columns: int
    scale: Tensor | None = None
    minimum: Tensor | None = None
    group: int = GROUP

    @property
    def bytes(self) -> int:
        """Memory of the whole weight."""
        return self.data.numel()

    def codes(self) -> Tensor:
        """Return the integers of a packed weight, uint8 `[rows, columns]`."""
        bits = _BITS[self.format]
        lines = _padded(self.rows, self.format) * bits // 512
        table = self.data[: self.columns * 64 * (lines | 1)].view(self.columns, -1, 64)[:, :lines]
        table = torch.stack([(table >> at) & (2**bits - 1) for at in range(0, 8, bits)], 2)
        rows = table.reshape(self.columns, -1, 4, 4, 4).transpose(2, 3).reshape(self.columns, -1)
        return rows[:, : self.rows].T

    def dequantised(self) -> Tensor:
        """Return the weight, float32 `[rows, columns]`."""
        if self.format == "f32":
            return self.data.view(torch.float32).view(self.columns, -1)[:, : self.rows].T
        if self.format == "bf16":
            return self.data.view(torch.bfloat16).view(self.columns, -1)[:, : self.rows].T.float()
        assert self.scale is not None
        scale = self.scale.T.repeat_interleave(self.group, 1)
        codes = self.codes().float()
        if self.format == "q8":
            return (codes - 128) * scale
        assert self.minimum is not None
        return codes * scale + self.minimum.T.repeat_interleave(self.group, 1)


def pack_columns(weight: Tensor, format: Format = "f32", *, group: int = GROUP) -> PackedColumns:
    """Pack a weight `[rows, columns]` by columns, rounding to the nearest value of the format.

    Args:
        weight: floating point, finite.
        format: see the module docstring.
        group: inputs that share a scale: 32, 64 or 128; of packed formats only.

    Raises:
        ValueError: an unknown format or group, or columns that are not a multiple of the group.
            It is not a matrix, or holds NaN or infinity.
    """
    if format not in _BITS:
        raise ValueError(f"format is {format!r}; it must be 'f32', 'bf16', 'q8', 'q4' or 'q2'")
    if format in ("f32", "bf16"):
        w = check_weight(weight, "f32")
        dtype = torch.float32 if format == "f32" else torch.bfloat16
        lines = -(-w.shape[0] * dtype.itemsize // 64) | 1  # see `stride` in native/columns.hpp
        turned = torch.zeros(w.shape[1], lines * 64 // dtype.itemsize, dtype=dtype)
        turned[:, : w.shape[0]] = w.T
        return PackedColumns(format, in_large_pages(turned.view(torch.uint8).flatten()), *w.shape)
    w = check_weight(weight, format, group)
    rows, columns = w.shape
    groups = w.view(rows, -1, group)
    if format == "q8":
        scale = (groups.abs().amax(-1) / 127).half()
        minimum = torch.zeros_like(scale)
        codes = (groups / _nonzero(scale)).round().clamp(-128, 127) + 128
    else:
        most = 2 ** _BITS[format] - 1
        low, high = groups.amin(-1), groups.amax(-1)
        scale, minimum = ((high - low) / most).half(), low.half()
        codes = ((groups - minimum.float().unsqueeze(-1)) / _nonzero(scale)).round().clamp(0, most)
    return pack_column_codes(
        codes.view(rows, columns).to(torch.uint8), scale, None if format == "q8" else minimum, format
    )


def pack_column_codes(
    codes: Tensor, scale: Tensor, minimum: Tensor | None = None, format: Format = "q4"
) -> PackedColumns:
    """Pack integers that a quantization method has chosen: `w = scale * code + minimum`.

    Args:
        codes: `[rows, columns]`, integers from 0 to `2^bits - 1`.
        scale: `[rows, columns / group]`, rounded to float16.
        minimum: as `scale`; for `"q8"` `None`, because it means `scale * (code - 128)`.
        format: `"q8"`, `"q4"` or `"q2"`.

    Raises:
        ValueError: codes beyond the format, or scales that do not fit.
    """
    if format not in ("q8", "q4", "q2"):
        raise ValueError(f"format is {format!r}; codes are packed as 'q8', 'q4' or 'q2'")
    (rows, columns), bits = codes.shape, _BITS[format]
    group = columns // scale.shape[1] if scale.ndim == 2 and scale.shape[1] else 0
    if group not in (32, 64, 128) or scale.shape != (rows, columns // group) or columns % group:
        raise ValueError(
            f"scale must be [rows, columns / group] with a group of 32, 64 or 128, not {list(scale.shape)}"
        )
    if (minimum is None) != (format == "q8") or (minimum is not None and minimum.shape != scale.shape):
        raise ValueError("minimum must be None for 'q8', else of the shape of scale")
    if int(codes.min()) < 0 or int(codes.max()) >= 2**bits:
        raise ValueError(f"codes of {format} lie in 0 to {2**bits - 1}")
    padded = _padded(rows, format)
    turned = torch.zeros(columns, padded, dtype=torch.uint8)
    turned[:, :rows] = codes.T.to("cpu", torch.uint8)
    tiles = turned.view(columns, -1, 4, 4, 4).transpose(2, 3).reshape(columns, -1, 8 // bits, 64)
    lines = tiles[:, :, 0].clone()
    for field in range(1, 8 // bits):
        lines |= tiles[:, :, field] << (bits * field)
    if lines.shape[1] % 2 == 0:  # see `stride` in native/columns.hpp
        lines = torch.cat([lines, lines.new_zeros(columns, 1, 64)], 1)
    parts, halves = [lines.flatten()], []
    for values in (scale,) if minimum is None else (scale, minimum):
        table = torch.zeros(columns // group, padded, dtype=torch.float16)
        table[:, :rows] = values.to("cpu", torch.float16).T
        parts.append(table.view(torch.uint8).flatten())
        halves.append(table[:, :rows].float())
    return PackedColumns(
        format,
        in_large_pages(torch.cat(parts)),
        rows,
        columns,
        halves[0],
        halves[1] if minimum is not None else None,
        group,
    )


def column_product(w: PackedColumns, x: Tensor, *, two_bytes: bool = True, level: str = "best") -> Tensor:
    """Return `W x` for one token `[columns]`, float32 `[rows]`; columns whose input is 0 are not read.

    Args:
        w: the weight.
        x: the inputs; skipped ones are 0. NaN counts as active, and makes NaN of what it reaches.
        two_bytes: see `packed_product`.
        level: the instruction set.

    Raises:
        ValueError: x has not the weight's columns.
    """
    if x.shape != (w.columns,):
        raise ValueError(f"x must be [{w.columns}], not {list(x.shape)}")
    return column_products(w, x.unsqueeze(0), two_bytes=two_bytes, level=level)[0]


def column_products(w: PackedColumns, x: Tensor, *, two_bytes: bool = True, level: str = "best") -> Tensor:
    """Return `x W^T` for a few tokens `[tokens, columns]`, float32 `[tokens, rows]`.

    Tokens are taken up to eight at a time; a column is read, once, if one of them needs it.

    Args:
        w, two_bytes, level: as for `column_product`.
        x: the inputs; skipped ones are 0.

    Raises:
        ValueError: x has not the weight's columns.
    """
    if x.ndim != 2 or x.shape[1] != w.columns:
        raise ValueError(f"x must be [tokens, {w.columns}], not {list(x.shape)}")
    if x.device.type == "cuda" and triton_products():
        found: Tensor = triton_products().column_products(w, x)  # type: ignore[union-attr]
        return found
    module = native()
    if module is None or x.device.type != "cpu":
        return column_products_reference(w, x, two_bytes=two_bytes)
    out = torch.empty(len(x), w.rows)
    rows = x.detach().float().contiguous()
    if len(x):
        module.sparse_product(
            w.format, w.data, w.rows, w.columns, w.group, rows, out, two_bytes, threads(), level
        )
    return out


def column_product_reference(w: PackedColumns, x: Tensor, *, two_bytes: bool = True) -> Tensor:
    """The same in PyTorch: a dense product with the inputs rounded as the kernel rounds them."""
    return column_products_reference(w, x.unsqueeze(0), two_bytes=two_bytes)[0]


def column_products_reference(w: PackedColumns, x: Tensor, *, two_bytes: bool = True) -> Tensor:
    """The same in PyTorch for several tokens."""
    if w.format not in ("f32", "bf16"):
        step, rounded = round_activations(x.float().view(len(x), -1, GROUP), two_bytes)
        x = (step.unsqueeze(-1) * rounded).flatten(1)
    product: Tensor = (x.double() @ w.dequantised().to(x.device).double().T).float()
    return product


def _nonzero(scale: Tensor) -> Tensor:
    wide = scale.float().unsqueeze(-1)
    return torch.where(wide > 0, wide, torch.ones_like(wide))


def _padded(rows: int, format: Format) -> int:
    unit = 512 // _BITS[format] if _BITS[format] <= 8 else 1
    return -(-rows // unit) * unit
