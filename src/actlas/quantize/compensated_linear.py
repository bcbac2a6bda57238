"""A quantised layer with a low-rank branch whose factors are stored in 8 bits.

    y = W_hat x + U^T (V^T x),        U^T [rank, out] and V^T [rank, in] in 8 bits, a scale for each component

Factors in 16 bits need no class of their own: `QuantLinear` takes them as `low_rank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.numbers import QuantSpec
from actlas.core.quant_linear import QuantLinear
from actlas.core.swap import register_module


@register_module
class CompensatedLinear(nn.Module):
    """A quantised layer with a low-rank branch, its factors in 8 bits with a scale for each component.

    Args:
        config: of the layer and of the two factors, each a `QuantLinear`'s.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.base = QuantLinear(config["base"])
        self.left = QuantLinear(config["left"])  # U^T, [rank, out]
        self.right = QuantLinear(config["right"])  # V^T, [rank, in]
        self.in_features, self.out_features = self.base.in_features, self.base.out_features

    @classmethod
    def of(cls, base: QuantLinear, up: Tensor, down: Tensor, bits: int = 8) -> CompensatedLinear:
        """Return a layer with the branch `up @ down`, both rounded to `bits`."""
        spec = QuantSpec(bits, symmetric=True, granularity="channel")
        left = QuantLinear.of(_plain(up.T.contiguous()), spec, where="the left factor")
        right = QuantLinear.of(_plain(down), spec, where="the right factor")
        made = cls({"base": base.config(), "left": left.config(), "right": right.config()})
        made.base, made.left, made.right = base, left, right
        return made.eval()

    @property
    def keep_dense(self) -> bool:
        """Keep dequantised weights between calls."""
        return self.base.keep_dense

    @keep_dense.setter
    def keep_dense(self, value: bool) -> None:
        for part in (self.base, self.left, self.right):
            part.keep_dense = value

    def drop(self) -> None:
        """Forget the dequantised weights."""
        for part in (self.base, self.left, self.right):
            part.drop()

    @property
    def weight(self) -> Tensor:
        """The linear map of both parts, float32 `[out, in]`."""
        branch = self.left.dequantized().T @ self.right.dequantized()
        scale = self.base.input_scale
        return self.base.weight + (branch if scale is None else branch / scale)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return self.base.bias

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that the layer keeps."""
        return self.base.stored_bytes + self.left.stored_bytes + self.right.stored_bytes

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.base.input_scale is None else x / self.base.input_scale.to(x.dtype)
        out: Tensor = self.base(x)
        return out + F.linear(self.right(h), self.left.dequantized().T.to(h.dtype))

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {"base": self.base.config(), "left": self.left.config(), "right": self.right.config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompensatedLinear:
        """Build an empty one."""
        return cls(config)


def _plain(matrix: Tensor) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return linear
