"""CETT-PPL-p% sparsity as a method: the edit that drops as many MLP neurons as quality allows.

    edit = fit_ppl_sparsity(model, corpus, p=1.0)        # perplexity may rise by 1%
    with model.edit(edit): ...

A neuron i of a block is dropped for a token when the norm of what it would write,
|h_i| * ||W_down[:, i]||, is below the block's threshold; the thresholds share one CETT (the relative
error of the MLP's output), and the search takes the largest CETT at which the perplexity is still
within p percent. Source: Luo et al. 2024, "Sparsing Law", section 4.1.
"""

from __future__ import annotations

from typing import Any

from actlas.core.edit import Edit
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.sparsity import ppl_p_sparsity


@method(
    "ppl-p-sparsity",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="drop the MLP neurons that perplexity can spare: CETT thresholds at a p percent budget",
    example="actlas fit ppl-p-sparsity smollm2 prose --option p=1 -o sparse/",
    papers=("sparsing-law",),
)
def fit_ppl_sparsity(
    model: Model,
    data: Any,
    *,
    p: float = 1.0,
    tokens: int = 2048,
    context: int = 512,
    skip_first: int = 0,
    seed: int = 0,
) -> Edit:
    """Return the edit that drops neurons until the perplexity has risen by p percent.

    Args:
        model: a causal language model with dense MLPs.
        data: a corpus; calibration and evaluation use the same tokens, as in the paper.
        p: the budget, in percent of the perplexity.
        tokens: evaluated tokens; below about 8,000 the answer is uncertain by several points.
        context: window length in tokens.
        skip_first: first tokens of each window that stay dense.
        seed: of the calibration sample.

    Raises:
        InputError, ModelError: as `actlas.measure.sparsity.ppl_p_sparsity`.
    """
    found = ppl_p_sparsity(model, data, p=p, tokens=tokens, context=context, skip_first=skip_first, seed=seed)
    return found.to_edit().bind(model.fingerprint)
