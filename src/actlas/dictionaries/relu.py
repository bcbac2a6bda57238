"""ReLU sparse autoencoders with an L1 penalty, and the resampling of dead features.

    z     = ReLU(W_enc (x - b_dec) + b_enc)
    x_hat = z W_dec + b_dec                                    unit rows of W_dec
    loss  = |x - x_hat|^2  +  lambda * sum_i z_i               summed over channels, averaged over rows

Bricken et al. 2023 ("Towards Monosemanticity") and Kissane et al. 2024 ("Interpreting Attention Layer
Outputs with Sparse Autoencoders"). With inputs of mean norm sqrt(d), lambda = 5 is the weight of
Anthropic's update of April 2024.

Resampling (`resample=n`: n times, evenly over the first half of training). A feature that has been silent
for long gets a new start from a badly reconstructed input:

    draw rows with probability ~ (|x - x_hat|^2)^2
    W_dec[i] = (x - b_dec) / |x - b_dec|      W_enc[i] = 0.2 * mean norm of live encoder rows * W_dec[i]
    b_enc[i] = 0

Adam's moments of such a feature need no reset: without a gradient they have decayed to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.sae import SAE

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(kw_only=True, eq=False)
class ReluSAE(SAE):
    """A ReLU autoencoder.

    Attributes:
        resample: how often dead features are resampled while training.
    """

    resample: int = 4
    architecture: ClassVar[str] = "relu"
    #: The penalty's weight where `TrainSettings.sparsity` leaves it open.
    default_sparsity: ClassVar[float] = 5.0

    @classmethod
    def create(cls, site: str, d: int, width: int, *, seed: int = 0, **options: Any) -> Self:
        if options.get("resample", 0) < 0:
            raise InputError(f"resample is {options['resample']}; it must be at least 0")
        return super().create(site, d, width, seed=seed, **options)

    def activate(self, pre: Tensor) -> Codes:
        return codes_of(pre.relu())

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        z = self.pre(batch.x).relu()
        error = z @ self.W_dec + self.b_dec - batch.target
        n = len(batch)
        loss, l1 = error.square().sum() / n, z.sum() / n
        weight = state.sparsity_weight * sparsity(self, state)
        parts = {"l1": float(l1.detach())}
        return Objective(loss + weight * l1, error.detach().square().sum(), codes_of(z), parts)

    def gradients(self, batch: Batch, state: TrainState) -> tuple[Objective, dict[str, Tensor]]:
        if self.resample and state.step in resampling_steps(self.resample, state.settings.steps):
            self.revive(batch, state)
        return super().gradients(batch, state)

    def revive(self, batch: Batch, state: TrainState) -> int:
        """Give every dead feature a new start; return how many there were."""
        dead = state.dead.nonzero().squeeze(1)
        if not len(dead) or len(dead) == self.features:
            return 0
        squared = (self.decode_scaled(self.activate(self.pre(batch.x))) - batch.target).square().sum(1)
        generator = torch.Generator().manual_seed(state.settings.seed + state.step)
        enough = len(dead) <= int((squared > 0).sum())
        rows = torch.multinomial(
            squared.square().cpu(), len(dead), replacement=not enough, generator=generator
        )
        starts = batch.target[rows.to(batch.x.device)] - self.b_dec
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(starts, 0)
        starts = starts / starts.norm(dim=1, keepdim=True).clamp_min(1e-12)
        live = ~state.dead
        self.W_dec[dead] = starts
        self.W_enc[dead] = 0.2 * self.W_enc[live].norm(dim=1).mean() * starts
        self.b_enc[dead] = 0.0
        state.since_fired[dead] = 0
        return len(dead)


def sparsity(sae: Any, state: TrainState) -> float:
    """Return the weight of a kind's penalty: the run's, or the kind's own default."""
    given = state.settings.sparsity
    return float(sae.default_sparsity if given is None else given)


def resampling_steps(times: int, steps: int) -> set[int]:
    """Return the steps before which dead features are resampled: `times` of them in the first half."""
    return {round(steps / 2 * (i + 1) / times) for i in range(times)} - {0}
