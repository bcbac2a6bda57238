"""BatchTopK sparse autoencoders: k features a row on average, not at every row.

    train      z = the n k largest of ReLU(W_enc (x - b_dec) + b_enc) over a whole batch of n rows
    inference  z_i = pre_i  where pre_i > theta, else 0;     theta = E_batch[ the smallest z > 0 ]
    loss       |x - x_hat|^2  +  aux * |e - e_hat|^2         as for TopK

Bussmann, Leask and Nanda 2024, "BatchTopK Sparse Autoencoders". At inference rows are read alone, so the
batch's cut is replaced by its expectation: the mean over the first 100 steps, then an exponential mean
with rate 0.01, which follows the cut as it settles. What is left is a JumpReLU with one threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.topk import TopKSAE

_RATE = 0.01  # of the exponential mean


@dataclass(kw_only=True, eq=False)
class BatchTopKSAE(TopKSAE):
    """A BatchTopK autoencoder; `k` features are active at a token on average.

    Attributes:
        threshold: float32 `[1]`, what a pre-activation must exceed at inference (scaled units).
    """

    threshold: Tensor = field(default_factory=lambda: torch.zeros(1))
    architecture: ClassVar[str] = "batchtopk"

    def activate(self, pre: Tensor) -> Codes:
        return codes_of(jump(pre, self.threshold))

    def select(self, pre: Tensor, batch: Batch) -> Codes:
        return codes_of(batch_topk(pre, self.k))

    def gradients(self, batch: Batch, state: TrainState) -> tuple[Objective, dict[str, Tensor]]:
        objective, found = super().gradients(batch, state)
        self.follow(objective.codes, state)
        return objective, found

    def follow(self, codes: Codes, state: TrainState) -> None:
        """Move the threshold towards the smallest active value of a training batch."""
        positive = codes.values[codes.values > 0]
        if len(positive):
            rate = max(_RATE, 1 / (state.step + 1))
            self.threshold += rate * (positive.min() - self.threshold)


def batch_topk(pre: Tensor, k: int) -> Tensor:
    """Return the `n k` largest positive entries of pre-activations `[n, m]`; the rest is 0."""
    z = pre.detach().relu().flatten()
    kept = z.topk(min(k * len(pre), z.numel()), sorted=False).indices
    return torch.zeros_like(z).scatter(0, kept, z[kept]).reshape(pre.shape)


def jump(pre: Tensor, threshold: Tensor) -> Tensor:
    """Return positive pre-activations above a threshold; the rest is 0."""
    return pre.relu() * (pre > threshold.to(pre))
