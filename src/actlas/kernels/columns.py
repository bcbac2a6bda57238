"""Products that read only the columns whose input is not zero.

    w = pack_columns(weight, "q4")
    y = column_product(w, x)              # x [columns], zeros are skipped -> [rows]

At batch 1 a product is bound by the memory of the weights, so a skipped input saves its column's share of
the time, if columns are contiguous (the layout is in `native/columns.hpp`). Formats: `"f32"`, `"bf16"`, and
`"q8"` and `"q4"` of `kernels/packed.py`, whose scales for 32 inputs are read if one of them is active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actlas.kernels.loading import native, threads
from actlas.kernels.packed import GROUP, check_weight, round_activations

Format = Literal["f32", "bf16", "q8", "q4"]


@dataclass(frozen=True, eq=False)
class PackedColumns:
    """A weight by columns.

    Attributes:
        format: see the module docstring.
        data: uint8 `[bytes]`.
        rows, columns: size of the weight.
        scale, minimum: float32 `[columns / 32, rows]` of packed formats, for the reference.
    """

    format: Format
    data: Tensor
    rows: int
    columns: int
    scale: Tensor | None = None
    minimum: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the whole weight."""
        return self.data.numel()

    def codes(self) -> Tensor:
        """Return the integers of a packed weight, uint8 `[rows, columns]`."""
        padded = _padded(self.rows, self.format)
        body = self.data[: self.columns * padded // (2 if self.format == "q4" else 1)]
        if self.format == "q4":
            table = body.view(self.columns, -1, 64)
            table = torch.stack([table & 15, table >> 4], 2)
        else:
            table = body.view(self.columns, -1, 64)
        rows = table.reshape(self.columns, -1, 4, 4, 4).transpose(2, 3).reshape(self.columns, -1)
        return rows[:, : self.rows].T

    def dequantised(self) -> Tensor:
        """Return the weight, float32 `[rows, columns]`."""
        if self.format == "f32":
            return self.data.view(torch.float32).view(self.columns, self.rows).T
        if self.format == "bf16":
            return self.data.view(torch.bfloat16).view(self.columns, self.rows).T.float()
        assert self.scale is not None
        scale = self.scale.T.repeat_interleave(GROUP, 1)
        codes = self.codes().float()
        if self.format == "q8":
            return (codes - 128) * scale
        assert self.minimum is not None
        return codes * scale + self.minimum.T.repeat_interleave(GROUP, 1)


def pack_columns(weight: Tensor, format: Format = "f32") -> PackedColumns:
    """Pack a weight `[rows, columns]` by columns, rounding to the nearest value of the format.

    Raises:
        ValueError: an unknown format, or columns that are not a multiple of 32 for a packed one.
            It is not a matrix, or holds NaN or infinity.
    """
    if format not in ("f32", "bf16", "q8", "q4"):
        raise ValueError(f"format is {format!r}; it must be 'f32', 'bf16', 'q8' or 'q4'")
    w = check_weight(weight, format if format in ("q8", "q4") else "f32")
    rows, columns = w.shape
    if format in ("f32", "bf16"):
        turned = w.T.flatten().to(torch.float32 if format == "f32" else torch.bfloat16)
        return PackedColumns(format, turned.view(torch.uint8), rows, columns)
    groups = w.view(rows, -1, GROUP)
    if format == "q8":
        scale = (groups.abs().amax(-1) / 127).half()
        minimum = torch.zeros_like(scale)
        codes = (groups / _nonzero(scale)).round().clamp(-128, 127) + 128
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scale, minimum = ((high - low) / 15).half(), low.half()
        codes = ((groups - minimum.float().unsqueeze(-1)) / _nonzero(scale)).round().clamp(0, 15)
    padded = _padded(rows, format)
    turned = torch.zeros(columns, padded, dtype=torch.uint8)
    turned[:, :rows] = codes.view(rows, columns).T.to(torch.uint8)
    tiles = turned.view(columns, -1, 4, 4, 4).transpose(2, 3).reshape(columns, -1, 64)
    if format == "q4":
        tiles = tiles[:, 0::2] | (tiles[:, 1::2] << 4)
    parts = [tiles.flatten()]
    for values in (scale, minimum)[: 2 if format == "q4" else 1]:
        table = torch.zeros(columns // GROUP, padded, dtype=torch.float16)
        table[:, :rows] = values.T
        parts.append(table.view(torch.uint8).flatten())
    return PackedColumns(format, torch.cat(parts), rows, columns, scale.T.float(), minimum.T.float())


def column_product(w: PackedColumns, x: Tensor, *, two_bytes: bool = True, level: str = "best") -> Tensor:
    """Return `W x` for one token `[columns]`, float32 `[rows]`; columns whose input is 0 are not read.

    Args:
        w: the weight.
        x: the inputs; skipped ones are 0.
        two_bytes: see `packed_product`.
        level: the instruction set.

    Raises:
        ValueError: x has not the weight's columns.
    """
    if x.shape != (w.columns,):
        raise ValueError(f"x must be [{w.columns}], not {list(x.shape)}")
    module = native()
    if module is None or x.device.type != "cpu":
        return column_product_reference(w, x, two_bytes=two_bytes)
    out = torch.empty(w.rows)
    row = x.detach().float().contiguous()
    module.column_product(w.format, w.data, w.rows, w.columns, row, out, two_bytes, threads(), level)
    return out


def column_product_reference(w: PackedColumns, x: Tensor, *, two_bytes: bool = True) -> Tensor:
    """The same in PyTorch: a dense product with the inputs rounded as the kernel rounds them."""
    if w.format in ("q8", "q4"):
        step, rounded = round_activations(x.float().view(-1, GROUP), two_bytes)
        x = (step.unsqueeze(-1) * rounded).flatten()
    product: Tensor = (w.dequantised().to(x.device).double() @ x.double()).float()
    return product


def _nonzero(scale: Tensor) -> Tensor:
    wide = scale.float().unsqueeze(-1)
    return torch.where(wide > 0, wide, torch.ones_like(wide))


def _padded(rows: int, format: Format) -> int:
    unit = 128 if format == "q4" else 64 if format == "q8" else 1
    return -(-rows // unit) * unit
