"""A small U-Net that predicts the noise in small images at a timestep (DDPM, Ho, Jain and Abbeel 2020).

    input conv -> residual block (8 x 8) -> stride 2 -> residual block (4 x 4)
               -> residual block, attention
               -> residual block on [h, skip of 4 x 4] -> nearest x 2, conv -> residual block on [h, skip of 8
               x 8] -> GroupNorm, SiLU, output conv

A residual block, with the timestep's embedding e:

    out = conv2(silu(norm2(conv1(silu(norm1(x))) + W_e silu(e)))) + shortcut(x)

Every operation that a quantiser may want to reach is a module of its own: the convolutions, `emb` (W_e),
`shortcut` (1 x 1 where the width changes), `qkv`, and empty modules after q, k, v and the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from actlas.core.diffusion import NoiseSchedule
from actlas.core.errors import InputError, ShapeError
from actlas.core.swap import register_module
from actlas.core.timestep import at_timestep

_GROUPS = 8


class ResidualBlock(nn.Module):
    """Two convolutions with the timestep's embedding between them, and a shortcut around them."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.emb = nn.Linear(embedding, out)
        self.norm2 = nn.GroupNorm(_GROUPS, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Float[Tensor, "batch c h w"], e: Float[Tensor, "batch emb"]) -> Tensor:
        """Map [batch, channels, h, w] to [batch, out, h, w]."""
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(F.silu(e))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + self.shortcut(x)
        return out


class PixelAttention(nn.Module):
    """Self-attention of one head over the pixels: `x + proj(softmax(q k^T / sqrt(c)) v)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.at_q, self.at_k, self.at_v, self.at_map = (nn.Identity() for _ in range(4))

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Tensor:
        """Keep the shape."""
        rows = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(rows).chunk(3, -1)
        scores = self.at_q(q) @ self.at_k(k).transpose(1, 2) / math.sqrt(q.shape[-1])
        mixed = self.at_map(scores.softmax(-1)) @ self.at_v(v)
        out: Tensor = x + self.proj(mixed).transpose(1, 2).reshape(x.shape)
        return out


@register_module
class SmallUNet(nn.Module):
    """The noise predictor. Called as `network(x, t)`.

    Args:
        size: height and width of the images, a multiple of 2.
        channels: of the images.
        width: of the first level; a multiple of 8. The second is twice as wide.
        timesteps: T of the noise schedule it is trained for.
        seed: of the starting weights; the output convolution starts at zero.

    Raises:
        InputError: sizes that do not fit together.
    """

    def __init__(
        self, size: int = 8, channels: int = 1, width: int = 32, timesteps: int = 200, seed: int = 0
    ) -> None:
        super().__init__()
        if size < 2 or size % 2 or channels < 1 or width < 8 or width % _GROUPS:
            raise InputError(
                f"size {size}, channels {channels}, width {width}: the size must be even, the width a "
                f"multiple of {_GROUPS}"
            )
        self.size, self.channels, self.width = size, channels, width
        self.schedule = NoiseSchedule(timesteps)
        inner, e = 2 * width, 4 * width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.time = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
            self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
            self.down1 = ResidualBlock(width, width, e)
            self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down2 = ResidualBlock(width, inner, e)
            self.middle = ResidualBlock(inner, inner, e)
            self.attention = PixelAttention(inner)
            self.up2 = ResidualBlock(2 * inner, inner, e)
            self.grow = nn.Conv2d(inner, width, 3, padding=1)
            self.up1 = ResidualBlock(2 * width, width, e)
            self.norm_out = nn.GroupNorm(_GROUPS, width)
            self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.channels, self.size, self.size

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            "size": self.size,
            "channels": self.channels,
            "width": self.width,
            "timesteps": self.schedule.steps,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SmallUNet:
        """Build an untrained one of these sizes."""
        return cls(**config)

    def forward(self, x: Float[Tensor, "batch c h w"], t: Int[Tensor, " batch"]) -> Tensor:
        """Return the predicted noise.

        Args:
            x: noisy images, scaled to [-1, 1] when clean.
            t: timestep of each.

        Raises:
            ShapeError: images of another size, or timesteps of another number.
        """
        if tuple(x.shape[1:]) != self.image_shape or t.shape != x.shape[:1]:
            raise ShapeError(
                f"x is {list(x.shape)} and t {list(t.shape)}; this network takes "
                f"[batch, {', '.join(map(str, self.image_shape))}] and [batch]"
            )
        with at_timestep(t):
            e = self.time(_waves(t, self.width).to(x.dtype))
            skip1 = self.down1(self.conv_in(x), e)
            skip2 = self.down2(self.shrink(skip1), e)
            h = self.attention(self.middle(skip2, e))
            h = self.up2(torch.cat([h, skip2], 1), e)
            h = self.grow(F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = self.up1(torch.cat([h, skip1], 1), e)
            out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


def _waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of the timestep at `width / 2` frequencies, `[batch, width]`."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
