"""QuEST: fine-tune only what low-bit diffusion models are sensitive to, with the float network as teacher.

    edit = quest_diffusion(model, w_bits=4, a_bits=4)

It begins with Q-Diffusion's network (`q_diffusion.py`) and adds

1. time-wise activation ranges: one for each calibrated timestep; other timesteps take the nearest one's;
2. stage 1: the layers that carry the timestep learn weights, biases and activation scales; the loss is the
   mean squared error of their outputs and of the predicted noise;
3. stage 2: the layers whose rounded input hurts the noise most, and all other activation scales; the loss is
   the mean squared error of the predicted noise.

Which layers these are is found by running the network, not by their names: the timestep's layers are those
whose input does not change with the image, the sensitive ones come out of rounding one input at a time.
Weights learn through `floor` straight through, with the up-or-down choices of AdaRound kept; timesteps are
mixed in every batch and the optimiser is made once a stage (the official code makes it anew for each
timestep).

Source: Wang et al. 2024, "QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning";
github.com/hatchetProject/QuEST. Not the QuEST that trains language models with one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.progress import progress
from actlas.core.quant_edit import QuantEdit
from actlas.quantize.q_diffusion import bound, noise_error, q_diffusion_network
from actlas.quantize.sensitive_layers import site_sensitivity, time_layers
from actlas.quantize.soft_network import SoftNetwork, freeze, scale_groups
from actlas.quantize.trajectory import Trajectory, diffusion_network, trajectory_data

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(frozen=True)
class Stage:
    """One stage of fine-tuning.

    Attributes:
        layers: paths of the layers whose weights and biases learn.
        scales: paths of the layers and inner quantisers whose activation scales learn.
        own_outputs: add the mean squared errors of the layers' own outputs to the loss.
        lr: rate of weights and biases. Published: 1e-5 for tens of thousands of steps.
        scale_lr: rate of scales, relative to their size.
        steps: of Adam.
    """

    layers: tuple[str, ...]
    scales: tuple[str, ...]
    own_outputs: bool = False
    lr: float = 3e-4
    scale_lr: float = 3e-3
    steps: int = 100


def selective_finetune(
    soft: SoftNetwork,
    data: Trajectory,
    stages: Sequence[Stage],
    *,
    batch: int = 32,
    seed: int = 0,
) -> list[float]:
    """Fine-tune a quantised network, stage by stage, in place.

    Args:
        soft: hardened weights, calibrated activations.
        data: calibration data.
        stages: what learns when.
        batch: rows a step, of all timesteps.
        seed: of the batches.

    Returns:
        the error of the predicted noise on all data, before the first stage and after each.

    Raises:
        InputError: no stages, or a path that is no layer.
        NonFiniteError: the loss became NaN or infinite.
    """
    if not stages:
        raise InputError("there is no stage; give at least one")
    for stage in stages:
        for path in (*stage.layers, *stage.scales):
            if path not in soft.layers and path not in soft.inner:
                raise InputError(f"{path!r} is no quantised layer; there are {', '.join(soft.layers)}")
    (x, t), outputs, want = _teacher(soft, data, stages)

    @torch.no_grad()
    def whole() -> float:
        found = [soft.network(a, b) for a, b in zip(x.split(256), t.split(256), strict=True)]
        return float((torch.cat(found) - want).square().mean())

    history = [whole()]
    with progress("selective fine-tuning", sum(s.steps for s in stages), "steps") as advance:
        for number, stage in enumerate(stages):
            _run(soft, stage, (x, t), outputs, want, batch, seed + number, advance)
            history.append(whole())
    return history


def _teacher(
    soft: SoftNetwork, data: Trajectory, stages: Sequence[Stage]
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor], Tensor]:
    """Return all data, the teacher's outputs of the layers that are compared, and its noise."""
    from actlas.core.layout import find

    paths = sorted({p for s in stages if s.own_outputs for p in s.layers})
    held: dict[str, list[Tensor]] = {p: [] for p in paths}
    handles = []
    for path in paths:
        module = find(soft.teacher, path)
        assert module is not None

        def keep(m: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
            held[path].append(output)

        handles.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            want = torch.cat([soft.teacher(*a, **k) for a, k in data.calls])
    finally:
        for handle in handles:
            handle.remove()
    return (torch.cat(data.x), torch.cat(data.times)), {p: torch.cat(v) for p, v in held.items()}, want


def _run(
    soft: SoftNetwork,
    stage: Stage,
    inputs: tuple[Tensor, Tensor],
    outputs: dict[str, Tensor],
    want: Tensor,
    batch: int,
    seed: int,
    advance: Callable[..., Any],
) -> None:
    weights = [soft.layers[p].matrix for p in stage.layers if p in soft.layers]
    weights += [b for p in stage.layers if p in soft.layers and (b := soft.layers[p].bias) is not None]
    scales = []
    for p in stage.scales:
        act = soft.inner[p] if p in soft.inner else soft.layers[p].act
        if act is not None:
            scales.append(act.scale)
    groups: list[dict[str, Any]] = scale_groups(scales, stage.scale_lr)
    if weights:
        groups.append({"params": [w.requires_grad_(True) for w in weights], "lr": stage.lr})
    if not groups:
        raise InputError("a stage has nothing to learn; give layers or scales")
    optimiser = torch.optim.Adam(groups)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, stage.steps)
    generator = torch.Generator().manual_seed(seed)
    x, t = inputs
    compared = [p for p in stage.layers if stage.own_outputs]
    seen: dict[str, Tensor] = {}
    handles = []
    for path in compared:

        def keep(m: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
            seen[path] = output

        handles.append(soft.layers[path].register_forward_hook(keep))
    try:
        with torch.enable_grad():
            for step in range(stage.steps):
                rows = torch.randperm(len(x), generator=generator)[:batch]
                seen.clear()
                loss = (soft.network(x[rows], t[rows]) - want[rows]).square().mean()
                for path in compared:
                    loss = loss + (seen[path] - outputs[path][rows]).square().mean()
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"the loss is {float(loss.detach())} at step {step}; use a smaller rate"
                    )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                fall.step()
                with torch.no_grad():
                    for s in scales:
                        s.clamp_(min=1e-8)
                advance()
    finally:
        for handle in handles:
            handle.remove()
        freeze([*weights, *scales])


