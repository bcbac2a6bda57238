"""RankAwareLinear: large inputs exactly, the rest through a low-rank map.

    y = W (m * x) + U (V ((1 - m) * x)) + b,       m_i = 1 where |x_i| c_i >= t

with U V the best rank-r approximation of W, which comes from the eigenvectors of the smaller of W^T W and
W W^T. At full rank it is exact for every mask; at t = 0 it is W itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.swap import register_module


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U `[rows, r]` and V `[r, columns]` of the best rank-r approximation of `weight`, float64.

    Raises:
        InputError: a rank that is not between 1 and the smaller size.
    """
    rows, columns = weight.shape
    if not 1 <= rank <= min(rows, columns):
        raise InputError(f"rank is {rank}; this {rows} x {columns} map allows 1 to {min(rows, columns)}")
    w = weight.double()
    if columns <= rows:
        basis = torch.linalg.eigh(w.T @ w).eigenvectors[:, -rank:]
        return w @ basis, basis.T.contiguous()
    basis = torch.linalg.eigh(w @ w.T).eigenvectors[:, -rank:]
    return basis.contiguous(), basis.T @ w


@register_module
class RankAwareLinear(nn.Module):
    """See the module docstring.

    Args:
        in_features, out_features: sizes.
        rank: r, at least 1.
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(out_features, rank), requires_grad=False)
        self.down = nn.Parameter(torch.zeros(rank, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_buffer("factor", torch.ones(in_features))
        self.register_buffer("threshold", torch.zeros(()))

    factor: Tensor
    threshold: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        *,
        factor: Tensor,
        threshold: float,
    ) -> RankAwareLinear:
        """Build one from a layer's weight `[rows, columns]`, its low-rank map and its rule."""
        rows, columns = weight.shape
        new = cls(columns, rows, down.shape[0], bias is not None).to(weight)
        with torch.no_grad():
            new.weight.data = weight.detach()  # shared with the model: it is never written
            new.up.copy_(up)
            new.down.copy_(down)
            new.factor.copy_(factor)
            new.threshold.fill_(threshold)
            if bias is not None and new.bias is not None:
                new.bias.copy_(bias)
        return new.eval()

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}
        return {**sizes, "bias": self.bias is not None}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RankAwareLinear:
        """Build an empty one of these sizes."""
        return cls(**config)

    def mask(self, x: Tensor) -> Tensor:
        """Return which inputs go through W itself."""
        return x.abs() * self.factor >= self.threshold

    def inputs_kept(self, x: Tensor) -> Tensor:
        """Return how many inputs each row of `x` `[n, d]` keeps."""
        return self.mask(x).sum(1)

    def weights_touched(self, x: Tensor) -> Tensor:
        """Return how many weights each row of `x` needs, the low-rank map's included."""
        return self.inputs_kept(x) * self.out_features + self.rank * (self.in_features + self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.mask(x)
        zero = x.new_zeros(())
        exact = nn.functional.linear(torch.where(kept, x, zero), self.weight, self.bias)
        small = nn.functional.linear(torch.where(kept, zero, x), self.down)
        return exact + nn.functional.linear(small, self.up)
