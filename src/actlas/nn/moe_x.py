"""MoE-X: a mixture of ReLU experts that routes each token to the experts predicted to be sparsest.

    y = sum over the k best j of w_j W_dec_j ReLU(W_enc_j x),     w = softmax(-erf(t_j))

t_j comes from the mean and the variance of the encoders' weights (`sparsity_router`), so the router has
nothing to learn. Neurons become readable because two things make them rare: ReLU, and a router that
prefers experts with few active neurons. Source: "Mixture of Experts Made Intrinsically Interpretable"
(2025). Train it with a load-balance loss (`balance_loss`, coefficient 0.01 in the Switch paper).

`activation="gelu"` is the paper's ablation "router only"; `SwitchMoE(activation="relu")` is "ReLU experts
only".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actlas.core.swap import register_module
from actlas.nn.experts import MixtureOfExperts, Routing
from actlas.nn.sparsity_router import SparsityRouter


@register_module
class MoEX(MixtureOfExperts):
    """A MoE-X layer.

    Gated experts (Llama) have features ReLU(gate) * up: the gate decides whether a neuron is active, so
    the router's statistics are those of the gate's weights.

    Args:
        d, hidden, experts, top_k, activation, bias, gated, dtype: see `MixtureOfExperts`.
        floor: predicted share of active neurons below which an expert gains nothing by being emptier;
            default one neuron in two tokens, `1 / (2 hidden)`. 0 is as published.
    """

    kind = "moe-x"
    standard_activation = "relu"

    def __init__(
        self,
        d: int,
        hidden: int,
        experts: int = 8,
        top_k: int = 2,
        *,
        activation: str = "",
        bias: bool = False,
        gated: bool = False,
        floor: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            d, hidden, experts, top_k, activation=activation, bias=bias, gated=gated, dtype=dtype
        )
        self.router = SparsityRouter(top_k, min(0.49, 0.5 / hidden) if floor is None else floor)

    def route(self, x: Tensor) -> Routing:
        routing: Routing = self.router(x, self.w_enc, self.b_enc)
        return routing

    def predicted_l0(self, x: Tensor) -> Tensor:
        """Return how many neurons of each expert the router expects to be active, `[..., M]`."""
        return self.router.predicted_l0(x, self.w_enc, self.b_enc)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "floor": self.router.floor}
