"""Activation patching as a method: the largest components of a task as measurements.

What is chosen is chosen on one half of the prompts and measured on the other; see `effects.held_out`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actlas.circuits.batch import PromptPairs
from actlas.circuits.patching import patch
from actlas.circuits.sources import Mode
from actlas.core.measurement import Measurement
from actlas.core.methods import method

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "patching",
    room="circuits",
    returns="Measurement",
    data="task",
    summary="the parts of a model that carry a task, by exact activation patching, on prompts kept apart",
    example="actlas fit patching smollm2 ioi --option over=mlps --option mode=noise",
)
def fit_patching(
    model: Model,
    data: Any,
    *,
    over: str = "components",
    mode: Mode = "denoise",
    metric: str = "logit_difference",
    prompts: int = 32,
    top: int = 10,
    seed: int = 0,
) -> tuple[Measurement, ...]:
    """Patch every part and return the largest effects.

    Args:
        model: a causal language model with a tokenizer.
        data: a task.
        over, mode, metric: as for `patch`.
        prompts: pairs of prompts, of which one half chooses and the other measures.
        top: how many parts are returned.
        seed: of the halves, the intervals, and resampling.

    Returns:
        One `patching-effect` a part, largest first, measured on the half that did not choose it.
    """
    pairs = PromptPairs.from_task(model, data, n=prompts, seed=seed)
    found = patch(model, pairs, over, mode=mode, metric=metric, seed=seed)
    return found.measurements(top, held_out=len(pairs) >= 4)
