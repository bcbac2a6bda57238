"""Linear layers packed for decoding: 4- and 8-bit weights in the order in which one product reads them.

    w = pack(weight, "q4")             # 4 bits, a float16 scale and minimum for each row and 32 inputs
    y = packed_product(w, x)           # x [tokens, columns] -> [tokens, rows]
    w.dequantised()                    # the weights that the bytes stand for

Formats (the layout of the bytes is in `native/packed.hpp`):

    f32   the weights as they are
    q8    w = scale * (q - 128)        q 0 to 255, symmetric: scale = max |w| / 127
    q4    w = scale * q + minimum      q 0 to 15: scale = (max - min) / 15

Weights that lie on such a grid already (GGUF's Q8_0 and Q4_1, groups of 32) are packed without loss. In a
product with packed weights, activations become integers too, with a scale for each group of 32: of two
bytes (`scale = max |x| / 16256`, an error far below that of the weights), or of one (`max |x| / 127`), as
llama.cpp does. The PyTorch reference does the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from actlas.kernels.loading import native, threads

Format = Literal["f32", "q8", "q4"]
ROWS, GROUP = 16, 32


@dataclass(frozen=True, eq=False)
class Packed:
    """One packed linear layer.

    Attributes:
        format: `"f32"`, `"q8"` or `"q4"`.
        data: uint8 `[bytes]`.
        rows, columns: size of the weight.
        bias: float32 `[rows]` or `None`.
    """

    format: Format
    data: Tensor
    rows: int
    columns: int
    bias: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory that a product reads for it."""
        return self.data.numel()

    def dequantised(self) -> Tensor:
        """Return the weight that the bytes stand for, float32 `[rows, columns]`."""
        if self.format == "f32":
            return self.data.view(torch.float32).reshape(self.rows, self.columns)
        q, scale, minimum = _unpack(self)
        if self.format == "q8":
            w = (q.float() - 128) * scale.unsqueeze(-1)
        else:
            w = q.float() * scale.unsqueeze(-1) + minimum.unsqueeze(-1)
        return w.reshape(w.shape[0], -1)[: self.rows]

    def handle(self) -> Any:
        """Return the native description of this layer.

        Raises:
            ValueError: there are no native kernels here.
        """
        module = native()
        if module is None:
            raise ValueError("packed layers need the native kernels; install Actlas with a C++ compiler")
        return module.packed_linear(self.format, self.data, self.rows, self.columns, self.bias)


