"""Peak signal to noise ratio of restored images, on luma, without the border.

    PSNR = 10 log10(1 / mean (a - b)^2),      Y = 0.299 R + 0.587 G + 0.114 B,   values from 0 to 1

A border of as many pixels as the scale of super-resolution is left out, where convolutions have seen padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from actlas.core.errors import InputError

_LUMA = (0.299, 0.587, 0.114)


def luma(pixels: Tensor) -> Tensor:
    """Return Y of RGB images, `[n, 3, height, width]` to `[n, 1, height, width]`.

    Raises:
        InputError: not three channels.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InputError(f"images are {list(pixels.shape)}; luma needs [n, 3, height, width]")
    weights = torch.tensor(_LUMA, dtype=pixels.dtype, device=pixels.device)
    return (pixels * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def psnr(restored: Tensor, original: Tensor, *, crop_border: int = 0) -> Tensor:
    """Return the PSNR of each image in decibels, float64 `[n]`; infinite where they are equal.

    Args:
        restored, original: `[n, channels, height, width]`, 0 to 1; what is restored is clipped to that.
        crop_border: pixels left out on each side.

    Raises:
        InputError: other shapes, values of the original outside 0 to 1, or nothing left after cropping.
    """
    if restored.shape != original.shape or restored.ndim != 4:
        raise InputError(f"images are {list(restored.shape)} and {list(original.shape)}; both [n, c, h, w]")
    if crop_border < 0 or 2 * crop_border >= min(original.shape[-2:]):
        raise InputError(f"a border of {crop_border} leaves nothing of {list(original.shape[-2:])} pixels")
    low, high = float(original.min()), float(original.max())
    if low < 0 or high > 1:
        raise InputError(f"pixels of the original are from {low:g} to {high:g}; they must be from 0 to 1")
    inner = slice(crop_border, -crop_border or None)
    a, b = (x[..., inner, inner].double() for x in (restored.clamp(0, 1), original))
    error = (a - b).square().flatten(1).mean(1)
    return torch.where(
        error > 0, -10 * torch.log10(error.clamp_min(1e-300)), torch.full_like(error, math.inf)
    )
