"""Q-Diffusion: quantise a diffusion model's network after training, calibrated along the whole trajectory.

    edit = q_diffusion(model, w_bits=4, a_bits=8)          # with model.edit(edit): ddim_sample(model.module,
    ...)

1. Calibration data are x_t at evenly spaced steps of the float sampler (`trajectory.py`).
2. Layers that read concatenated channels get a range for each part, in activations and weights
   (`concat_split.py`): `Q(X1) Q(W1) + Q(X2) Q(W2)`.
3. Weights: one scale an output channel from an L_2.4 search, then AdaRound by block on the block's output,
   with inputs from the network quantised so far and targets from the float network.
4. Activations: one range a tensor (or part), L_2.4 search, then learned scales by block, L_2.4 loss. Inside
   attention q, k, v and the softmax map are rounded too.

The first and the last convolution have 8 bits, as in the official code; norms and the timestep's embedding
are float.

Source: Li et al. 2023, "Q-Diffusion: Quantizing Diffusion Models"; github.com/Xiuyu-Li/q-diffusion, `qdiff/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actlas.core.layout import find
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.network_blocks import BlockData, Call, capture
from actlas.core.progress import progress
from actlas.core.quant_edit import QuantEdit
from actlas.quantize.adaround import block_losses, learn_rounding, output_error
from actlas.quantize.soft_network import (
    SoftNetwork,
    calibrate_acts,
    freeze,
    inside,
    scale_groups,
    soften,
)
from actlas.quantize.trajectory import Trajectory, diffusion_network, trajectory_data

if TYPE_CHECKING:
    from actlas.core.model import Model


def q_diffusion_network(
    network: nn.Module,
    data: Trajectory,
    *,
    w_bits: int = 4,
    a_bits: int | None = 8,
    iterations: int = 300,
    act_iterations: int = 100,
    lr: float = 1e-2,
    split: bool = True,
    ends_bits: int | None = 8,
    per_channel: bool = False,
    times: Sequence[int] | None = None,
    batch: int = 32,
    seed: int = 0,
) -> SoftNetwork:
    """Run all steps on a network; the result is still soft, for methods that go on from it.

    Args:
        network: the float noise predictor.
        data: calibration data.
        w_bits, a_bits: of weights and activations.
        iterations: of AdaRound for each block; 0 rounds to nearest. Published: 20,000.
        act_iterations: of the learned activation scales for each block. Published: 5,000.
        lr: AdaRound's rate; published 1e-3, with many more iterations.
        split, ends_bits, per_channel, times: see `soften`.
        batch: rows a step.
        seed: of the batches.
    """
    calls, when = data.mixed(128, seed)
    soft = soften(
        network,
        _first_rows(calls[0]),
        w_bits=w_bits,
        a_bits=a_bits,
        split=split,
        ends_bits=ends_bits,
        per_channel=per_channel,
        times=times,
    )
    if iterations:
        round_blocks(soft, calls, when, iterations=iterations, lr=lr, batch=batch, seed=seed)
    if a_bits is not None:
        calibrate_acts(soft, calls, when, seed=seed)
        soft.acts_on(True)
        if act_iterations:
            learn_scales(soft, calls, when, iterations=act_iterations, batch=batch, seed=seed)
    return soft


def round_blocks(
    soft: SoftNetwork,
    calls: Sequence[Call],
    when: Sequence[Tensor | None],
    *,
    iterations: int,
    lr: float,
    batch: int,
    seed: int,
) -> None:
    """AdaRound block by block: inputs from the network rounded so far, targets from the float network."""
    for layer in soft.layers.values():
        layer.mode = "float"
    with progress("AdaRound", len(soft.blocks), "blocks") as advance:
        for i, path in enumerate(soft.blocks):
            own = inside(soft.layers, path)
            if own:
                data = capture(soft.network, path, calls, when)
                targets = capture(soft.teacher, path, calls).outputs
                block = find(soft.network, path)
                assert block is not None
                loss, exact = block_losses(block, data, targets, batch=batch)
                soft.roundings[path] = learn_rounding(
                    own, loss, exact, iterations=iterations, lr=lr, seed=seed + i, where=path
                )
            advance()


def learn_scales(
    soft: SoftNetwork,
    calls: Sequence[Call],
    when: Sequence[Tensor | None],
    *,
    iterations: int,
    batch: int = 32,
    lr: float = 4e-4,
    seed: int = 0,
) -> None:
    """Learn the activation scales block by block (L_2.4 loss, Adam with a cosine); a worse result is taken
    back.
    """
    with progress("activation scales", len(soft.blocks), "blocks") as advance:
        for i, path in enumerate(soft.blocks):
            scales = [
                layer.act.scale for layer in inside(soft.layers, path).values() if layer.act is not None
            ]
            scales += [q.scale for p, q in soft.inner.items() if p.startswith(path + ".")]
            if scales:
                data = capture(soft.network, path, calls, when)
                targets = capture(soft.teacher, path, calls).outputs
                block = find(soft.network, path)
                assert block is not None
                fit_scales(
                    block, data, targets, scales, iterations=iterations, batch=batch, lr=lr, seed=seed + i
                )
            advance()


def fit_scales(
    block: nn.Module,
    data: BlockData,
    targets: Sequence[Tensor],
    scales: Sequence[nn.Parameter],
    *,
    iterations: int,
    batch: int,
    lr: float,
    seed: int,
    p: float = 2.4,
) -> None:
    """Learn some scales of one block against its float outputs; what is worse on all data is taken back."""
    before = [s.detach().clone() for s in scales]
    optimiser = torch.optim.Adam(scale_groups(scales, 10 * lr))
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def whole() -> float:
        return sum(float(output_error(data.run(block, i), targets[i], p=p)) for i in range(len(targets)))

    start = whole()
    with torch.enable_grad():
        for _ in range(iterations):
            i, rows = data.batch(batch, generator)
            optimiser.zero_grad()
            output_error(data.run(block, i, rows), targets[i][rows], p=p).backward()
            optimiser.step()
            fall.step()
    freeze(scales)
    if not whole() <= start:
        with torch.no_grad():
            for s, old in zip(scales, before, strict=True):
                s.copy_(old)


@method(
    "q-diffusion",
    room="quantize",
    returns="Edit",
    data="none",
    summary="low-bit weights and activations for a diffusion model, calibrated along its trajectory",
    example="actlas fit q-diffusion digits-unet/ --w-bits 4 --a-bits 8 -o q4/",
    papers=("q-diffusion",),
)
def q_diffusion(
    model: Model | nn.Module,
    *,
    w_bits: int = 4,
    a_bits: int = 8,
    n_steps: int = 20,
    n_per_step: int = 64,
    iterations: int = 300,
    act_iterations: int = 100,
    split: bool = True,
    seed: int = 0,
) -> QuantEdit:
    """Quantise the network of a diffusion model.

    Args:
        model: a diffusion model that carries its noise schedule (a folder saved with `save_module`).
        w_bits, a_bits: bits of weights and activations; first and last convolution have 8.
        n_steps, n_per_step: calibration data, see `trajectory_data`.
        iterations, act_iterations: of AdaRound and of the learned scales, for each block.
        split: ranges of their own for the two parts of concatenated skips.
        seed: of starting noise and batches.

    Returns:
        the edit, with how far its noise is from the float network's on fresh trajectories.

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
        act_iterations=act_iterations,
        split=split,
        seed=seed,
    )
    edit = soft.export("q-diffusion", f"W{w_bits}A{a_bits}")
    fresh = trajectory_data(network, n_steps=min(n_steps, 10), n_per_step=min(n_per_step, 32), seed=seed + 1)
    made = edit.with_measurements([noise_error(soft.network, network, fresh, seed=seed)])
    assert isinstance(made, QuantEdit)
    return bound(made, model)


def bound(edit: QuantEdit, model: Model | nn.Module) -> QuantEdit:
    """Return the edit, marked as made for a model where one is given (and not a bare module)."""
    made = edit if isinstance(model, nn.Module) else edit.bind(model.fingerprint)
    assert isinstance(made, QuantEdit)
    return made


@torch.no_grad()
def noise_error(student: nn.Module, teacher: nn.Module, data: Trajectory, *, seed: int = 0) -> Measurement:
    """Return the mean squared error of the predicted noise, over the teacher's mean square, by image."""
    from actlas.measure.samples import mean_measurement

    errors, powers = [], []
    for (x, t), _ in data.calls:
        want = teacher(x, t)
        errors.append((student(x, t) - want).square().flatten(1).mean(1).double())
        powers.append(want.square().flatten(1).mean(1).double())
    error = torch.stack(errors).mean(0) / torch.stack(powers).mean().clamp_min(1e-30)
    return mean_measurement(
        "relative noise error", "fraction", error.numpy(), seed=seed, over="trajectories", better="lower"
    )


def _first_rows(call: Call, n: int = 2) -> Call:
    return tuple(a[:n] for a in call[0]), call[1]
