"""Batch norm that image restoration can bear: the branch is scaled by how much the skip varies.

    y = f(BN(x)) phi(std(x)) + x,          phi(s) = a s + b,  a = 1.5 and b = 0 at the start

Batch norm makes activations easy to quantize, and removes the contrast of each image, which super-resolution
needs. The standard deviation of an image's own features (over all but the batch) gives it back.

Sources: Liu et al. 2021, "AdaDM"; Shvetsov et al. 2024, "QuantNAS" (there called ADQ).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError

Norm = Literal["adaptive", "batch", "none"]
_TINY = 1e-6


class AdaptiveSkipNorm(nn.Module):
    """A residual block around `branch`; see the module's text.

    Args:
        branch: any module that keeps the shape `[n, channels, ...]`.
        channels: of its input.
        norm: `"adaptive"` (as above), `"batch"` (batch norm and no scale) or `"none"` (neither).

    Raises:
        InputError: no such norm, or no channels.
    """

    def __init__(self, branch: nn.Module, channels: int, norm: Norm = "adaptive") -> None:
        super().__init__()
        if norm not in get_args(Norm):
            raise InputError(f"norm is {norm!r}; it must be {', '.join(get_args(Norm))}")
        if channels < 1:
            raise InputError(f"channels is {channels}; it must be at least 1")
        self.branch, self.kind = branch, norm
        self.norm = nn.Identity() if norm == "none" else nn.BatchNorm2d(channels)
        self.phi = nn.Linear(1, 1)
        with torch.no_grad():
            self.phi.weight.fill_(1.5)
            self.phi.bias.zero_()
        if norm != "adaptive":
            self.phi.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(self.norm(x))
        if self.kind == "adaptive":
            variance = x.flatten(1).var(1, correction=0)
            factor = self.phi((variance + _TINY).sqrt().unsqueeze(1))
            y = y * factor.view(-1, *([1] * (x.ndim - 1)))
        return x + y
