"""Train a small denoising diffusion model on images, and keep it in the cache.

    L_simple = E |eps - eps^(x_t, t)|^2,     t uniform, eps normal

(Ho, Jain and Abbeel 2020, equation 14). Adam with a cosine decay; what is kept is the exponential moving
average of the weights, as is usual for diffusion models. The same network, images, settings and seed are
trained once: the weights lie under the cache folder, found by a hash of all of these.

    network = train_diffusion(SmallUNet(), images, steps=1500)        # images in [-1, 1]
    samples = ddim_sample(network, torch.randn(64, 1, 8, 8), network.schedule)
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.diffusion import NoiseSchedule, predict_noise
from actlas.core.errors import FailureError, InputError, NonFiniteError
from actlas.core.progress import progress

_FILE = "weights.safetensors"
_VERSION = 1


def train_diffusion(
    network: nn.Module,
    images: Tensor,
    *,
    schedule: NoiseSchedule | None = None,
    steps: int = 1500,
    batch: int = 128,
    lr: float = 2e-3,
    average: float = 0.995,
    seed: int = 0,
    cache: bool = True,
) -> nn.Module:
    """Return a trained copy of a noise predictor.

    Args:
        network: called as `network(x, t)`; is left as it is.
        images: float `[n, channels, height, width]` in [-1, 1].
        schedule: default the network's own (`network.schedule`).
        steps, batch, lr: of Adam; the rate falls to 0 along a cosine.
        average: decay of the moving average of the weights.
        seed: of images, timesteps and noise.
        cache: keep the weights under the cache folder and take them from there the next time.

    Raises:
        InputError: no images, images out of range, or settings that make no sense.
        NonFiniteError: the loss became NaN or infinite.
    """
    noise = schedule_of(network, schedule)
    check_images(images)
    for name, value in (("steps", steps), ("batch", batch), ("lr", lr)):
        if not value > 0:
            raise InputError(f"{name} is {value}; it must be above 0")
    settings = {"steps": steps, "batch": batch, "lr": lr, "average": average, "seed": seed, "T": noise.steps}

    def learn() -> dict[str, Tensor]:
        return _learn(copy.deepcopy(network), images, noise, settings)

    return kept_weights(network, "diffusion", [settings, _hash(images)], learn, cache=cache)


def denoising_loss(
    network: nn.Module, images: Tensor, schedule: NoiseSchedule, *, repeats: int = 4, seed: int = 0
) -> Tensor:
    """Return the mean squared error of the predicted noise for each image, float64 `[n]`.

    Args:
        network, images, schedule: as in training.
        repeats: timesteps and noises an image; the same for every network with the same seed.
        seed: of both.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(images), dtype=torch.float64)
    with torch.no_grad():
        for _ in range(repeats):
            t = torch.randint(schedule.steps, (len(images),), generator=generator)
            noise = torch.randn(images.shape, generator=generator)
            found = predict_noise(network, schedule.add_noise(images, t, noise), t)
            total += (found - noise).double().square().flatten(1).mean(1)
    return total / repeats


def schedule_of(network: nn.Module, given: NoiseSchedule | None = None) -> NoiseSchedule:
    """Return the noise schedule that was given, or the network's own.

    Raises:
        InputError: there is neither.
    """
    found = given or getattr(network, "schedule", None)
    if not isinstance(found, NoiseSchedule):
        raise InputError(
            f"{type(network).__name__} carries no noise schedule; give schedule=NoiseSchedule(T)"
        )
    return found


def check_images(images: Tensor) -> None:
    """Raise unless these are images `[n, c, h, w]` in [-1, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images are {shape}; they must be [n, channels, height, width] with n above 0")
    if not bool(torch.isfinite(images).all()):
        raise NonFiniteError("the images hold NaN or infinite values; all must be finite")
    low, high = float(images.min()), float(images.max())
    if low < -1.001 or high > 1.001:
        raise InputError(f"the images run from {low:g} to {high:g}; scale them to -1 to 1")


def kept_weights(
    network: nn.Module, kind: str, said: Any, learn: Callable[[], dict[str, Tensor]], *, cache: bool = True
) -> nn.Module:
    """Return a copy of a network with learned weights, from the cache where they are there.

    Args:
        network: the start; its class, sizes and weights are part of the key.
        kind: folder under the cache folder.
        said: JSON-able settings and hashes of the data, the rest of the key.
        learn: makes the state dict if it is not cached.
        cache: whether to look and to keep.

    Raises:
        FailureError: the cache cannot be written.
    """
    from safetensors.torch import load_file, save_file

    from actlas.models.cache import cache_folder, fault, locked, publish, seal, withdraw, workplace

    made = copy.deepcopy(network)
    if not cache:
        made.load_state_dict(learn())
        return made.eval()
    digest = hashlib.sha256(json.dumps([type(network).__name__, said, _VERSION], sort_keys=True).encode())
    for name, t in network.state_dict().items():
        digest.update(name.encode())
        digest.update(_hash(t).encode())
    key = digest.hexdigest()
    folder = cache_folder() / kind / key[:32]
    origin = {kind: key, "version": _VERSION}
    with locked(folder, f"a {kind} network") as alone:
        if folder.exists() and fault(folder, origin) is not None:
            withdraw(folder)
        if not folder.exists():
            state = learn()
            try:
                with workplace(folder, alone) as work:
                    new = work / "made"
                    new.mkdir()
                    save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, new / _FILE)
                    seal(new, origin)
                    publish(new, folder)
            except OSError as error:
                raise FailureError(
                    f"cannot keep the network in {folder}: {error.strerror or error}; use cache=False"
                ) from error
        made.load_state_dict(load_file(folder / _FILE))
    return made.eval()


def _learn(
    network: nn.Module, images: Tensor, schedule: NoiseSchedule, settings: dict[str, Any]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(settings["seed"])
    network.train()
    steps, batch = int(settings["steps"]), int(settings["batch"])
    optimiser = torch.optim.Adam(network.parameters(), lr=settings["lr"])
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    mean = {n: t.detach().clone() for n, t in network.state_dict().items()}
    with progress("training a diffusion model", steps, "steps") as advance, torch.enable_grad():
        for step in range(steps):
            clean = images[torch.randint(len(images), (batch,), generator=generator)]
            t = torch.randint(schedule.steps, (batch,), generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            loss = (predict_noise(network, schedule.add_noise(clean, t, noise), t) - noise).square().mean()
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss is {float(loss.detach())} at step {step}; use a smaller lr")
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            decay.step()
            keep = min(float(settings["average"]), (step + 1) / (step + 10))
            for name, value in network.state_dict().items():
                if value.is_floating_point():
                    mean[name].lerp_(value.detach(), 1 - keep)
            advance(note=f"loss {float(loss.detach()):.3f}")
    return mean


def _hash(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
