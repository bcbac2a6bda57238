"""ReLUfication: put an activation function with exact zeros where a model's MLPs have SiLU or GELU.

    edit = relufy(model)                      # an edit of module swaps, reversible and saveable
    with model.edit(edit): ...                # then train (see prosparse), and fit a threshold:
    edit = fit_threshold_shift(model, corpus, max_ppl_ratio=1.005)

FATReLU zeroes x below a small threshold t > 0, which turns the many tiny activations of a trained ReLU model
into zeros at no loss. `fit_threshold_shift` takes the largest t of a ladder at which the perplexity is still
within the ratio; the same tokens are scored at every step.

Sources: Mirzadeh et al. 2023, "ReLU Strikes Back"; Kurtz et al. 2020 (FATReLU); Song et al. 2024,
    "ProSparse".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import nn

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import join
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.sparse_activations import FATReLU, ReLU2
from actlas.core.swap import SwapModule
from actlas.measure.likelihood import nll
from actlas.measure.paired import perplexity_ratio
from actlas.measure.sparsity import evaluate_sparse

Sparse = Literal["relu", "relu2"]
#: Thresholds that `fit_threshold_shift` tries, rising; ProSparse's own is 0.01.
LADDER = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def activation_paths(model: Model) -> list[str]:
    """Return where the activation modules of a model's MLPs are, one path a block.

    Raises:
        ModelError: no layout, or a block whose activation is no module of its own.
    """
    tower, blocks = model.tower, model.n_blocks
    if tower is None or blocks is None:
        raise ModelError(f"{model.name} has no layout, so its activation functions are not known")
    kinds = _kinds()
    out = []
    for b in range(blocks):
        here = [n for n, m in model.block(b).named_modules() if n and isinstance(m, kinds)]
        if len(here) != 1:
            raise ModelError(
                f"block {b} of {model.name} has {len(here)} activation modules; one is needed to swap it"
            )
        out.append(join(tower.blocks, str(b), here[0]))
    return out


def _kinds() -> tuple[type[nn.Module], ...]:
    from transformers.activations import ACT2CLS

    known = {FATReLU, ReLU2}
    for value in ACT2CLS.values():
        cls = value[0] if isinstance(value, tuple) else value
        if isinstance(cls, type):
            known.add(cls)
    return tuple(known)


def relufy(model: Model, kind: Sparse = "relu", *, threshold: float = 0.0) -> Edit:
    """Return the edit that swaps the activation function of every MLP.

    Args:
        model: a model with a layout whose activation functions are modules.
        kind: `"relu"` (with the threshold: FATReLU) or `"relu2"`.
        threshold: t of FATReLU.

    Raises:
        InputError: an unknown kind, a negative threshold, or a threshold with `"relu2"`.
        ModelError: the activation functions cannot be swapped.
    """
    if kind not in get_args(Sparse):
        raise InputError(f"kind is {kind!r}; it must be 'relu' or 'relu2'")
    if kind == "relu2" and threshold:
        raise InputError("relu2 has no threshold; use kind='relu'")
    swaps = [
        SwapModule(path, FATReLU(threshold) if kind == "relu" else ReLU2())
        for path in activation_paths(model)
    ]
    return compose(swaps).bind(model.fingerprint)


@method(
    "fatrelu",
    room="training",
    returns="Edit",
    data="corpus",
    summary="the largest threshold of a ReLU model's activations that perplexity does not notice (FATReLU)",
    example="actlas fit fatrelu my-relu-model prose --max-ppl-ratio 1.005 -o sparse/",
    papers=("prosparse",),
)
def fit_threshold_shift(
    model: Model,
    data: Any,
    *,
    max_ppl_ratio: float = 1.005,
    thresholds: Sequence[float] = LADDER,
    tokens: int = 4096,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the FATReLU edit with the largest threshold that keeps the perplexity.

    Args:
        model: a causal language model that has ReLU in its MLPs (with its installed edits).
        data: a corpus; its first tokens are scored.
        max_ppl_ratio: perplexity with the threshold over perplexity without, at most.
        thresholds: the ladder, rising; the search stops at the first that is too much.
        tokens, context: how many tokens are scored, in windows of which length.
        seed: of the interval.

    Returns:
        The edit; its measurements are the threshold, the perplexity ratio and the zero rates before and
        after.

    Raises:
        InputError: a ratio below 1, thresholds that do not rise, no text.
        ModelError: the MLPs have no ReLU (run `relufy` or `prosparse` first).
    """
    if not 1 <= max_ppl_ratio < math.inf:
        raise InputError(f"max_ppl_ratio is {max_ppl_ratio:g}; it must be 1 or more, e.g. 1.005")
    ladder = tuple(float(t) for t in thresholds)
    if not ladder or ladder[0] <= 0 or any(b <= a for a, b in pairwise(ladder)):
        raise InputError(f"thresholds are {ladder}; they must be positive and rise")
    for path in activation_paths(model):
        found = model.module.get_submodule(path)
        if not isinstance(found, (nn.ReLU, FATReLU)) and "relu" not in type(found).__name__.lower():
            raise ModelError(
                f"{path} of {model.name} is {type(found).__name__}; FATReLU needs a ReLU model, see prosparse"
            )
    corpus = list(data)
    size: dict[str, Any] = {"tokens": tokens, "context": context}
    base = nll(model, corpus, **size)
    runs = {0.0: evaluate_sparse(model, corpus, relufy(model), **size)}
    best = 0.0
    for threshold in ladder:
        run = evaluate_sparse(model, corpus, relufy(model, threshold=threshold), **size)
        if float((run.losses.nll - base.nll).sum() / base.tokens.sum()) > math.log(max_ppl_ratio):
            break
        best, runs[threshold] = threshold, run
    found_ratio = perplexity_ratio(base, runs[best].losses, seed=seed)
    rates = [
        Measurement(
            "zero rate", 1 - runs[t].active.ratio, "fraction", int(base.tokens.sum()), group={"when": w}
        )
        for t, w in ((0.0, "before"), (best, "after"))
    ]
    note = "" if best else "no threshold of the ladder kept the perplexity"
    measured = [Measurement("threshold", best, "activation", 1, note=note), found_ratio, *rates]
    return relufy(model, threshold=best).bind(model.fingerprint).with_measurements(measured)