def quest_stages(
    soft: SoftNetwork, data: Trajectory, *, sensitive: int = 6, steps: int = 100
) -> tuple[Stage, Stage]:
    """Return the two stages: the timestep's layers, then the most sensitive others.

    Args:
        soft: calibrated.
        data: to find them with.
        sensitive: how many layers learn in stage 2.
        steps: of each stage.
    """
    calls, _ = data.mixed(128)
    about_time = time_layers(soft, calls[0])
    ranked = site_sensitivity(soft, calls[:2])
    chosen = tuple(p for p in ranked if p in soft.layers and p not in about_time)[:sensitive]
    others = tuple(p for p in (*soft.layers, *soft.inner) if p not in about_time)
    return (
        Stage(about_time, about_time, own_outputs=True, steps=steps),
        Stage(chosen, others, steps=steps),
    )


@method(
    "quest-diffusion",
    room="quantize",
    returns="Edit",
    data="none",
    summary="4-bit diffusion models: ranges by timestep, fine-tuning of the time and the sensitive layers",
    example="actlas fit quest-diffusion digits-unet/ --w-bits 4 --a-bits 4 -o quest/",
    papers=("quest-diffusion",),
)
def quest_diffusion(
    model: Model | nn.Module,
    *,
    w_bits: int = 4,
    a_bits: int = 4,
    n_steps: int = 20,
    n_per_step: int = 64,
    iterations: int = 300,
    steps: int = 200,
    sensitive: int = 6,
    per_channel: bool = False,
    seed: int = 0,
) -> QuantEdit:
    """Quantise and fine-tune the network of a diffusion model.

    Args:
        model: a diffusion model that carries its noise schedule (a folder saved with `save_module`).
        w_bits, a_bits: bits of weights and activations; first and last convolution have 8.
        n_steps, n_per_step: calibrated timesteps and images at each. Published: 20 to 25, and 256.
        iterations: of AdaRound for each block.
        steps: of each stage of fine-tuning.
        sensitive: layers that learn in stage 2.
        per_channel: a range for each channel, as the official code has at 4 bits (no integer product then).
        seed: of noise and batches.

    Returns:
        the edit, with the error of its noise before and after fine-tuning on fresh trajectories.

    Raises:
        ModelError: no diffusion model. InputError: settings that make no sense.
    """
    network = diffusion_network(model)
    data = trajectory_data(network, n_steps=n_steps, n_per_step=n_per_step, seed=seed)
    soft = q_diffusion_network(
        network,
        data,
        w_bits=w_bits,
        a_bits=a_bits,
        iterations=iterations,
        act_iterations=0,
        per_channel=per_channel,
        times=data.t,
        seed=seed,
    )
    fresh = trajectory_data(network, n_steps=min(n_steps, 10), n_per_step=min(n_per_step, 32), seed=seed + 1)
    before = noise_error(soft.network, network, fresh, seed=seed)
    stages = quest_stages(soft, data, sensitive=sensitive, steps=steps)
    selective_finetune(soft, data, stages, seed=seed)
    after = noise_error(soft.network, network, fresh, seed=seed)
    found: list[Measurement] = [
        before.with_group(stage="before fine-tuning"),
        after.with_group(stage="after fine-tuning"),
    ]
    made = soft.export("quest-diffusion", f"W{w_bits}A{a_bits}").with_measurements(found)
    assert isinstance(made, QuantEdit)
    return bound(made, model)
