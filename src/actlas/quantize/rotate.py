"""Rotate and round: fixed Hadamard rotations spread outliers over all channels before rounding.

The residual stream is rotated by one random Hadamard matrix, which folds into embeddings, readers and
writers; value heads by another; inputs of down projections by Hadamard blocks while the model runs. No
channel then sticks out, so one scale a token wastes few levels. Nothing is learned: the baseline of learned
rotations (`ostquant`).

Source: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (Ashkboos et al. 2024, arXiv 2404.00456).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from actlas.core.edit import Edit
from actlas.core.methods import method
from actlas.quantize.layers import split_text
from actlas.quantize.rounded_transforms import Formats, Solver, rounded
from actlas.quantize.transform_set import Start, TransformSet

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "rotate",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights and activations rounded after Hadamard rotations have spread the outliers (QuaRot)",
    example="actlas fit rotate smollm2 prose --bits 4 --act-bits 4 -o w4a4/",
    papers=("ostquant",),
)
def fit_rotate(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 4,
    act_bits: int = 4,
    format: str = "",
    start: Start = "hadamard",
    online: bool = True,
    solver: Solver = "rtn",
    skip: tuple[str, ...] = (),
    tokens: int = 1024,
    context: int = 128,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that rotates a model and rounds its weights and the inputs of its layers.

    Args:
        model: a causal language model. Streams that no rotation passes through (with norms after their
            writers, for example) are rotated at each layer's input instead.
        data: text for GPTQ and for the price; default: the bundled prose.
        bits, act_bits: of weights and inputs; `act_bits=0` rounds weights only.
        format: of the weights, by name; default: whole output channels at `bits`.
        start: which rotation: `"hadamard"`, `"womi"` (eigenvectors of the weights first) or `"identity"`.
        online: rotate inputs that no fold reaches while the model runs.
        solver: `"rtn"` or `"gptq"`.
        skip: layers that keep their numbers.
        tokens, context: of the calibration text.
        evaluate: tokens of held-out text on which the price is measured; 0: none.
        seed: of the rotations and the text.

    Raises:
        InputError: formats or options that do not exist.
    """
    texts = split_text(model, data, tokens=max(64, tokens), context=context, seed=seed)
    transforms = TransformSet(model, ("res", "ov"), start=start, seed=seed)
    return rounded(
        model,
        transforms,
        Formats(format, bits, act_bits, skip=tuple(skip)),
        method="rotate",
        online=online,
        solver=solver,
        corpus=texts.fit,
        tokens=tokens,
        texts=texts,
        evaluate=evaluate if model.kind == "causal-lm" else 0,
        seed=seed,
        note=f"start {start}",
    )
