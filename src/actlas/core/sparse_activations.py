"""Activation functions with exact zeros, as modules that can be put into a model and saved.

    FATReLU(t)      x where x >= t, else 0          t = 0 is ReLU         (Kurtz et al. 2020; ProSparse 2024)
    ReLU2           max(x, 0)^2                                           (So et al. 2021, Primer; PLM 2025)

A zero costs nothing: the column of the down projection that it would multiply need not be read. Both have
f(0) = 0. The gradient of FATReLU is 1 above t and 0 below; that of ReLU2 is 2 max(x, 0). ReLU2 grows
quadratically, so that float16 may overflow (|x| > 255); bfloat16 and float32 are safe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError
from actlas.core.swap import register_module


@register_module
class FATReLU(nn.Module):
    """ReLU with a threshold: `x` where `x >= threshold`, else 0.

    Args:
        threshold: t, at least 0; 0 is ReLU.

    Raises:
        InputError: a negative or non-finite threshold.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        if not 0 <= threshold < math.inf:
            raise InputError(f"threshold is {threshold:g}; FATReLU needs a finite one, 0 or more")
        self.threshold = float(threshold)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.threshold == 0 else x * (x >= self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}"

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {"threshold": self.threshold}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FATReLU:
        """Build one."""
        return cls(**config)


@register_module
class ReLU2(nn.Module):
    """The squared ReLU: `max(x, 0)^2`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs: nothing."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ReLU2:
        """Build one."""
        return cls(**config)