def pack(weight: Tensor, format: Format = "q4", bias: Tensor | None = None) -> Packed:
    """Pack a weight `[rows, columns]`, rounding to the nearest value of the format.

    Args:
        weight: floating point, finite, on any device; a contiguous float32 weight on the CPU is not copied
            for `"f32"`.
        format: see the module docstring.
        bias: `[rows]`, kept in float32.

    Raises:
        ValueError: an unknown format, or a number of columns that is not a multiple of 32.
            It is not a matrix, or holds NaN or infinity.
    """
    if format not in ("f32", "q8", "q4"):
        raise ValueError(f"format is {format!r}; it must be 'f32', 'q8' or 'q4'")
    w = check_weight(weight, format)
    rows, columns = w.shape
    b = None if bias is None else bias.detach().to("cpu", torch.float32).contiguous()
    if format == "f32":
        return Packed("f32", w.view(torch.uint8).flatten(), rows, columns, b)
    padded = torch.cat([w, w.new_zeros(-rows % ROWS, columns)]) if rows % ROWS else w
    groups = padded.view(-1, ROWS, columns // GROUP, GROUP)
    if format == "q8":
        scale = (groups.abs().amax(-1) / 127).half()
        q = (groups / _nonzero(scale).unsqueeze(-1)).round().clamp(-128, 127) + 128
        parts = [_interleave(q.to(torch.uint8)).flatten(-2), _half_bytes(scale)]
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scale, minimum = ((high - low) / 15).half(), low.half()
        q = ((groups - minimum.float().unsqueeze(-1)) / _nonzero(scale).unsqueeze(-1)).round().clamp(0, 15)
        bytes_ = _interleave(q.to(torch.uint8))
        nibbles = bytes_[..., :4, :] | (bytes_[..., 4:, :] << 4)
        parts = [nibbles.flatten(-2), _half_bytes(scale), _half_bytes(minimum)]
    return Packed(format, torch.cat(parts, -1).flatten().contiguous(), rows, columns, b)


def check_weight(weight: Tensor, format: Format) -> Tensor:
    """Return a weight as a contiguous float32 matrix on the CPU.

    Raises:
        ValueError: as `pack`.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"a weight is a float matrix [rows, columns], not {weight.dtype} {list(weight.shape)}"
        )
    columns = weight.shape[1]
    if format != "f32" and columns % GROUP:
        raise ValueError(
            f"a weight of {columns} columns cannot be packed as {format}; it needs a multiple of {GROUP}"
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
    module = native()
    if module is None or x.device.type != "cpu":
        return packed_product_reference(w, x, two_bytes=two_bytes)
    rows = x.detach().float().contiguous()
    out = torch.empty(len(rows), w.rows)
    if len(rows):
        module.packed_product(w.handle(), rows, out, two_bytes, threads(), level)
    return out


def packed_product_reference(w: Packed, x: Tensor, *, two_bytes: bool = True) -> Tensor:
    """The same in PyTorch, with sums of bytes in int32 and sums over groups in float64."""
    bias = 0.0 if w.bias is None else w.bias.to(x.device)
    if w.format == "f32":
        return x.float() @ w.dequantised().to(x.device).T + bias
    q, scale, minimum = (t.to(x.device) for t in _unpack(w))
    groups = x.float().view(len(x), -1, GROUP)
    step, rounded = round_activations(groups, two_bytes)
    weights = q.to(torch.int32) - (128 if w.format == "q8" else 0)
    dots = torch.einsum("rgi,tgi->trg", weights.double(), rounded.double())
    sums = (dots * scale.double() * step.double().unsqueeze(1)).sum(-1)
    if w.format == "q4":
        sums += torch.einsum("rg,tg->tr", minimum.double(), (step * rounded.sum(-1)).double())
    found: Tensor = sums[:, : w.rows].float() + bias
    return found


def round_activations(groups: Tensor, two_bytes: bool) -> tuple[Tensor, Tensor]:
    """Return the scale `[...]` and the integers (as floats) `[..., 32]` of groups of activations."""
    most = 16256 if two_bytes else 127
    largest = groups.abs().amax(-1)
    inverse = torch.where(largest > 0, most / largest, torch.zeros_like(largest))
    return largest / most, (groups * inverse.unsqueeze(-1)).round()


def _nonzero(scale: Tensor) -> Tensor:
    wide = scale.float()
    return torch.where(wide > 0, wide, torch.ones_like(wide))


def _interleave(q: Tensor) -> Tensor:
    """[blocks, 16, groups, 32] -> [blocks, groups, 8, 64]: four inputs of each of 16 rows together."""
    b, _, g, _ = q.shape
    return q.view(b, ROWS, g, 8, 4).permute(0, 2, 3, 1, 4).reshape(b, g, 8, 64)


def _half_bytes(values: Tensor) -> Tensor:
    """[blocks, 16, groups] float16 -> [blocks, groups, 32] uint8."""
    return values.transpose(1, 2).contiguous().view(torch.uint8)


def _unpack(w: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Return q uint8 `[padded rows, groups, 32]`, scale and minimum float32 `[padded rows, groups]`."""
    blocks, groups = -(-w.rows // ROWS), w.columns // GROUP
    four = w.format == "q4"
    table = w.data.view(blocks, groups, -1)
    size = 256 if four else 512
    body = table[..., :size].reshape(blocks, groups, -1, 64)
    if four:
        body = torch.cat([body & 15, body >> 4], 2)
    q = body.view(blocks, groups, 8, ROWS, 4).permute(0, 3, 1, 2, 4).reshape(blocks * ROWS, groups, GROUP)

    def halves(start: int) -> Tensor:
        part = table[..., start : start + 32].contiguous().view(torch.float16).float()
        return part.transpose(1, 2).reshape(blocks * ROWS, groups)

    scale = halves(size)
    return q, scale, halves(size + 32) if four else torch.zeros_like(scale)
