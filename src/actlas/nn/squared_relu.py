"""The squared-ReLU MLP of PLM: no gate, sparse by itself.

    y = W_down relu(W_up x)^2

At equal parameters its hidden width is 1.5 times that of a gated MLP (two matrices instead of three). Which
neurons are zero is decided by W_up x itself, so only W_down is skipped at decoding unless a predictor is
used.

Sources: So et al. 2021, "Primer"; PLM 2025 (arXiv 2503.12167); Zhang et al. 2024, "ReLU^2 wins".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.sparse_activations import ReLU2
from actlas.core.swap import register_module


@register_module
class ReLU2MLP(nn.Module):
    """`W_down relu(W_up x)^2`.

    Args:
        d: channels of input and output.
        hidden: neurons; `matching(d, gated)` has the parameters of a gated MLP.
        bias: whether the linear maps have one.

    Raises:
        InputError: sizes that are not positive.
    """

    def __init__(self, d: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        if min(d, hidden) < 1:
            raise InputError(f"d={d}, hidden={hidden}: both must be at least 1")
        self.up_proj = nn.Linear(d, hidden, bias=bias)
        self.act_fn = ReLU2()
        self.down_proj = nn.Linear(hidden, d, bias=bias)

    @staticmethod
    def matching(gated_hidden: int) -> int:
        """Return the hidden width with as many parameters as a gated MLP of this width."""
        return round(1.5 * gated_hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.up_proj(x)))
        return y

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            "d": self.up_proj.in_features,
            "hidden": self.up_proj.out_features,
            "bias": self.up_proj.bias is not None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ReLU2MLP:
        """Build an untrained one of these sizes."""
        return cls(**config)
