"""`actlas fit controller`: from labelled prompts to a weighted steering controller, with its quality.

Prompts with label 1 are to be steered (towards "I'm sorry, ..." by default), prompts with label 0 are to be
left alone. See `controller` for what the edit does and `controller_training` for the objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.calibration.reading import check_row_sites
from actlas.core.direction import Direction
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.measure.samples import mean_measurement
from actlas.measure.statistics import auc
from actlas.steering.controller import Controller, Read, Scalar
from actlas.steering.controller_training import train_controller, train_on_outcome
from actlas.steering.gate_rows import GateTexts, read_gate_rows
from actlas.steering.openings import COMPLYING, REFUSING, opening_directions

if TYPE_CHECKING:
    from actlas.core.model import Model

Directions = Mapping[str, Direction | Tensor]
_DIRECTION_PROMPTS = 32


@method(
    "controller",
    room="steering",
    returns="Edit",
    data="labelled",
    summary="a trained controller that steers prompts with label 1 and leaves the others alone",
    example="actlas fit controller smollm2 prompts.jsonl -o refuse-maths/",
    papers=("was-controller",),
)
def fit_controller(
    model: Model,
    data: Any,
    site: str | Sequence[str] | None = None,
    *,
    read_sites: str | Sequence[str] | None = None,
    directions: Directions | None = None,
    positive: Sequence[str] = REFUSING,
    negative: Sequence[str] = COMPLYING,
    objective: Literal["bce", "outcome"] = "bce",
    read: Read = "prompt",
    scalar: Scalar = "sigmoid",
    alpha: float = 0.2,
    hidden: int = 1024,
    epochs: int = 10,
    batch: int = 8,
    lr: float = 1e-3,
    opening: str = "I'm sorry",
    steps: int = 40,
    kl_weight: float = 1.0,
    held_out: float = 0.25,
    seed: int = 0,
) -> Edit:
    """Fit a controller and the directions that it steers along.

    Args:
        model: a language model.
        data: labelled prompts, whole (chat template applied): 1 to steer, 0 to leave alone.
        site: where to steer; default `resid_post` of every second block of the middle third.
        read_sites: where to read; default `resid_post` of the four blocks up to the first steered one.
        directions: by steered site, a `Direction` or a vector; default: mean differences between
            `positive` and `negative` openings of answers to these prompts.
        positive, negative: openings for the default directions.
        objective: `"bce"` (the paper) or `"outcome"`.
        read, scalar: see `ControlledSteer`.
        alpha: length of a push of 1, in units of each site's median norm (with vectors: times the vector).
            A push is at most that; the untrained layer weight of 0.5 makes it half.
        hidden, epochs, batch, lr: see `train_controller`.
        opening, steps, kl_weight: see `train_on_outcome`.
        held_out: share of prompts on which the gate is measured.
        seed: of the split, the training and the control.

    Returns:
        The edit; its `measurements` are, on held-out prompts, the AUC of the scalar, the same for a
        controller trained on shuffled labels, and the mean push on prompts of either label.

    Raises:
        InputError: one class only, an unknown objective, or directions for other sites.
    """
    if objective not in ("bce", "outcome"):
        raise InputError(f"objective is {objective!r}; it must be 'bce' or 'outcome'")
    texts = GateTexts.of(data, "a controller")
    steered = [s.name for s in check_row_sites(model.resolve(site or _middle(model)))]
    readers = [s.name for s in check_row_sites(model.resolve(read_sites or _before(model, steered)))]
    fit, test = texts.split((held_out,), seed)
    chosen = [texts.texts[i] for i in fit]
    if directions is None:
        some = chosen[:: max(1, len(chosen) // _DIRECTION_PROMPTS)][:_DIRECTION_PROMPTS]
        directions = opening_directions(model, some, steered, positive=positive, negative=negative)
    vectors = scaled_vectors(directions, alpha)
    x = read_gate_rows(model, texts.texts, readers)
    options: dict[str, Any] = {"hidden": hidden, "epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    controller = train_controller(x[fit], texts.y[fit], readers, steered, **options)
    shuffled = texts.y[fit][torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed))]
    control = train_controller(x[fit], shuffled, readers, steered, **options)
    if objective == "outcome":
        controller = train_on_outcome(
            model, controller, vectors, x[fit], texts.y[fit], chosen, opening=opening, scalar=scalar,
            steps=steps, batch=batch, lr=lr, kl_weight=kl_weight, seed=seed,
        )  # fmt: skip
    edit = controller.steer(vectors, read=read, scalar=scalar).bind(model.fingerprint)
    measured = [
        *gate_quality(controller, x[test], texts.y[test], scalar, "controller", seed),
        *gate_quality(control, x[test], texts.y[test], scalar, "trained on shuffled labels", seed),
    ]
    return edit.with_measurements(measured)


def scaled_vectors(directions: Directions, alpha: float) -> dict[str, Tensor]:
    """Return what a push of 1 adds at each site: `alpha` times the median norm along a `Direction`, or
    times a bare vector.

    Raises:
        InputError: alpha is not above 0.
    """
    if not alpha > 0:
        raise InputError(f"alpha is {alpha}; it must be above 0 (for the other way, flip the directions)")
    return {
        site: alpha * (d.unit * d.reference if isinstance(d, Direction) else d)
        for site, d in directions.items()
    }


def gate_quality(
    controller: Controller, x: Tensor, y: Tensor, scalar: Scalar, name: str, seed: int, **group: str
) -> list[Measurement]:
    """Return the AUC of the controller's scalar on rows `x` with labels `y`, and its mean pushes."""
    s, _ = controller.forward(x)
    named = {"gate": name, **group}
    area = auc(y.numpy(), s.numpy(), seed=seed)
    found = [
        Measurement(
            "gate AUC",
            area.value,
            "fraction",
            area.n,
            area.low,
            area.high,
            "bootstrap over prompts",
            seed,
            group=named,
            better="higher",
            note=area.note,
        )
    ]
    pushes = controller.pushes(x, scalar).mean(-1)
    for label, what in ((1, "prompts to steer"), (0, "prompts to leave alone")):
        found.append(
            mean_measurement(
                "mean push",
                "fraction of alpha",
                pushes[y == label].numpy(),
                seed=seed,
                over="prompts",
                group={**named, "on": what},
            )
        )
    return found


def _middle(model: Model) -> tuple[str, ...]:
    blocks = model.n_blocks
    if not blocks:
        raise InputError(f"{model.name} has no known blocks; name sites to steer at")
    return tuple(f"blocks.{i}.resid_post" for i in range(blocks // 3, max(2 * blocks // 3, 1) + 1, 2))[:8]


def _before(model: Model, steered: Sequence[str]) -> tuple[str, ...]:
    first = min(model.resolve(steered), key=lambda s: s.order)
    if first.block is None:
        raise InputError(f"{first.name} is in no block; name sites to read at")
    blocks = range(max(0, first.block - 3), first.block + 1)
    names = tuple(f"blocks.{i}.resid_post" for i in blocks)
    return tuple(n for n in names if model.resolve(n)[0].order <= first.order) or (first.name,)
