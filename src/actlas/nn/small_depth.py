"""A small network that estimates depth from one image: an encoder, a decoder, skips that are concatenated.

    3 -> 16 (full size) -> 32 (half) -> 64 (quarter) -> 64 -> [up, skip 32] -> 32 -> [up, skip 16] -> 16 ->
    log depth

3 x 3 convolutions with ReLU and no norms, so that decoder activations have the heavy tails that depth
networks are known for. The output is the logarithm of the depth in every pixel, `[batch, 1, height, width]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from actlas.core.errors import InputError, ShapeError
from actlas.core.swap import register_module


@register_module
class SmallDepth(nn.Module):
    """See the module's text.

    Args:
        width: channels at full size.
        seed: of the starting weights.

    Raises:
        InputError: a width below 4.
    """

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        if width < 4:
            raise InputError(f"a depth network has 4 or more channels, not {width}")
        self.width = w = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Conv2d(3, w, 3, padding=1)
            self.down1 = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
            self.down2 = nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1)
            self.middle = nn.Conv2d(4 * w, 4 * w, 3, padding=1)
            self.up1 = nn.Conv2d(6 * w, 2 * w, 3, padding=1)
            self.up2 = nn.Conv2d(3 * w, w, 3, padding=1)
            self.depth = nn.Conv2d(w, 1, 3, padding=1)

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {"width": self.width}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SmallDepth:
        """Build an untrained one of this size."""
        return cls(**config)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 1 h w"]:
        """Return log depth.

        Raises:
            ShapeError: sizes that are no multiples of 4.
        """
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % 4 or x.shape[3] % 4:
            raise ShapeError(
                f"images are {list(x.shape)}; they must be [batch, 3, h, w], h and w multiples of 4"
            )
        a = F.relu(self.enter(x))
        b = F.relu(self.down1(a))
        c = F.relu(self.middle(F.relu(self.down2(b))))
        c = F.relu(self.up1(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1)))
        c = F.relu(self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), a], 1)))
        out: Tensor = self.depth(c)
        return out
