"""The noise schedule and the DDIM sampler, against the formulas and an exact predictor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.diffusion import NoiseSchedule, ddim_sample
from actlas.core.errors import InputError, NonFiniteError


class Exact(nn.Module):
    """The best noise prediction when every image is the same: (x - sqrt(a) image) / sqrt(1 - a)."""

    def __init__(self, schedule: NoiseSchedule, image: torch.Tensor) -> None:
        super().__init__()
        self.schedule, self.image = schedule, image

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        kept = self.schedule.kept[t].float().view(-1, 1, 1, 1)
        return (x - kept.sqrt() * self.image) / (1 - kept).sqrt()


def test_noise_keeps_variance() -> None:
    schedule = NoiseSchedule(200)
    kept = schedule.kept
    betas = torch.linspace(5e-4, 0.1, 200, dtype=torch.float64)
    product = 1.0
    for beta in betas[:57].tolist():
        product *= 1 - beta
    assert float(kept[56]) == pytest.approx(product)
    assert bool((kept.diff() < 0).all()) and float(kept[-1]) < 1e-3
    x, e, t = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0), torch.tensor([56])
    want = product**0.5 + 2 * (1 - product) ** 0.5
    assert torch.allclose(schedule.add_noise(x, t, e), torch.full_like(x, want))


def test_an_exact_predictor_gives_the_image() -> None:
    schedule = NoiseSchedule(100)
    image = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    seen: list[int] = []
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    got = ddim_sample(Exact(schedule, image), noise, schedule, steps=10, watch=lambda t, x: seen.append(t))
    assert torch.allclose(got, image.expand_as(got), atol=1e-4)
    assert seen == schedule.spread(10) and seen[0] == 99 and len(set(seen)) == 10


def test_bad_input() -> None:
    schedule = NoiseSchedule(100)
    with pytest.raises(InputError, match="1 to 100"):
        schedule.spread(101)
    with pytest.raises(InputError, match="25 or more"):
        NoiseSchedule(3)
    with pytest.raises(InputError, match="starting noise"):
        ddim_sample(Exact(schedule, torch.zeros(1)), torch.zeros(0, 1, 2, 2), schedule, steps=5)
    with pytest.raises(NonFiniteError, match="after timestep 99"):
        ddim_sample(Exact(schedule, torch.tensor(torch.nan)), torch.zeros(1, 1, 2, 2), schedule, steps=5)
