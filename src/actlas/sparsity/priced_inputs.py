"""Priced inputs: skip where the loss minds least per weight saved. This room's own rule.

Published rules score an input by its size, or by what it adds to its own layer's output, and give every
layer the same share. But layers differ far more in what the loss minds than inputs differ within a layer.
With f_i = sqrt(E[(dL/dy . W[:, i])^2]), measured in one backward pass (`sensitivity.input_gradients`),
(x_i f_i)^2 / 2 estimates the rise of the loss if the input alone is skipped, in one unit for all layers.
So one price per weight sets every layer's budget:

    skip share of layer l = share of its inputs with (x_i f_i)^2 < price * rows_l

with the price that meets the budget over all weights together. Which inputs a layer skips within its share
is decided by |x_i| c_i: the column norm (`rank="wina"`), f (`rank="loss"`), or their geometric mean
(`rank="both"`), in which the noise of f from little text and the blindness of the norm to the rest of the
model are both halved. It costs one backward pass over about a thousand tokens, once.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from actlas.core.calibration import Calibration
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.linear_layers import linear_layers
from actlas.sparsity.allocate import by_price
from actlas.sparsity.input_sparsity import Phase, calibrate_inputs, check_sparsity, skip_inputs
from actlas.sparsity.sensitivity import input_gradients

Rank = Literal["wina", "loss", "both"]


@method(
    "priced-inputs",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="skip the inputs that the loss minds least per weight saved (budgets by one price)",
    example="actlas fit priced-inputs smollm2 prose --sparsity 0.5 -o sparse/",
    papers=("wina",),
)
def fit_priced_inputs(
    model: Model,
    data: Any,
    *,
    sparsity: float = 0.5,
    rank: Rank = "wina",
    most: float = 0.95,
    phase: Phase = "all",
    tokens: int = 4096,
    gradient_tokens: int = 1024,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that skips inputs at one price per weight.

    Args:
        model: a causal language model with a layout and plain linear layers.
        data: text.
        sparsity: share of the blocks' weights that is skipped, in (0, 1).
        rank: what chooses the inputs within a layer.
        most: no layer skips more than this share.
        phase: all tokens, or generated ones only.
        tokens, context: of the calibration.
        gradient_tokens: of the backward pass.
        seed: of the sample and of the drawn labels.

    Raises:
        InputError: a sparsity outside (0, 1), an unknown rank, a calibration instead of text.
    """
    check_sparsity(sparsity)
    if rank not in get_args(Rank):
        raise InputError(f"rank is {rank!r}; it must be 'wina', 'loss' or 'both'")
    if isinstance(data, Calibration):
        raise InputError("gradients are measured on text; give text instead of a calibration")
    data = list(data)
    layers = linear_layers(model)
    read = {"tokens": gradient_tokens, "context": min(context, 128), "seed": seed}
    minds = input_gradients(model, data, layers, **read)
    calibration = calibrate_inputs(model, data, tokens=tokens, context=context, seed=seed)
    scores = {p.path: calibration[p.reads].rows.abs() * minds[p.path].cpu() for p in layers}
    shares = by_price(layers, scores, sparsity, most=most)
    factor: dict[str, Tensor | float] = {}
    for layer in layers:
        norms, f = layer.column_norms(model), minds[layer.path]
        factor[layer.path] = norms if rank == "wina" else f if rank == "loss" else (norms * f).sqrt()
    return skip_inputs(model, calibration, shares, factor, phase=phase)
