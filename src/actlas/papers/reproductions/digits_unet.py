"""The small diffusion model on scikit-learn's digits that the diffusion papers share; trained once,
cached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HELD_OUT = 297


def digits() -> tuple[Tensor, Tensor]:
    """Return digits to train on and digits held out, `[n, 1, 8, 8]` in [-1, 1]."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[HELD_OUT:]], pixels[order[:HELD_OUT]]


def base(steps: int = 1500, seed: int = 0) -> Any:
    """Return the trained U-Net (about 2.5 minutes on one thread the first time)."""
    from actlas.nn.small_unet import SmallUNet
    from actlas.training.diffusion import train_diffusion

    return train_diffusion(SmallUNet(seed=seed), digits()[0], steps=steps, seed=seed)


def start_noise(n: int, seed: int) -> Tensor:
    """Return starting noise that all arms of a comparison share, `[n, 1, 8, 8]`."""
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
