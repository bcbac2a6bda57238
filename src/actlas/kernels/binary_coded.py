"""Weights as scaled sums of signs, multiplied by table look-up (LUT-GEMM, Park et al., ICLR 2024).

    w[r, j] = offset[r, g] + sum_i alpha[i, r, g] s_i[r, j],     s = -1 or +1,   g = j // group

Eight inputs have only 256 signed sums; they are computed once, and every row looks its sums up by eight of
its signs, with no multiplication and no dequantisation. The kernel does the same with tables of 16 sums for
four inputs, because those fit a vector register. Evenly spaced integers are a special case, exactly:

    s (c - z),  c = sum_i 2^i beta_i   ->   alpha_i = s 2^i / 2,   s_i = 2 beta_i - 1,
                                            offset = sum_i alpha_i - s z

    w = BinaryCoded.from_integers(codes, scale, zero, bits=3)
    y = lookup_product(w, x)                          # x [tokens, columns] -> [tokens, rows]

Time grows with the bits, and with the tokens: this is for one token, or a few, at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from actlas.kernels.loading import native, threads, triton_products

_ROWS, _RUN = 16, 32


@dataclass(frozen=True, eq=False)
class BinaryCoded:
    """A binary-coded weight.

    Attributes:
        signs: uint8 `[bits, rows, columns / 8]`; bit j of a byte is set where the sign of input j is +1.
        alpha: `[bits, rows, groups]`, float16 or float32.
        offset: `[rows, groups]` of the same type, or `None`.
    """

    signs: Tensor
    alpha: Tensor
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        bits, rows, eighths = self.signs.shape
        groups = self.alpha.shape[-1]
        if self.signs.dtype != torch.uint8 or not 1 <= bits <= 8:
            raise ValueError(f"signs must be uint8 [1 to 8 bits, rows, columns / 8], not {self.signs.dtype}")
        if self.alpha.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"alpha must be float16 or float32, not {self.alpha.dtype}")
        if self.alpha.shape != (bits, rows, groups) or groups == 0 or 8 * eighths % groups:
            raise ValueError(f"alpha must be [{bits}, {rows}, groups], not {list(self.alpha.shape)}")
        if self.offset is not None and (
            self.offset.shape != (rows, groups) or self.offset.dtype != self.alpha.dtype
        ):
            raise ValueError(f"offset must be [{rows}, {groups}] of {self.alpha.dtype}")
        if self.group % 8:
            raise ValueError(f"a group has {self.group} inputs; it must be a multiple of 8")

    @classmethod
    def of(cls, signs: Tensor, alpha: Tensor, offset: Tensor | None = None) -> BinaryCoded:
        """Make one of signs `[bits, rows, columns]`, of which positive numbers (and true) mean +1."""
        if signs.ndim != 3 or signs.shape[2] % 8:
            raise ValueError(
                f"signs must be [bits, rows, columns], columns a multiple of 8, not {list(signs.shape)}"
            )
        bits = (signs > 0).to(torch.uint8).view(*signs.shape[:2], -1, 8)
        packed = torch.zeros(bits.shape[:3], dtype=torch.uint8, device=signs.device)
        for j in range(8):
            packed |= bits[..., j] << j
        return cls(packed, alpha, offset)

    @classmethod
    def from_integers(cls, codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> BinaryCoded:
        """Write `scale (codes - zero)` as signs, exactly.

        Args:
            codes: `[rows, columns]`, from 0 to `2^bits - 1`.
            scale, zero: `[rows, groups]`; the result has the type of `scale`.
            bits: of a code.
        """
        if int(codes.min()) < 0 or int(codes.max()) >= 2**bits:
            raise ValueError(f"codes of {bits} bits lie in 0 to {2**bits - 1}")
        beta = torch.stack([codes.long() >> i & 1 for i in range(bits)])
        alpha = torch.stack([scale * 2.0 ** (i - 1) for i in range(bits)])
        offset = (alpha.double().sum(0) - scale.double() * zero.double()).to(scale.dtype)
        return cls.of(beta, alpha, offset)

    @property
    def bits(self) -> int:
        """Signs of a weight."""
        return self.signs.shape[0]

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.signs.shape[1]

    @property
    def columns(self) -> int:
        """Input channels."""
        return 8 * self.signs.shape[2]

    @property
    def group(self) -> int:
        """Inputs that share scales."""
        return self.columns // self.alpha.shape[2]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits: signs, scales and offsets."""
        extra = self.alpha.numel() + (0 if self.offset is None else self.offset.numel())
        return (8 * self.signs.numel() + 8 * self.alpha.element_size() * extra) / (self.rows * self.columns)

    def sign_values(self) -> Tensor:
        """Return -1 and +1, float32 `[bits, rows, columns]`."""
        shifts = torch.arange(8, device=self.signs.device)
        return (2 * (self.signs.unsqueeze(-1) >> shifts & 1).float() - 1).flatten(-2)

    def dequantised(self) -> Tensor:
        """Return the weight, float32 `[rows, columns]`."""
        signs = self.sign_values().view(self.bits, self.rows, -1, self.group)
        w = (signs * self.alpha.float().unsqueeze(-1)).sum(0)
        if self.offset is not None:
            w = w + self.offset.float().unsqueeze(-1)
        return w.view(self.rows, self.columns)

    @cached_property
    def _laid_out(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Bytes of signs, alpha and offset in the order of `native/lookup.hpp`."""
        pad = -self.rows % _ROWS

        def padded(t: Tensor) -> Tensor:  # [..., rows, n] -> [..., blocks, 16, n]
            grown = torch.nn.functional.pad(t.cpu(), (0, 0, 0, pad))
            return grown.view(*t.shape[:-2], -1, _ROWS, t.shape[-1])

        words = padded(self.signs).view(self.bits, -1, _ROWS, self.columns // _RUN, 4)
        signs = words.permute(3, 1, 0, 2, 4).contiguous()
        alpha = padded(self.alpha).permute(3, 1, 0, 2).contiguous()
        offset = None if self.offset is None else padded(self.offset).permute(2, 0, 1).contiguous()
        flat = [t if t is None else t.view(torch.uint8).flatten() for t in (signs, alpha, offset)]
        return flat[0], flat[1], flat[2]  # type: ignore[return-value]


def lookup_product(w: BinaryCoded, x: Tensor, *, level: str = "best") -> Tensor:
    """Return `x W^T` for rows `[tokens, columns]`, float32 `[tokens, rows]`.

    Args:
        w: the weight; the kernel takes groups of a multiple of 32.
        x: activations; they are not rounded.
        level: the instruction set.

    Raises:
        ValueError: x has not the weight's columns.
    """
    if x.ndim != 2 or x.shape[1] != w.columns:
        raise ValueError(f"x must be [tokens, {w.columns}], not {list(x.shape)}")
    if x.device.type == "cuda" and triton_products():
        found: Tensor = triton_products().lookup_product(w, x)  # type: ignore[union-attr]
        return found
    module = native()
    if module is None or x.device.type != "cpu" or w.group % _RUN:
        return lookup_product_reference(w, x)
    out = torch.empty(len(x), w.rows)
    half = w.alpha.dtype == torch.float16
    if len(x):
        module.lookup_product(
            *w._laid_out, half, w.rows, w.columns, w.group, w.bits, x.detach().float().contiguous(), out,
            threads(), level,
        )  # fmt: skip
    return out


def lookup_product_reference(w: BinaryCoded, x: Tensor) -> Tensor:
    """The same in PyTorch: a dense product with the weight that the signs stand for."""
    product: Tensor = x.float() @ w.dequantised().to(x.device).T
    return product


@dataclass
class Counts:
    """Operations of a product by look-up.

    Attributes:
        adds: to build tables and to add up looked-up sums.
        lookups: of a sum by eight signs.
        multiplies: with alpha and with offsets.
    """

    adds: int = 0
    lookups: int = 0
    multiplies: int = 0


def table_product(w: BinaryCoded, x: Tensor, counts: Counts | None = None) -> Tensor:
    """The paper's algorithm step by step for one token `[columns]`, with what it costs; slow, for tests.

    Args:
        w: the weight.
        x: one token.
        counts: operations are added here.
    """
    c = counts if counts is not None else Counts()
    x = x.double()
    tables = torch.zeros(w.columns // 8, 256, dtype=torch.float64)
    for table, eight in zip(tables, x.view(-1, 8), strict=True):
        table[0] = -eight.sum()
        c.adds += 8
        for j in range(8):
            table[1 << j : 2 << j] = table[: 1 << j] + 2 * eight[j]
            c.adds += 1 << j
    keys = w.signs.long()  # [bits, rows, columns / 8]
    found = tables[torch.arange(keys.shape[2]), keys]
    c.lookups += keys.numel()
    sums = found.view(w.bits, w.rows, -1, w.group // 8).sum(-1)
    c.adds += keys.numel()
    y = (sums * w.alpha.double()).sum((0, 2))
    c.multiplies += w.alpha.numel()
    if w.offset is not None:
        y = y + w.offset.double() @ x.view(-1, w.group).sum(-1)
        c.multiplies += w.offset.numel()
    return y
