"""LOS-Net: a small transformer over an output signature, one token for each row.

    s <- (s - mean) / std,  a <- (a - mean) / std            of each row, over the vocabulary
    z_n = [ W_s s_n ;  a_n w_1 + a_n 2 (0.5 - r_n / V) w_2 ]   W_s: K -> m/2,  w_1, w_2 in R^(m/2)
    z = z + positions, a CLS token before them, 1 or 2 encoder layers, a linear map of CLS: one logit

s are the sorted log-probabilities of a row, a the log-probability of the token that came, r its rank and V
the size of the vocabulary. The encoding lets the network compute gated sums of a, Min-K% among them. With
`ranked_only=True` the sorted part is left out (z = the second half, as wide as m): the baseline ATP+R of
the paper. Rows that a text has not got are masked in the attention; the released code has them as zeros
without a mask.

Source: "Learning on LLM Output Signatures for gray-box LLM Behavior Analysis" (2025), its code
(`Architectures.py`, rank encoding "scale").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ShapeError
from actlas.core.swap import register_module


@register_module
class LOSNet(nn.Module):
    """The network.

    Args:
        top_k: K, log-probabilities of a row; 0 with `ranked_only`.
        vocabulary: V.
        rows: greatest number of rows.
        width: m, divisible by 2 and by the number of heads.
        layers, heads: of the encoder.
        dropout: in the encoder.
        ranked_only: leave the sorted log-probabilities out.
    """

    def __init__(
        self,
        top_k: int,
        vocabulary: int,
        rows: int = 100,
        width: int = 128,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.0,
        ranked_only: bool = False,
    ) -> None:
        super().__init__()
        if width < 2 or width % 2 or width % heads:
            raise InputError(f"width is {width}; it must be even and divisible by the {heads} heads")
        if not ranked_only and not 1 <= top_k <= vocabulary:
            raise InputError(f"top_k is {top_k}; it must lie between 1 and the vocabulary's {vocabulary}")
        if rows < 1 or layers < 1:
            raise InputError(f"rows is {rows} and layers {layers}; both must be at least 1")
        self.top_k, self.vocabulary, self.rows = top_k, vocabulary, rows
        self.width, self.layers, self.heads, self.dropout = width, layers, heads, dropout
        self.ranked_only = ranked_only
        half = width if ranked_only else width // 2
        self.sorted_in = None if ranked_only else nn.Linear(top_k, half, bias=False)
        self.actual_in = nn.Parameter(torch.randn(2, half) / half**0.5)
        self.positions = nn.Parameter(0.02 * torch.randn(rows, width))
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        layer = nn.TransformerEncoderLayer(width, heads, width, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def encode(self, sorted: Tensor, actual: Tensor, rank: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return z without positions, `[n, rows, m]`; arguments as in `forward`."""
        std = std.clamp_min(1e-6)
        a = ((actual - mean) / std).unsqueeze(-1)
        scale = 2 * (0.5 - rank.to(a) / self.vocabulary).unsqueeze(-1)
        ranked = a * self.actual_in[0] + a * scale * self.actual_in[1]
        if self.sorted_in is None:
            return ranked
        if sorted.shape[-1] != self.top_k:
            raise ShapeError(
                f"this LOSNet reads {self.top_k} log-probabilities a row, not {sorted.shape[-1]}"
            )
        s = (sorted - mean.unsqueeze(-1)) / std.unsqueeze(-1)
        return torch.cat([self.sorted_in(s), ranked], -1)

    def forward(
        self, sorted: Tensor, actual: Tensor, rank: Tensor, mean: Tensor, std: Tensor, mask: Tensor
    ) -> Tensor:
        """Return one logit for each text.

        Args:
            sorted: `[n, rows, K]` log-probabilities, descending.
            actual, rank, mean, std: `[n, rows]`; see `actlas.measure.output_signature`.
            mask: bool `[n, rows]`, True at real rows.

        Returns:
            `[n]`.

        Raises:
            ShapeError: more rows than positions, or another K.
        """
        n, rows = mask.shape
        if rows > self.rows:
            raise ShapeError(f"this LOSNet reads {self.rows} rows, not {rows}; cut the signature")
        z = self.encode(sorted, actual, rank, mean, std) + self.positions[:rows]
        z = torch.cat([self.cls.expand(n, 1, -1), z], 1)
        padding = torch.cat([torch.zeros_like(mask[:, :1]), ~mask], 1)
        out: Tensor = self.head(self.encoder(z, src_key_padding_mask=padding)[:, 0])
        return out[:, 0]

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            "top_k": self.top_k,
            "vocabulary": self.vocabulary,
            "rows": self.rows,
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "dropout": self.dropout,
            "ranked_only": self.ranked_only,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LOSNet:
        """Build an untrained one of these sizes."""
        return cls(**config)
