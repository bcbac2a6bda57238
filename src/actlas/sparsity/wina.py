"""WINA and magnitude thresholds: every linear layer skips the inputs that matter least to its output.

For y = W x with inputs skipped by m, the error is ||W ((1-m) * x)||. If the columns of W are orthogonal it
is exactly sum_i (1-m_i) x_i^2 ||W[:, i]||^2, so that keeping the largest |x_i| ||W[:, i]|| is optimal; for
other weights it is a heuristic, and a better one than keeping the largest |x_i|.

Three variants: `norms="all"` uses the norms in every layer; `norms="released"` as the released code does,
in k_proj and gate_proj only (its other layers lose their orthogonal columns in the rotation);
`orthogonal=True` first turns the inputs of attention and MLP into the basis in which k_proj's and
gate_proj's columns are orthogonal (`orthogonal.py`).

Source: Chen et al. 2025, "WINA" (arXiv 2505.19427). Magnitude: Liu et al. 2024, "TEAL" (arXiv 2408.14690).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from actlas.core.calibration import Calibration
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.linear_layers import linear_layers
from actlas.sparsity.allocate import greedy
from actlas.sparsity.input_sparsity import (
    Phase,
    Select,
    calibrate_inputs,
    check_sparsity,
    factors,
    skip_inputs,
    uniform,
)
from actlas.sparsity.orthogonal import orthogonal_skips
from actlas.sparsity.sensitivity import loss_rises

Allocate = Literal["uniform", "greedy"]
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@method(
    "wina",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="skip the inputs of every linear layer with the smallest size times column norm",
    example="actlas fit wina smollm2 prose --sparsity 0.5 -o sparse/",
    papers=("wina",),
)
def fit_wina(
    model: Model,
    data: Any,
    *,
    sparsity: float = 0.5,
    norms: Literal["all", "released"] = "all",
    orthogonal: bool = False,
    allocate: Allocate = "uniform",
    select: Select = "threshold",
    phase: Phase = "all",
    tokens: int = 4096,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that skips inputs by WINA's score.

    Args:
        model: a model with a layout and plain linear layers.
        data: text, or a calibration of `calibrate_inputs`.
        sparsity: share of inputs (and so of weights) that is skipped, in [0, 1).
        norms: layers that use the column norms.
        orthogonal: rotate the inputs of q, k, v, gate and up first; only with `norms="released"`, whose
            assumption it makes true, and uniform budgets.
        allocate: the same share everywhere, or by measured sensitivity (needs text).
        select: one threshold a layer, or the top of each token.
        phase: all tokens, or generated ones only.
        tokens, context, seed: of the calibration.

    Raises:
        InputError: a sparsity outside (0, 1), or options that do not go together.
    """
    if norms not in ("all", "released"):
        raise InputError(f"norms is {norms!r}; it must be 'all' or 'released'")
    check_sparsity(sparsity)
    if orthogonal:
        if norms != "released" or allocate != "uniform" or select != "threshold" or phase != "all":
            raise InputError(
                "orthogonal=True goes with norms='released', uniform budgets, thresholds and all tokens"
            )
        calibration = calibrate_inputs(model, data, tokens=tokens, context=context, seed=seed)
        return orthogonal_skips(model, calibration, sparsity)
    score: Literal["wina", "wina-released"] = "wina" if norms == "all" else "wina-released"
    rule = factors(model, linear_layers(model), score)
    return _fit(model, data, sparsity, rule, allocate, select, phase, tokens, context, seed)


@method(
    "magnitude-sparsity",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="skip the smallest inputs of every linear layer (thresholds as in TEAL)",
    example="actlas fit magnitude-sparsity smollm2 prose --sparsity 0.4 -o sparse/",
    papers=("wina",),
)
def fit_magnitude(
    model: Model,
    data: Any,
    *,
    sparsity: float = 0.5,
    allocate: Allocate = "uniform",
    select: Select = "threshold",
    phase: Phase = "all",
    tokens: int = 4096,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that skips the smallest inputs; arguments as of `fit_wina`."""
    check_sparsity(sparsity)
    rule = factors(model, linear_layers(model), "magnitude")
    return _fit(model, data, sparsity, rule, allocate, select, phase, tokens, context, seed)


def _fit(
    model: Model,
    data: Any,
    sparsity: float,
    rule: dict[str, Tensor | float],
    allocate: Allocate,
    select: Select,
    phase: Phase,
    tokens: int,
    context: int,
    seed: int,
) -> Edit:
    if allocate not in ("uniform", "greedy"):
        raise InputError(f"allocate is {allocate!r}; it must be 'uniform' or 'greedy'")
    layers = linear_layers(model)
    shares = uniform(layers, sparsity)
    if allocate == "greedy":
        if isinstance(data, Calibration):
            raise InputError("greedy budgets are measured on text; give text instead of a calibration")
        data = list(data)
        read = {"tokens": min(tokens, 1024), "context": min(context, 128), "seed": seed}
        shares = greedy(layers, loss_rises(model, data, layers, rule, LEVELS, **read), LEVELS, sparsity)
    calibration = calibrate_inputs(model, data, tokens=tokens, context=context, seed=seed)
    return skip_inputs(model, calibration, shares, rule, select=select, phase=phase)
