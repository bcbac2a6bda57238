"""BinaryDM: train a diffusion model's network with one-bit weights, and help it with the float one's
features.

    edit = binarize_diffusion(network, images, high=2, low=1, act_bits=4)

* Weights are sums of signs (`core/binary_layers.py`): two where the features have the image's full size, one
  below. The layers that run first (timestep's linear maps, input convolution) and the output convolution stay
  float.
* Activations: signed, one learned scale a tensor (LSQ). The official code recomputes it from every batch,
  because its flag is written under another name; here it is initialised once and learned.
* Low-rank mimicking: after every block,

      L = L_simple + weight * mean over blocks of |F_s V - F_t V|^2 / entries

  with V the leading principal directions of the teacher's features over their channels (a quarter of them, at
  least 2), found on the first batch and frozen. `mimic="full"` takes V = identity, `None` leaves it out. The
  official code takes the last axis, the image's width, for the channels: `mimic_axis="width"`.

Source: Zheng et al. 2024, "BinaryDM: Towards Accurate Binarization of Diffusion Model", sections 3.2 and 3.3;
github.com/Xingyu-Zheng/BinaryDM.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.binary_layers import BinaryLayer, Start
from actlas.core.diffusion import NoiseSchedule, ddim_sample, predict_noise
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.network_blocks import Call, blocks_of, is_layer, layers_of, observe, put
from actlas.core.progress import progress
from actlas.core.quant_edit import QuantEdit
from actlas.measure.samples import mean_measurement
from actlas.training.diffusion import check_images, denoising_loss, schedule_of
from actlas.training.feature_mimicking import (
    channels_last,
    lowrank_mimic,
    principal_directions,
    unwatch,
    watched,
)

if TYPE_CHECKING:
    from actlas.core.model import Model

Mimic = Literal["lowrank", "full"]


def binary_copy(
    network: nn.Module,
    image: Tensor,
    *,
    high: int = 2,
    low: int = 1,
    act_bits: int | None = 4,
    start: Start = "progressive",
    seed: int = 0,
) -> tuple[nn.Module, dict[str, BinaryLayer]]:
    """Return a copy of a network with binary layers, and these by path.

    Args:
        network: called as `network(x, t)`.
        image: one or two noisy images, to see sizes and order.
        high, low: signs a weight where features have the image's size, and where they are smaller.
        act_bits: of activations; `None` leaves them float.
        start: see `BinaryLayer`.
        seed: of a random start.
    """
    made = copy.deepcopy(network).eval()
    layers = layers_of(made)
    shapes: dict[str, tuple[int, ...]] = {}
    call: Call = ((image, torch.zeros(len(image), dtype=torch.long)), {})
    observe(made, list(layers), [call], lambda p, x, i: shapes.setdefault(p, tuple(x.shape)))
    order = list(shapes)
    first_conv = next((i for i, p in enumerate(order) if isinstance(layers[p], nn.Conv2d)), 0)
    floats = {*order[: first_conv + 1], order[-1]}
    fine = {p for p in order if isinstance(layers[p], nn.Conv2d) and shapes[p][-2:] == image.shape[-2:]}
    owners = {p.rpartition(".")[0] for p in fine} - {""}
    generator = torch.Generator().manual_seed(seed)
    binary: dict[str, BinaryLayer] = {}
    for path in order:
        if path in floats:
            continue
        conv = isinstance(layers[path], nn.Conv2d)
        bases = high if path in fine or (not conv and path.rpartition(".")[0] in owners) else low
        axis = 1 if conv else -1
        act = None if act_bits is None else ActQuantizer(act_bits, shapes[path][axis], axis=axis)
        binary[path] = BinaryLayer(layers[path], bases, act=act, start=start, generator=generator)
    if not binary:
        raise InputError(f"{type(network).__name__} has no layer between its first and last ones to binarise")
    put(made, binary)
    return made, binary


def binarize_network(
    network: nn.Module,
    images: Tensor,
    *,
    schedule: NoiseSchedule | None = None,
    high: int = 2,
    low: int = 1,
    act_bits: int | None = 4,
    start: Start = "progressive",
    mimic: Mimic | None = "lowrank",
    mimic_axis: str = "channel",
    mimic_weight: float = 0.1,
    steps: int = 600,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, BinaryLayer], list[float]]:
    """Train a binary copy of a trained network.

    Args:
        network: the float network: teacher and start.
        images: to train on, in [-1, 1].
        schedule: default the network's own.
        high, low, act_bits, start: see `binary_copy`.
        mimic, mimic_axis, mimic_weight: low-rank mimicking. Published weight: 1e-4, which is next to nothing
            for features of size 1.
        steps, batch, lr: of Adam with a cosine; published: 200,000 steps and more at 2e-5, batch 4.
        seed: of images, timesteps and noise.

    Returns:
        the copy, its binary layers, and L_simple at each step.

    Raises:
        InputError: settings or images that make no sense.
        NonFiniteError: the loss became NaN or infinite.
    """
    noise_schedule = schedule_of(network, schedule)
    check_images(images)
    if mimic not in (None, "lowrank", "full"):
        raise InputError(f"there is no mimicking {mimic!r}; there are lowrank, full and None")
    if steps < 1 or batch < 1 or lr <= 0 or mimic_weight < 0:
        raise InputError(
            f"steps {steps}, batch {batch}, lr {lr:g} and mimic_weight {mimic_weight:g} must be positive"
        )
    student, binary = binary_copy(
        network, images[:2], high=high, low=low, act_bits=act_bits, start=start, seed=seed
    )
    paths = blocks_of(network, ((images[:2], torch.zeros(2, dtype=torch.long)), {})) if mimic else []
    paths = [p for p in paths if not is_layer(network.get_submodule(p))]
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    bases: dict[str, Tensor] = {}
    optimiser: torch.optim.Optimizer | None = None
    fall: Any = None
    with progress("binarising", steps, "steps") as advance, torch.enable_grad():
        for step in range(steps):
            clean = images[torch.randint(len(images), (batch,), generator=generator)]
            t = torch.randint(noise_schedule.steps, (batch,), generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            x = noise_schedule.add_noise(clean, t, noise)
            if optimiser is None:
                with torch.no_grad():
                    predict_noise(student, x, t)  # the activation scales start here
                optimiser = torch.optim.Adam(_groups(student, binary, lr))
                fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
            loss, extra = _loss(student, network, x, t, noise, paths, bases, mimic, mimic_axis)
            losses.append(float(loss.detach()))
            loss = loss + mimic_weight * extra
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss is {float(loss.detach())} at step {step}; use a smaller lr")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            fall.step()
            advance(note=f"loss {losses[-1]:.3f}")
    for p in student.parameters():
        p.requires_grad_(False)
    for layer in binary.values():
        for s in layer.scales:
            s.copy_(s.half().float())  # as they are stored, so that the exported layers are the trained ones
    return student.eval(), binary, losses


def _groups(student: nn.Module, binary: Mapping[str, BinaryLayer], lr: float) -> list[dict[str, Any]]:
    """Everything learns; activation scales at a rate relative to their size."""
    acts = [layer.act.scale for layer in binary.values() if layer.act is not None]
    held = {id(s) for s in acts}
    others = [p.requires_grad_(True) for p in student.parameters() if id(p) not in held]
    return [
        {"params": others, "lr": lr},
        *({"params": [s], "lr": lr * float(s.detach().mean())} for s in acts),
    ]


def _loss(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    t: Tensor,
    noise: Tensor,
    paths: list[str],
    bases: dict[str, Tensor],
    mimic: Mimic | None,
    axis: str,
) -> tuple[Tensor, Tensor]:
    found = watched(student, paths)
    own = (predict_noise(student, x, t) - noise).square().mean()
    unwatch(found)
    if mimic is None:
        return own, torch.zeros(())
    wanted = watched(teacher, paths)
    with torch.no_grad():
        predict_noise(teacher, x, t)
    unwatch(wanted)
    if not bases:
        for path in paths:
            features = wanted[0][path]
            if mimic == "lowrank":
                bases[path] = principal_directions(features, axis=axis)
            else:
                bases[path] = torch.eye(channels_last(features, axis).shape[-1])
    return own, lowrank_mimic(found[0], wanted[0], bases, axis)


@method(
    "binarydm",
    room="training",
    returns="Edit",
    data="none",
    summary="one-bit weights for a diffusion model, trained with the float network's features as a guide",
    example="actlas fit binarydm digits-unet/ --steps 600 --act-bits 4 -o binary/",
    papers=("binarydm",),
)
def binarize_diffusion(
    model: Model | nn.Module,
    images: Tensor | None = None,
    *,
    high: int = 2,
    low: int = 1,
    act_bits: int = 4,
    mimic: str = "lowrank",
    mimic_weight: float = 0.1,
    steps: int = 600,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> QuantEdit:
    """Binarise a diffusion model by training; the edit holds packed signs.

    Args:
        model: a diffusion model that carries its noise schedule (a folder saved with `save_module`).
        images: to train on; default samples of the model itself, so that no data are needed.
        high, low: signs a weight at the image's size and below.
        act_bits: of activations.
        mimic: `"lowrank"`, `"full"` or `"none"`.
        mimic_weight, steps, batch, lr: see `binarize_network`.
        seed: of everything that is drawn.

    Returns:
        the edit, with the error of the predicted noise before (float) and after on images kept apart.

    Raises:
        ModelError: no diffusion model.
    """
    network: Any = model if isinstance(model, nn.Module) else model.module
    if not isinstance(getattr(network, "schedule", None), NoiseSchedule):
        raise ModelError(
            f"{type(network).__name__} is no diffusion model that Actlas can train (it carries no noise "
            "schedule); give the folder of one that was saved with core.module_folder.save_module"
        )
    if images is None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(1024, *network.image_shape, generator=generator)
        images = ddim_sample(network, start, network.schedule, steps=25)
    check_images(images)
    apart = max(1, len(images) // 8)
    student, binary, _ = binarize_network(
        network,
        images[apart:],
        high=high,
        low=low,
        act_bits=act_bits,
        mimic=None if mimic == "none" else mimic,  # type: ignore[arg-type]
        mimic_weight=mimic_weight,
        steps=steps,
        batch=batch,
        lr=lr,
        seed=seed,
    )
    found = [
        _noise_loss(n, images[:apart], name, seed) for name, n in (("float", network), ("binary", student))
    ]
    made = binary_edit(student, network, binary).with_measurements(found)
    made = made if isinstance(model, nn.Module) else made.bind(model.fingerprint)
    assert isinstance(made, QuantEdit)
    return made


def binary_edit(student: nn.Module, network: nn.Module, binary: Mapping[str, BinaryLayer]) -> QuantEdit:
    """Return what turns the float network into the trained binary one: packed layers and changed
    parameters.
    """
    modules = {path: layer.export() for path, layer in binary.items()}
    before, after = dict(network.named_parameters()), dict(student.named_parameters())
    changed = {
        n: after[n].detach().clone()
        for n, p in before.items()
        if n.rpartition(".")[0] not in binary and not torch.equal(p, after[n])
    }
    return QuantEdit(modules, changed, method="binarydm")


def _noise_loss(network: nn.Module, images: Tensor, name: str, seed: int) -> Measurement:
    loss = denoising_loss(network, images, schedule_of(network), seed=seed)
    return mean_measurement(
        "noise error",
        "squared",
        loss.numpy(),
        seed=seed,
        over="images",
        better="lower",
        group={"network": name},
    )
