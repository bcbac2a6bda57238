"""Calibration data for a diffusion model: what its network really sees along the denoising trajectory.

    data = trajectory_data(network, n_steps=20, n_per_step=64)
    data.calls                      # one (x_t, t) batch for each kept timestep

Noisy images at different timesteps have different distributions, so data from one timestep does not stand for
the others (Q-Diffusion, Li et al. 2023, section 3.2). The float sampler is run once; x_t is kept at evenly
spaced steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.diffusion import NoiseSchedule, ddim_sample
from actlas.core.errors import InputError, ModelError
from actlas.core.network_blocks import Call

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(frozen=True)
class Trajectory:
    """Noisy images by timestep.

    Attributes:
        x: for each kept timestep, images `[n, ...]`.
        t: the timesteps, from the noisiest to the cleanest.
    """

    x: tuple[Tensor, ...]
    t: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.t) or any(not len(x) for x in self.x):
            raise InputError("calibration data is empty; keep at least one timestep and one image")

    @property
    def times(self) -> list[Tensor]:
        """The timestep of every row of every batch."""
        return [torch.full((len(x),), t) for x, t in zip(self.x, self.t, strict=True)]

    @property
    def calls(self) -> list[Call]:
        """Arguments of the network, one call for each timestep."""
        return [((x, t), {}) for x, t in zip(self.x, self.times, strict=True)]

    def mixed(self, size: int, seed: int = 0) -> tuple[list[Call], list[Tensor]]:
        """Return calls of `size` rows in which all timesteps are mixed, and the timesteps of their rows."""
        x, t = torch.cat(self.x), torch.cat(self.times)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        parts = order.split(size)
        return [((x[p], t[p]), {}) for p in parts], [t[p] for p in parts]

    def only(self, *which: int) -> Trajectory:
        """Return the data of some timesteps, by their place (0 is the noisiest, -1 the cleanest)."""
        return Trajectory(tuple(self.x[i] for i in which), tuple(self.t[i] for i in which))


def trajectory_data(
    network: nn.Module,
    *,
    schedule: NoiseSchedule | None = None,
    shape: Sequence[int] | None = None,
    n_steps: int = 20,
    n_per_step: int = 64,
    sampling_steps: int = 50,
    seed: int = 0,
) -> Trajectory:
    """Run the sampler and keep x_t at evenly spaced steps.

    Args:
        network: the float network.
        schedule, shape: default the network's own (`schedule`, `image_shape`).
        n_steps: how many timesteps to keep. Published: 20 (25 for Stable Diffusion).
        n_per_step: images at each. Published: 256 (128).
        sampling_steps: of the sampler, `n_steps` or more.
        seed: of the starting noise.

    Raises:
        ModelError: the network carries no schedule or image shape, and none was given.
        InputError: numbers below 1 or more steps than are sampled.
    """
    schedule = schedule or getattr(network, "schedule", None)
    shape = shape or getattr(network, "image_shape", None)
    if not isinstance(schedule, NoiseSchedule) or shape is None:
        raise ModelError(
            f"{type(network).__name__} does not say its noise schedule and image shape; a diffusion model "
            "saved by Actlas does, or give schedule= and shape="
        )
    if n_steps < 1 or n_per_step < 1 or sampling_steps < n_steps:
        raise InputError(
            f"n_steps is {n_steps}, n_per_step {n_per_step}, sampling_steps {sampling_steps}: the first two "
            "must be 1 or more, the last n_steps or more"
        )
    times = schedule.spread(sampling_steps)
    places = torch.linspace(0, sampling_steps - 1, n_steps).round().long().tolist()
    wanted = {times[i] for i in places}
    held: dict[int, list[Tensor]] = {t: [] for t in times if t in wanted}

    def watch(t: int, x: Tensor) -> None:
        if t in held:
            held[t].append(x.clone())

    noise = torch.randn(n_per_step, *shape, generator=torch.Generator().manual_seed(seed))
    ddim_sample(network, noise, schedule, steps=sampling_steps, watch=watch)
    return Trajectory(tuple(torch.cat(x) for x in held.values()), tuple(held))


def diffusion_network(model: Model | nn.Module) -> Any:
    """Return the noise predictor of a model.

    Raises:
        ModelError: it is no diffusion model that says its schedule.
    """
    network = model if isinstance(model, nn.Module) else model.module
    if not isinstance(getattr(network, "schedule", None), NoiseSchedule):
        name = type(network).__name__
        raise ModelError(
            f"{name} is no diffusion model that Actlas can sample from (it carries no noise schedule); give "
            "the folder of one that was saved with core.module_folder.save_module"
        )
    return network
