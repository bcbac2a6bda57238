"""Rendered scenes with exact depth: a floor, a wall, boxes and spheres; and a small depth network that knows
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FAR = 12.0


def scenes(n: int, seed: int, *, side: int = 32) -> tuple[Tensor, Tensor]:
    """Return images `[n, 3, side, side]` in [-1, 1] and depths `[n, 1, side, side]` along the view axis.

    A camera at height 1 to 2 looks ahead over a chequered floor to a wall; three boxes and three spheres
    stand in between. Light falls from above and the left.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    ray = torch.stack([x * 0.8, y * 0.8, torch.ones_like(x)], -1).view(1, -1, 3)  # depth = distance along z
    height, wall = draw(0.8, 1.8, 1), draw(6, FAR, 1)
    floor = torch.where(ray[..., 1] < 0, height / (-ray[..., 1]).clamp_min(1e-6), torch.full((), 1e9))
    depth = torch.minimum(floor, wall)
    on_floor = floor < wall
    hit = ray * depth.unsqueeze(-1)
    chequer = ((hit[..., 0] / 0.8).floor() + (hit[..., 2] / 0.8).floor()).remainder(2)
    colours = draw(0.2, 0.9, 8, 3)
    shade = torch.where(on_floor, 0.9 - 0.35 * chequer, 0.75 + 0.1 * (hit[..., 1] * 3).sin())
    colour = torch.where(on_floor.unsqueeze(-1), colours[:, 6:7], colours[:, 7:8]) * shade.unsqueeze(-1)
    light = torch.tensor([-0.5, 0.7, -0.5])
    light = light / light.norm()
    for k in range(6):
        far = draw(2, 7, 1)
        size = draw(0.3, 0.9, 1)
        centre = torch.stack([draw(-0.6, 0.6, 1) * far, size * 0.9 - height, far], -1)
        t, normal = _sphere(ray, centre, size) if k < 3 else _box(ray, centre, size)
        nearer = t < depth
        depth = torch.where(nearer, t, depth)
        lit = 0.35 + 0.65 * (normal @ light).clamp_min(0)
        colour = torch.where(nearer.unsqueeze(-1), colours[:, k : k + 1] * lit.unsqueeze(-1), colour)
    colour = (colour + 0.02 * torch.randn(colour.shape, generator=g)).clamp(0, 1)
    pixels = colour.view(n, side, side, 3).permute(0, 3, 1, 2) * 2 - 1
    return pixels.contiguous(), depth.view(n, 1, side, side)


def _sphere(ray: Tensor, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    a = ray.square().sum(-1)
    b = (ray * centre).sum(-1)
    c = centre.square().sum(-1) - radius.square()
    inside = b.square() - a * c
    t = torch.where(inside > 0, (b - inside.clamp_min(0).sqrt()) / a, torch.full((), 1e9))
    t = torch.where(t > 0.3, t, torch.full((), 1e9))
    normal = (ray * t.clamp_max(100).unsqueeze(-1) - centre) / radius.unsqueeze(-1)
    return t, normal


def _box(ray: Tensor, centre: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    safe = torch.where(ray.abs() < 1e-6, torch.full((), 1e-6), ray)
    one, two = (centre - half.unsqueeze(-1)) / safe, (centre + half.unsqueeze(-1)) / safe
    near, far = torch.minimum(one, two), torch.maximum(one, two)
    t, side = near.max(-1)
    hit = (t < far.amin(-1)) & (t > 0.3)
    normal = torch.nn.functional.one_hot(side, 3).to(ray) * -safe.sign()
    return torch.where(hit, t, torch.full((), 1e9)), normal


def depth_network(steps: int = 900, seed: int = 0) -> Any:
    """Return a depth network that was trained on scenes (about 90 seconds the first time, then cached)."""
    from actlas.core.progress import progress
    from actlas.nn.small_depth import SmallDepth
    from actlas.training.diffusion import kept_weights

    network = SmallDepth(seed=seed)

    def learn() -> dict[str, Tensor]:
        images, depths = scenes(3000, 1000 + seed)
        module = SmallDepth(seed=seed).train()
        optimiser = torch.optim.Adam(module.parameters(), lr=2e-3)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        generator = torch.Generator().manual_seed(seed)
        with progress("training a depth network", steps, "steps") as advance, torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(images), (64,), generator=generator)
                loss = (module(images[rows]) - depths[rows].log()).abs().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                fall.step()
                advance(note=f"loss {float(loss.detach()):.3f}")
        return module.state_dict()

    return kept_weights(network, "depth", {"steps": steps, "seed": seed, "scenes": 3000}, learn)


def depth_errors(log_depth: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Return AbsRel and delta_1 of each image, float64 `[n]`: mean |d - d*| / d*, share with ratio below
    1.25.
    """
    found = log_depth.double().exp()
    wanted = depth.double()
    ratio = torch.maximum(found / wanted, wanted / found)
    return ((found - wanted).abs() / wanted).flatten(1).mean(1), (ratio < 1.25).double().flatten(1).mean(1)
