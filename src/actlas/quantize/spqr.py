"""SpQR: GPTQ that keeps the few weights whose rounding costs most in 16 bits.

    cost_ij = (w_ij - q(w_ij))^2 / [H^-1]_jj       the loss added by rounding w_ij alone, the others repaired

The largest of these, about 1% of a layer, are stored as they are (index and value); they are left out of the
groups' ranges, which then fit the other weights better. The rest is GPTQ (`gptq_solver.py`). An outlier takes
48 bits here (32 for its place), so 1% costs 0.48 bit a weight: compare at equal bytes.

Source: Dettmers et al. 2023, "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
Compression" (arXiv 2306.03078). Left out: the second level, in which the scales of small groups are rounded
to 3 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.quantize.gptq import solve_blocks
from actlas.quantize.gptq_solver import Solved, solve
from actlas.quantize.layers import Target, WeightFormat, finish, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "spqr",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="GPTQ with the 1% of weights that cost most kept in 16 bits",
    example="actlas fit spqr smollm2 prose --bits 3 --outliers 0.01 -o spqr3/",
    papers=("comprehensive-evaluation",),
)
def fit_spqr(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 3,
    group_size: int | None = None,
    outliers: float = 0.01,
    skip: tuple[str, ...] = (),
    damp: float = 0.1,
    tokens: int = 2048,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that quantises a model's weights with SpQR.

    Args:
        model, data, bits, group_size, skip, damp, tokens, context, evaluate, seed: as in `fit_gptq`.
        outliers: share of each layer's weights that stay in 16 bits, in [0, 0.5).

    Raises:
        InputError: a share out of range, and what `fit_gptq` raises.
    """
    if not 0 <= outliers < 0.5:
        raise InputError(f"the share of outliers lies in [0, 0.5), not {outliers}")
    chosen = targets(model, WeightFormat(bits, group_size), skip)
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)

    def solver(weight: Tensor, gram: Tensor, group: Sequence[Target]) -> Solved:
        return solve(weight, gram, group[0].spec, damp=damp, outliers=outliers, where=group[0].path)

    modules, errors = solve_blocks(model, chosen, texts, solver)
    return finish(
        model,
        chosen,
        modules,
        method="spqr",
        texts=texts,
        errors=errors,
        note=f"{outliers:.1%} of the weights in 16 bits",
        evaluate=evaluate,
        seed=seed,
    )
