"""BlockFFN: a mixture of experts whose router lets each token choose how many experts it runs.

    A0 = R x,  A1 = ReLU(A0),  A = w * A1 / sqrt(mean(A1^2) + eps)                 R [M, d], w [M], 1 at the
    start
    y  = sum over i with A1_i > 0 of A_i f_i(x),     f_i(x) = W_dec_i a(W_enc_i x)

The router is differentiable (no top-k), zeros stay zero, and experts are not gated (gated experts destroy the
router's sparsity). Trained with the losses of `actlas.training.chunk_losses`, neighbouring tokens share
experts, so that few experts are needed for a chunk of tokens. Source: "BlockFFN: Towards End-Side
Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation Sparsity" (2025), section 3, and its
released code.

While training every expert is computed for every token, which costs what a dense MLP of the same size does.
Without gradients only the union of the experts that the rows need is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.swap import register_module
from actlas.nn.experts import ACTIVATIONS, MixtureOfExperts

_EPS = 1e-6


@dataclass(frozen=True)
class DenseRouting:
    """Where tokens go, for routers with a varying number of experts.

    Attributes:
        gates: A `[n, M]`, 0 for experts that do not run.
        active: bool `[n, M]`: A1 > 0. (Not gates > 0: w may turn negative.)
        scores: A0 `[n, M]`, before the ReLU.
        raw: A1 over its root mean square, without w: what the chunk loss is made of.
    """

    gates: Tensor
    active: Tensor
    scores: Tensor
    raw: Tensor


class ReLURMSRouter(nn.Module):
    """The router; see the module docstring.

    Args:
        d: channels. experts: M.
        normalise: divide by the root mean square. Without it this is ReMoE's router.
    """

    def __init__(self, d: int, experts: int, normalise: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(d, experts, bias=False)
        self.weight = nn.Parameter(torch.ones(experts)) if normalise else None

    def forward(self, x: Tensor) -> DenseRouting:
        """Route rows `[n, d]`; in float32."""
        scores = torch.nn.functional.linear(x.float(), self.linear.weight.float())
        kept = torch.relu(scores)
        if self.weight is None:
            return DenseRouting(kept, scores > 0, scores, kept)
        raw = kept * torch.rsqrt(kept.square().mean(-1, keepdim=True) + _EPS)
        return DenseRouting(raw * self.weight.float(), scores > 0, scores, raw)


@register_module
class BlockFFN(MixtureOfExperts):
    """A BlockFFN layer.

    Args:
        d: channels. hidden: neurons of one expert. experts: M.
        activation: of the neurons; SiLU as published.
        normalise: see `ReLURMSRouter`.
        dtype: of the experts.

    Attributes:
        routed: the `DenseRouting` of the last call with gradients, for the losses.
    """

    standard_activation = "silu"
    routed: Any

    def __init__(
        self,
        d: int,
        hidden: int,
        experts: int = 24,
        *,
        activation: str = "",
        normalise: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(d, hidden, experts, experts, activation=activation, dtype=dtype)
        self.router = ReLURMSRouter(d, experts, normalise)

    def route(self, x: Tensor) -> DenseRouting:  # type: ignore[override]
        said: DenseRouting = self.router(x)
        return said

    def forward(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        said = self.route(rows)
        self.routed = said if torch.is_grad_enabled() else None
        if torch.is_grad_enabled():
            z = self._neurons(rows, self.w_enc) * said.gates.to(rows).unsqueeze(-1)
            return torch.einsum("nmh,mdh->nd", z, self.w_dec).reshape(x.shape)
        used = said.active.any(0).nonzero().squeeze(-1)
        z = self._neurons(rows, self.w_enc[used]) * said.gates[:, used].to(rows).unsqueeze(-1)
        return torch.einsum("nmh,mdh->nd", z, self.w_dec[used]).reshape(x.shape)

    def features(self, x: Tensor, *, gated: bool = False) -> Tensor:
        rows = self._rows(x)
        said = self.route(rows)
        z = self._neurons(rows, self.w_enc)
        weight = said.gates if gated else said.active
        return (z * weight.to(z).unsqueeze(-1)).reshape(*x.shape[:-1], -1)

    def config(self) -> dict[str, Any]:
        known = super().config()
        kept = {k: known[k] for k in ("d", "hidden", "experts", "activation", "dtype")}
        return {**kept, "normalise": self.router.weight is not None}

    def _neurons(self, rows: Tensor, encoders: Tensor) -> Tensor:
        """Return the neurons of some experts, `[n, experts, D]`."""
        z = rows @ encoders.flatten(0, 1).T
        return ACTIVATIONS[self.activation](z).unflatten(1, (len(encoders), self.hidden))
