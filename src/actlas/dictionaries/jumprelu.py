"""JumpReLU sparse autoencoders: a learned threshold for every feature, and a penalty on L0 itself.

    z_i   = pre_i H(pre_i - theta_i),     pre = W_enc x + b_enc,     theta = exp(log_threshold) > 0
    x_hat = z W_dec + b_dec
    loss  = |x - x_hat|^2  +  lambda * sum_i H(pre_i - theta_i)

Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
Autoencoders". The step H has no useful derivative, so thresholds get the pseudo-derivatives of a kernel
density estimate of the expected loss's gradient (section 4), K the rectangle of width 1:

    d z_i / d theta_i                = -(theta_i / eps) K((pre_i - theta_i) / eps)
    d H(pre_i - theta_i) / d theta_i = -(1 / eps)       K((pre_i - theta_i) / eps)

and pre-activations get the ordinary one: H for z, 0 for the penalty.

The paper scales inputs to a mean squared norm of 1, with bandwidth eps and first threshold 0.001 and
lambda a few 10^-4. Here inputs have mean norm sqrt(d): in these units that is 0.001 sqrt(d), and lambda d.
Its `b_dec` is not subtracted from the input by default. (The published listing applies a ReLU before the
threshold, which differs from the equations only where theta < eps / 2; here the equations hold.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.sae import SAE

if TYPE_CHECKING:
    from typing_extensions import Self

_LAMBDA = 6e-4  # in the paper's units; L0 of some tens


@dataclass(kw_only=True, eq=False)
class JumpReluSAE(SAE):
    """A JumpReLU autoencoder.

    Attributes:
        log_threshold: float32 `[m]`, natural logarithm of each feature's threshold (scaled units).
        bandwidth: width of the kernel through which thresholds learn; 0 for one that is not trained.
    """

    log_threshold: Tensor
    bandwidth: float = 0.0
    architecture: ClassVar[str] = "jumprelu"
    trainable: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "log_threshold", "W_dec", "b_dec")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_threshold.shape != self.b_enc.shape:
            raise ShapeError(
                f"log_threshold has shape {list(self.log_threshold.shape)}; it must be [{self.features}]"
            )

    @classmethod
    def create(
        cls,
        site: str,
        d: int,
        width: int,
        *,
        seed: int = 0,
        bandwidth: float | None = None,
        threshold: float | None = None,
        **options: Any,
    ) -> Self:
        """Return an untrained autoencoder.

        Args:
            bandwidth, threshold: kernel width and first threshold in scaled units; default 0.001 sqrt(d).
        """
        published = 0.001 * math.sqrt(d)
        wide, first = (published if v is None else float(v) for v in (bandwidth, threshold))
        for name, value in (("bandwidth", wide), ("threshold", first)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; it must be above 0")
        options.setdefault("centred", False)
        logs = torch.full((max(width, 0),), math.log(first))
        return super().create(site, d, width, seed=seed, log_threshold=logs, bandwidth=wide, **options)

    @property
    def threshold(self) -> Tensor:
        """What each feature's pre-activation must exceed, `[m]`."""
        return self.log_threshold.exp()

    @property
    def default_sparsity(self) -> float:
        return _LAMBDA * self.channels

    def activate(self, pre: Tensor) -> Codes:
        return codes_of(pre * (pre > self.threshold.to(pre)))

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        pre, threshold = self.pre(batch.x), self.threshold
        z = JumpRelu.apply(pre, threshold, self.bandwidth)
        error = z @ self.W_dec + self.b_dec - batch.target
        n = len(batch)
        l0 = Step.apply(pre, threshold, self.bandwidth).sum() / n
        given = state.settings.sparsity
        weight = state.sparsity_weight * (self.default_sparsity if given is None else given)
        loss = error.square().sum() / n + weight * l0
        return Objective(loss, error.detach().square().sum(), codes_of(z), {"l0": float(l0.detach())})


def kernel(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return the rectangle K((pre - threshold) / bandwidth), 0 or 1."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre)


class JumpRelu(torch.autograd.Function):
    """`pre H(pre - threshold)` with the pseudo-derivative for the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = kernel(pre, threshold, ctx.bandwidth)
        return g * (pre > threshold), -(threshold / ctx.bandwidth) * (near * g).sum(0), None


class Step(torch.autograd.Function):
    """`H(pre - threshold)` with the pseudo-derivative for the threshold and none for the pre-activation."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = kernel(pre, threshold, ctx.bandwidth)
        return None, -(near * g).sum(0) / ctx.bandwidth, None
