"""Gated sparse autoencoders: which features are active, and how strongly, are decided apart.

    u      = W_enc (x - b_dec)                      shared by both paths
    gate   = u + b_gate                             a feature is on where gate > 0
    z      = 1[gate > 0] ReLU(exp(r_mag) u + b_mag)
    x_hat  = z W_dec + b_dec                        unit rows of W_dec
    loss   = |x - x_hat|^2  +  lambda * sum_i ReLU(gate_i)  +  |x - (ReLU(gate) W_dec' + b_dec')|^2

with W_dec' and b_dec' held constant in the last term. Rajamanoharan et al. 2024, "Improving Dictionary
Learning with Gated Sparse Autoencoders". The L1 penalty acts on the gate alone, so it does not shrink the
values; the last term is what teaches the gate, whose step passes no gradient. `b_enc` is b_gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import ShapeError
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.relu import sparsity
from actlas.dictionaries.sae import SAE

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(kw_only=True, eq=False)
class GatedSAE(SAE):
    """A gated autoencoder.

    Attributes:
        r_mag, b_mag: float32 `[m]`, log scale and bias of the magnitude path.
    """

    r_mag: Tensor
    b_mag: Tensor
    architecture: ClassVar[str] = "gated"
    trainable: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "r_mag", "b_mag", "W_dec", "b_dec")
    default_sparsity: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r_mag.shape != self.b_enc.shape or self.b_mag.shape != self.b_enc.shape:
            raise ShapeError(
                f"GatedSAE needs r_mag and b_mag of shape [{self.features}], not {list(self.r_mag.shape)} "
                f"and {list(self.b_mag.shape)}"
            )

    @classmethod
    def create(cls, site: str, d: int, width: int, *, seed: int = 0, **options: Any) -> Self:
        options |= {name: torch.zeros(max(width, 0)) for name in ("r_mag", "b_mag")}
        return super().create(site, d, width, seed=seed, **options)

    def magnitude(self, pre: Tensor) -> Tensor:
        """Return what features are worth where they are on, `[n, m]`, from the gate's pre-activations."""
        return ((pre - self.b_enc) * self.r_mag.exp() + self.b_mag).relu()

    @property
    def slope(self) -> Tensor:
        return self.r_mag.exp()

    def activate(self, pre: Tensor) -> Codes:
        return codes_of(self.magnitude(pre) * (pre > 0))

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        pre = self.pre(batch.x)
        z = self.magnitude(pre) * (pre > 0)
        error = z @ self.W_dec + self.b_dec - batch.target
        gate = pre.relu()
        by_gate = gate @ self.W_dec.detach() + self.b_dec.detach() - batch.target
        n = len(batch)
        l1, auxiliary = gate.sum() / n, by_gate.square().sum() / n
        weight = state.sparsity_weight * sparsity(self, state)
        loss = error.square().sum() / n + weight * l1 + auxiliary
        parts = {"l1": float(l1.detach()), "gate": float(auxiliary.detach())}
        return Objective(loss, error.detach().square().sum(), codes_of(z), parts)
