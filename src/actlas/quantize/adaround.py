"""AdaRound: for every weight, learn whether to round up or down, so that a block's output stays.

    min_v   E(v) + lambda sum(1 - |2 h(v) - 1|^beta)

(Nagel et al. 2020, equation 25), with E one of

    mse           mean over the data of |f_v(x) - f(x)|^2, for a layer or a block (BRECQ, Q-Diffusion)
    fisher_diag   the same, each output weighted by the square of its gradient in the network's loss (BRECQ)
    kfac          tr(G D A D^T), D = rounded - target weight, A = E[x x^T] of the inputs, G = E[g g^T] of the
    output's
                  gradients (QuartDepth); with G = I this is the layer's mean squared output error

The regulariser is off during the warm-up, then beta falls linearly from 20 to 2. The scales are those that
are stored, during and after. Where the hardened result is worse than rounding to nearest on the same data,
rounding to nearest is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.network_blocks import BlockData
from actlas.quantize.soft_layers import SoftLayer

Objective = Literal["mse", "fisher_diag", "kfac"]
Loss = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Rounding:
    """How a block's weights were rounded.

    Attributes:
        nearest: the objective with all weights rounded to nearest.
        learned: the objective with the learned choice.
        flipped: share of the weights that are not rounded to nearest.
        kept: whether the learned choice was kept.
    """

    nearest: float
    learned: float
    flipped: float
    kept: bool


def learn_rounding(
    layers: Mapping[str, SoftLayer],
    loss: Loss,
    exact: Callable[[], float],
    *,
    iterations: int = 300,
    lr: float = 1e-2,
    weight: float = 0.01,
    beta: tuple[float, float] = (20.0, 2.0),
    warm_up: float = 0.2,
    relative: bool = False,
    seed: int = 0,
    where: str = "the block",
) -> Rounding:
    """Learn the rounding of some layers together; they are left in mode `"hard"`.

    Args:
        layers: by name, for messages; they are already in the block that `loss` runs.
        loss: the objective on a random batch, drawn with the generator it is given, with gradients.
        exact: the objective on all data.
        iterations: steps of Adam. Published: 20,000 at a rate of 1e-3; fewer need a larger rate.
        lr: its rate.
        weight: lambda.
        beta: start and end of the exponent.
        warm_up: share of the iterations without the regulariser.
        relative: measure the objective in units of its value for rounding to nearest, and the regulariser as
            a mean over the weights, so that lambda (then 1 times `weight` / 0.01) does not depend on their
            sizes.
        seed: of the batches.

    Raises:
        InputError: settings that make no sense, or no layers.
        NonFiniteError: the objective became NaN or infinite.
    """
    if not layers or iterations < 1 or lr <= 0 or not 0 <= warm_up < 1:
        raise InputError(
            f"{where}: rounding needs layers, iterations above 0, a rate above 0 and a warm-up below 1, not "
            f"{len(layers)}, {iterations}, {lr:g}, {warm_up:g}"
        )
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.nearest()
        layer.mode = "hard"
    nearest = exact()
    unit, each = 1.0, weight
    if relative:
        unit = nearest if nearest > 0 else 1.0
        each = 100 * weight / sum(layer.v.numel() for layer in layers.values())
    for layer in layers.values():
        layer.reset()
        layer.mode = "soft"
        layer.v.requires_grad_(True)
    variables = [layer.v for layer in layers.values()]
    optimiser = torch.optim.Adam(variables, lr=lr)
    try:
        with torch.enable_grad():
            for step in range(iterations):
                error = loss(generator) / unit
                if not bool(torch.isfinite(error)):
                    raise NonFiniteError(
                        f"{where}: the rounding objective is {float(error.detach())} at step {step}"
                    )
                done = (step / iterations - warm_up) / (1 - warm_up)
                if done >= 0:
                    power = beta[1] + (beta[0] - beta[1]) * (1 - done)
                    error = error + each * sum(layer.penalty(power) for layer in layers.values())
                optimiser.zero_grad()
                error.backward()
                optimiser.step()
    finally:
        for layer in layers.values():
            layer.v.requires_grad_(False)
            layer.v.grad = None
            layer.mode = "hard"
    learned = exact()
    flipped = _flipped(layers.values())
    kept = learned <= nearest
    if not kept:
        for layer in layers.values():
            layer.nearest()
    return Rounding(nearest, learned, flipped, kept)


def _flipped(layers: Iterable[SoftLayer]) -> float:
    total = changed = 0
    for layer in layers:
        place = (layer.matrix - layer.offset) / layer.s
        up = place - place.floor() >= 0.5
        changed += int((up != (layer.v >= 0)).sum())
        total += up.numel()
    return changed / max(total, 1)


# -- objectives ---------------------------------------------------------------------------------------


def output_error(found: Tensor, target: Tensor, gradient: Tensor | None = None, p: float = 2.0) -> Tensor:
    """Return `|found - target|^p`, summed over the features (axis 1) and averaged over all else.

    Args:
        found, target: `[batch, features, ...]`.
        gradient: of the network's loss in the output; its square weighs the entries (normalised to mean 1).
        p: exponent.
    """
    error = (found - target).abs().pow(p)
    if gradient is not None:
        weight = gradient.square()
        error = error * (weight / weight.mean().clamp_min(1e-30))
    return error.sum(1).mean() if error.ndim > 1 else error.mean()


def block_losses(
    block: nn.Module,
    data: BlockData,
    targets: Sequence[Tensor],
    *,
    gradients: Sequence[Tensor] | None = None,
    batch: int = 32,
) -> tuple[Loss, Callable[[], float]]:
    """Return the `mse` (or, with gradients, `fisher_diag`) objective of a block: on a random batch, and on
    all.

    Args:
        block: with soft layers in it.
        data: its inputs.
        targets: outputs of the original block, one for each call.
        gradients: of the network's loss in these outputs.
        batch: rows of a random batch.
    """

    def on_batch(generator: torch.Generator) -> Tensor:
        i, rows = data.batch(batch, generator)
        weight = None if gradients is None else gradients[i][rows]
        return output_error(data.run(block, i, rows), targets[i][rows], weight)

    @torch.no_grad()
    def on_all() -> float:
        total, n = 0.0, 0
        for i in range(len(data.calls)):
            weight = None if gradients is None else gradients[i]
            found = data.run(block, i)
            total += float(output_error(found, targets[i], weight)) * len(found)
            n += len(found)
        return total / n

    return on_batch, on_all


def kfac_losses(
    layer: SoftLayer, second_moment: Tensor, fisher: Tensor | None = None
) -> tuple[Loss, Callable[[], float]]:
    """Return the `kfac` objective of a layer, tr(G D A D^T) with D = rounded - `layer.matrix`.

    Args:
        layer: the layer; its `matrix` is the target.
        second_moment: A, `[columns, columns]`; for grouped convolutions one a group, `[groups, columns,
            columns]`.
        fisher: G, `[out, out]`; default the identity (always for groups). Scaled here to mean diagonal 1.

    Raises:
        InputError: factors of other sizes.
    """
    rows, columns = layer.matrix.shape
    groups = len(second_moment) if second_moment.ndim == 3 else 1
    fits = second_moment.shape[-2:] == (columns, columns) and rows % groups == 0
    if not fits or (fisher is not None and (groups > 1 or fisher.shape != (rows, rows))):
        raise InputError(
            f"{layer.where}: the weight is {rows} x {columns}, the factors are {list(second_moment.shape)} "
            f"and {None if fisher is None else list(fisher.shape)}"
        )
    a = second_moment.float()
    g = None if fisher is None else fisher.float() / fisher.diagonal().mean().clamp_min(1e-30).float()

    def error() -> Tensor:
        d = layer.weight - layer.matrix
        if groups > 1:
            d = d.reshape(groups, -1, columns)
        with torch.no_grad():
            product = (d if g is None else g @ d) @ a
        # The value is tr(G D A D^T); its gradient in D is 2 G D A, as both factors are symmetric.
        return (product * (2 * d - d.detach())).sum()

    @torch.no_grad()
    def on_all() -> float:
        return float(error())

    return (lambda generator: error()), on_all
