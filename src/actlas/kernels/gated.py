"""A gated MLP for one token that reads only what its active neurons need.

    a = f(W_gate x),   h_j = a_j (U_j . x) where |a_j| >= threshold_j, else 0,   y = W_down h

    mlp = pack_gated(gate, up, down, "q4")
    y, active = gated_mlp(mlp, x, threshold=0.1, activation="silu")

Inputs of the gate that are 0 are skipped; of the up projection only the rows of active neurons are read (each
row is contiguous: f32, bf16, or GGUF's Q8_0 and Q4_1 blocks), of the down projection only their columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.kernels.columns import PackedColumns, column_products_reference, pack_columns
from actlas.kernels.loading import native, threads
from actlas.kernels.packed import GROUP, Packed, pack, packed_product_reference

Format = Literal["f32", "bf16", "q8", "q4"]
_ROWS = {"f32": 0, "bf16": 1, "q8": 2, "q4": 3}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True, eq=False)
class GatedWeights:
    """The three weights of a gated MLP.

    Attributes:
        gate: by columns, `[hidden, d]`.
        up: by rows, `[hidden, d]`; what the bytes of `up_rows` stand for.
        up_rows: uint8 `[bytes]`, row after row (see `native/gated.hpp`).
        down: by columns, `[d, hidden]`.
    """

    gate: PackedColumns
    up: Packed
    up_rows: Tensor
    down: PackedColumns

    @property
    def bytes(self) -> int:
        """Memory of all three."""
        return self.gate.bytes + self.up_rows.numel() + self.down.bytes


def pack_gated(gate: Tensor, up: Tensor, down: Tensor, format: Format = "f32") -> GatedWeights:
    """Pack the weights of a gated MLP, in groups of 32.

    Args:
        gate, up: `[hidden, d]`.
        down: `[d, hidden]`.
        format: of all three.

    Raises:
        ValueError: shapes that do not fit, or as `pack`.
    """
    if gate.shape != up.shape or down.shape != gate.shape[::-1]:
        raise ValueError(
            f"gate and up must be [hidden, d] and down [d, hidden], not {list(gate.shape)}, "
            f"{list(up.shape)} and {list(down.shape)}"
        )
    if format not in _ROWS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(map(repr, _ROWS))}")
    rows = pack(up, format)
    return GatedWeights(pack_columns(gate, format), rows, _row_bytes(rows), pack_columns(down, format))


def gated_mlp(
    w: GatedWeights,
    x: Tensor,
    *,
    threshold: Tensor | float = 0.0,
    activation: str = "silu",
    two_bytes: bool = True,
    level: str = "best",
) -> tuple[Tensor, int]:
    """Return y `[d]` for one token `[d]`, and how many neurons were active.

    Args:
        w: the weights.
        x: the inputs; those that are 0 are skipped. With NaN every neuron is active, and y is NaN.
        threshold: `[hidden]` or one number: neurons with |f(gate)| below it are left out; 0 leaves none out.
        activation: f, one of `ACTIVATIONS`.
        two_bytes, level: see `packed_product`.

    Raises:
        ValueError: x or the threshold has another size, or there is no such activation.
    """
    hidden, d = w.gate.rows, w.gate.columns
    if x.shape != (d,):
        raise ValueError(f"x must be [{d}], not {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    least = torch.as_tensor(threshold, dtype=torch.float32).expand(hidden).contiguous()
    module = native()
    if module is None or x.device.type != "cpu":
        return gated_mlp_reference(w, x, threshold=least, activation=activation, two_bytes=two_bytes)
    out = torch.empty(w.down.rows)
    active = module.gated_product(
        w.gate.format, w.gate.data, w.gate.group, _ROWS[w.up.format], w.up_rows,
        w.down.format, w.down.data, w.down.group, least, list(ACTIVATIONS).index(activation),
        x.detach().float().contiguous(), out, two_bytes, threads(), level,
    )  # fmt: skip
    return out, int(active)


def gated_mlp_reference(
    w: GatedWeights, x: Tensor, *, threshold: Tensor, activation: str = "silu", two_bytes: bool = True
) -> tuple[Tensor, int]:
    """The same in PyTorch."""
    row = x.float().unsqueeze(0)
    a = ACTIVATIONS[activation](column_products_reference(w.gate, row, two_bytes=two_bytes))
    off = a.abs() < threshold.to(a.device)
    up = packed_product_reference(w.up, row, two_bytes=two_bytes)
    h = torch.where(off, torch.zeros_like(a), a * up)
    return column_products_reference(w.down, h, two_bytes=two_bytes)[0], int((~off).sum())


def _row_bytes(w: Packed) -> Tensor:
    """Rows one after the other, as `native/gated.hpp` has them."""
    if w.format in ("f32", "bf16"):
        return w.data
    q, scale, minimum = w.codes()
    groups = q.view(w.rows, -1, GROUP)
    if w.format == "q4":
        groups = groups[..., :16] | groups[..., 16:] << 4
    parts = [groups]
    for t in (scale, minimum):
        if t is not None:
            parts.append(t.half().unsqueeze(-1).view(torch.uint8).view(w.rows, -1, 2))
    return torch.cat(parts, -1).flatten().contiguous()
