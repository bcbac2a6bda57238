"""Skip layers: the void rule as a method, and the static variant that saves compute.

Layer-adaptive computation (LAC) calls a layer void for a token when it raises the norm of the hidden
state by less than alpha times the range of the rises so far. The rule has to run a layer to judge it,
so LAC itself saves nothing (`actlas.measure.void_edits.lac` has it, as released and with true
skipping). What saves compute is to take out, for every token, the layers that are void most often:

    edit = fit_layer_skip(model, corpus, budget=3)       # take out 3 blocks

Source: "Void in Language Models" (2025); the static variant is ours.
"""

from __future__ import annotations

from typing import Any, Literal

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.void_edits import lac, static_layer_skip
from actlas.measure.voids import void_trace


@method(
    "layer-skip",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="take out the layers that are void for most tokens, for every token",
    example="actlas fit layer-skip smollm2 prose --option budget=3 -o shallow/",
    papers=("void",),
)
def fit_layer_skip(
    model: Model,
    data: Any,
    *,
    budget: float = 2,
    alpha: float = 0.8,
    tokens: int = 1024,
    context: int = 256,
) -> Edit:
    """Return the edit that takes the least used blocks out of the model.

    Args:
        model: a model with residual sites.
        data: a corpus on which layer usage is measured.
        budget: how many blocks to take out, or the share of all blocks if below 1.
        alpha: threshold of the void rule.
        tokens, context: how much of the corpus is read, in tokens.

    Raises:
        InputError: a budget that leaves too few blocks.
    """
    trace = void_trace(model, data, alpha=alpha, tokens=tokens, context=context)
    return static_layer_skip(model, [float(u) for u in trace.profile()], budget).bind(model.fingerprint)


@method(
    "lac",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="layer-adaptive computation: skip, or leave out of the readout, layers void for a token",
    example="actlas fit lac smollm2 --option mode=skip --option alpha=0.5 -o lac/",
    papers=("void",),
)
def fit_lac(model: Model, *, alpha: float = 0.8, mode: Literal["readout", "skip"] = "readout") -> Edit:
    """Return the void rule as an edit; nothing is fitted.

    Args:
        model: what it is for.
        alpha: threshold, in (0, 1].
        mode: `"readout"` as released, or `"skip"` for true skipping.

    Raises:
        InputError: another mode.
    """
    if mode not in ("readout", "skip"):
        raise InputError(f"mode is {mode!r}; it must be 'readout' or 'skip'")
    return lac(alpha, mode).bind(model.fingerprint)
