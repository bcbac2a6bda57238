"""What every use of a denoising diffusion model shares: the noise schedule and the DDIM sampler.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps,        a_t = prod_{s<=t} (1 - beta_s)

A network predicts eps from (x_t, t). The sampler of Song, Meng and Ermon (2021) goes from pure noise through
a few of the T timesteps, without further noise:

    x_0^ = (x_t - sqrt(1 - a_t) eps^) / sqrt(a_t)
    x_s  = sqrt(a_s) x_0^ + sqrt(1 - a_s) eps^

Betas rise linearly from 1e-4 to 0.02 for T = 1,000 (Ho, Jain and Abbeel 2020), scaled by 1000 / T for others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.timestep import at_timestep

Watch = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise there is at each timestep.

    Attributes:
        steps: T, the number of timesteps; 0 is nearly clean, T - 1 is nearly noise.
    """

    steps: int = 200

    def __post_init__(self) -> None:
        if self.steps < 25:
            raise InputError(f"a noise schedule of {self.steps} timesteps is too short; use 25 or more")

    @property
    def kept(self) -> Tensor:
        """a_t, float64 `[steps]`: the share of the image's variance that is left."""
        scale = 1000 / self.steps
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, self.steps, dtype=torch.float64)
        return torch.cumprod(1 - betas.clamp(max=0.999), 0)

    def spread(self, n: int) -> list[int]:
        """Return `n` timesteps evenly over all, from the noisiest to the cleanest.

        Raises:
            InputError: fewer than 1 or more than there are.
        """
        if not 1 <= n <= self.steps:
            raise InputError(f"{n} sampling steps were asked for; this schedule allows 1 to {self.steps}")
        return [round(t) for t in torch.linspace(self.steps - 1, 0, n + 1, dtype=torch.float64).tolist()[:n]]

    def add_noise(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t for clean images `[batch, ...]`, timesteps `[batch]` and noise like the images."""
        kept = self.kept.to(clean)[t].reshape(-1, *([1] * (clean.ndim - 1)))
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise


def predict_noise(network: nn.Module, x: Tensor, t: Tensor | int) -> Tensor:
    """Return the network's noise for a batch at a timestep (or one a row), with the timestep announced."""
    rows = torch.as_tensor(t, device=x.device).reshape(-1).expand(len(x))
    with at_timestep(rows):
        out: Tensor = network(x, rows)
    return out


@torch.no_grad()
def ddim_sample(
    network: nn.Module,
    start: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int = 50,
    batch: int = 256,
    watch: Watch | None = None,
) -> Tensor:
    """Return samples from starting noise; the same noise gives the same samples.

    Args:
        network: called as `network(x, t)`, returns the noise; run as it is (edits apply).
        start: noise `[n, ...]`.
        schedule: of the training.
        steps: sampling steps.
        batch: rows at a time.
        watch: called with (timestep, x_t) before each prediction.

    Returns:
        images like `start`, in the units of the training images, limited to [-1, 1].

    Raises:
        InputError: steps that the schedule has not got, or no starting noise.
        NonFiniteError: a sample became NaN or infinite; the message names the timestep.
    """
    times = schedule.spread(steps)
    if not len(start):
        raise InputError("there is no starting noise; give at least one row")
    kept = schedule.kept
    done = []
    for x in start.split(batch):
        for i, t in enumerate(times):
            if watch is not None:
                watch(t, x)
            noise = predict_noise(network, x, t)
            here = float(kept[t])
            after = float(kept[times[i + 1]]) if i + 1 < len(times) else 1.0
            clean = ((x - (1 - here) ** 0.5 * noise) / here**0.5).clamp(-1, 1)
            noise = (x - here**0.5 * clean) / (1 - here) ** 0.5
            x = after**0.5 * clean + (1 - after) ** 0.5 * noise
            if not bool(torch.isfinite(x).all()):
                raise NonFiniteError(f"the samples hold NaN or infinity after timestep {t}")
        done.append(x.clamp(-1, 1))
    return torch.cat(done)
