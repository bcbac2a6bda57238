"""ProSparse: a SiLU or GELU language model becomes a ReLU one whose MLP activations are mostly zero.

    edit = prosparse(model, corpus, steps=500, weight=1e-3)
    with model.edit(edit): ...

1. Swap the activation function for ReLU (`relufication.relufy`).
2. Go on training with  L = L_lm + w(t) * sum over blocks of mean over tokens of ||x1||_1,  x1 = ReLU(gate) *
up,
   where w is 0 at first and then rises in sine-shaped stages (`schedules.SineStages`).
3. Replace ReLU by FATReLU with the largest threshold that perplexity does not notice.

The paper does not say how it reduces the L1 norm, and everything depends on it; here it is the sum over
channels and blocks of the mean over tokens. Sparsity is measured at x1, what the down projection reads. What
may be skipped in up and down is what the gate zeroes, which is fewer than the zeros of x1 only where up is
exactly 0.

Source: Song et al. 2024, "ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large
    Language
Models" (arXiv 2402.13516), section 3.
"""

from __future__ import annotations

import math
from typing import Any

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.likelihood import Losses
from actlas.measure.paired import perplexity_ratio
from actlas.measure.sparsity import evaluate_sparse
from actlas.training.density import ActivationPenalty
from actlas.training.language_loop import tune_weights
from actlas.training.relufication import fit_threshold_shift, relufy
from actlas.training.schedules import Schedule, SineStages


def stages(steps: int, weight: float) -> SineStages:
    """Return ProSparse's stages for 7B, shrunk to a number of steps and a last peak.

    Raises:
        InputError: too few steps for five stages, or a weight that is not positive.
    """
    if steps < 40:
        raise InputError(f"steps is {steps}; five stages need at least 40")
    if not 0 < weight < math.inf:
        raise InputError(f"weight is {weight:g}; the L1 penalty's last peak must be positive")
    return SineStages.published("7B").scaled(steps=steps, peak=weight)


@method(
    "prosparse",
    room="training",
    returns="Edit",
    data="corpus",
    summary="make MLP activations mostly zero by training: ReLU, an L1 penalty in sine stages, FATReLU",
    example="actlas fit prosparse smollm2 prose --steps 200 --train .mlp. -o sparse/",
    papers=("prosparse",),
)
def prosparse(
    model: Model,
    data: Any,
    *,
    steps: int = 500,
    weight: float = 1e-3,
    schedule: Schedule | None = None,
    lr: float = 3e-4,
    batch: int = 8,
    context: int = 128,
    train: str = "",
    max_ppl_ratio: float = 1.005,
    held_out: float = 0.1,
    tokens: int = 4096,
    seed: int = 0,
) -> Edit:
    """Return the edit that makes a model's MLP activations sparse: swaps and a change of weights.

    Args:
        model: a causal language model with a layout; it keeps its weights.
        data: a corpus; its last part is held out for the numbers.
        steps: of training.
        weight: the last peak of the L1 weight (see the module docstring for what is summed).
        schedule: of the weight, instead of the paper's stages.
        lr: AdamW's peak rate, with warm-up and a cosine to a tenth.
        batch, context: windows of a step.
        train: only parameters whose name contains this, e.g. `".mlp."`; default all.
        max_ppl_ratio: what the threshold shift may cost.
        held_out: share of the documents that is not trained on.
        tokens: held-out tokens that are scored.
        seed: of the windows.

    Returns:
        The edit; its measurements are the zero rate and the perplexity ratio, before and after.

    Raises:
        InputError, ModelError, NonFiniteError: bad sizes, no causal language model, a diverging loss.
    """
    documents = list(data)
    if not 0 < held_out < 1 or len(documents) < 2:
        raise InputError(
            f"held_out={held_out:g} of {len(documents)} documents: some must be left on either side"
        )
    cut = min(len(documents) - 1, max(1, round(len(documents) * (1 - held_out))))
    learn, test = documents[:cut], documents[cut:]
    size: dict[str, Any] = {"tokens": tokens, "context": context}
    w = schedule or stages(steps, weight)
    swap = relufy(model)
    before = _as_is(model, test, size)
    with model.edit(swap):
        penalty = ActivationPenalty(model, kind="l1", weight=w)
        change, _ = tune_weights(
            model, learn, inside=train, steps=steps, lr=lr, batch=batch, context=context,
            penalties=[penalty], seed=seed, what="prosparse",
        )  # fmt: skip
    with model.edit(swap, change):
        shift = fit_threshold_shift(
            model, learn, max_ppl_ratio=max_ppl_ratio, tokens=tokens, context=context, seed=seed
        )
    edit = compose([change, shift])
    after = evaluate_sparse(model, test, edit, **size)
    measured = [
        *(
            Measurement("zero rate", rate, "fraction", int(before[0].tokens.sum()), group={"when": when},
                        note="MLP activations on held-out text, mean over blocks", better="higher")
            for rate, when in ((before[1], "before"), (1 - after.active.ratio, "after"))
        ),
        perplexity_ratio(before[0], after.losses, seed=seed, note=penalty.describe()),
        next(m for m in shift.measurements if m.name == "threshold"),
    ]  # fmt: skip
    return edit.bind(model.fingerprint).with_measurements(measured)


def _as_is(model: Model, test: Any, size: dict[str, Any]) -> tuple[Losses, float]:
    """Return the losses of the model as it is, and its rate of zeros."""
    from actlas.measure.cett import mlp_sites
    from actlas.measure.likelihood import nll
    from actlas.measure.sparse_edits import count_active

    with count_active(model, mlp_sites(model)) as active:
        losses = nll(model, test, **size)
    return losses, 1 - active.ratio
