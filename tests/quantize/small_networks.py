"""Small untrained networks of images for these tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from actlas.core import act_quantizer
from actlas.core.numbers import lp_search
from actlas.nn.small_unet import SmallUNet
from actlas.quantize import soft_layers


def tiny_unet(seed: int = 0) -> SmallUNet:
    """A U-Net of width 8 whose output convolution is not zero."""
    network = SmallUNet(width=8, timesteps=100, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.conv_out.weight.normal_(0, 0.2, generator=generator)
    return network.eval()


class TwoPaths(nn.Module):
    """Two branches that are concatenated, normalised and read by a convolution; a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(2, 6, 1)
        self.norm = nn.GroupNorm(2, 10)
        self.join = nn.Conv2d(10, 4, 3, padding=1)
        self.after = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        y = self.after(self.join(torch.relu(self.norm(both))))
        out: torch.Tensor = self.head(y.mean((2, 3)))
        return out


def unet_calls(batches: int = 2, rows: int = 8, seed: int = 0) -> list:
    """Random noisy images with timesteps."""
    g = torch.Generator().manual_seed(seed)
    return [
        ((torch.randn(rows, 1, 8, 8, generator=g), torch.randint(100, (rows,), generator=g)), {})
        for _ in range(batches)
    ]


@pytest.fixture(autouse=True, scope="module")
def quick_ranges() -> Iterator[None]:
    """Search ranges in eight steps on a few hundred numbers."""
    quick = partial(lp_search, steps=8, shrink=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(act_quantizer, "_MOST", 256)
        patch.setattr(act_quantizer, "lp_search", quick)
        patch.setattr(soft_layers, "lp_search", quick)
        yield
