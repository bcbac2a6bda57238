"""Round to nearest: every weight on the nearest level of its group. The baseline of all weight methods.

    s = (max - min) / (2^b - 1),   z = round(-min / s),   w_hat = s (clip(round(w / s) + z, 0, 2^b - 1) - z)

with max and min of each group of `group_size` inputs of an output channel, the range holding 0 (equations of
the other formats: `core.numbers.grids`). No calibration is needed; text is used to measure the price.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.methods import method
from actlas.core.numbers import lp_search
from actlas.core.quant_linear import QuantLinear
from actlas.quantize.layers import Target, Texts, WeightFormat, finish, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "rtn",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights rounded to the nearest level of their group; no calibration",
    example="actlas fit rtn smollm2 prose --bits 4 --group-size 64 -o rtn4/",
    papers=("zeroquant-v2",),
)
def fit_rtn(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    format: str = "",
    formats: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = (),
    search: bool = False,
    evaluate: int = 1024,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that rounds a model's weights to the nearest level.

    Args:
        model: any model with linear layers.
        data: text for the price; default: the bundled prose.
        bits: 2 to 8 (see `core.numbers` for the other grids).
        group_size: inputs that share a scale; default: the legal size nearest to 64; 0: a whole channel.
        symmetric: no zero points.
        format, formats, skip: see `layers.WeightFormat` and `layers.targets`.
        search: shrink each group's range to where the summed |error|^2.4 is least, instead of its ends.
        evaluate: tokens of text on which perplexity ratio and divergence are measured; 0: none.
        context: window length; seed: of the text's order and the bootstrap.

    Raises:
        InputError: bits or formats that do not exist, a group size that does not fit (legal ones are listed).
        NonFiniteError: NaN or infinities in a weight.
    """
    chosen = targets(model, WeightFormat(bits, group_size, symmetric, format, formats), skip)
    modules = {t.path: round_to_nearest(t, search=search) for t in chosen}
    texts: Texts | None = None
    if evaluate and model.kind == "causal-lm":
        texts = split_text(model, data, tokens=64, context=context, seed=seed)
    return finish(model, chosen, modules, method="rtn", texts=texts, evaluate=evaluate, seed=seed)


def round_to_nearest(target: Target, *, search: bool = False, weight: Tensor | None = None) -> QuantLinear:
    """Return one layer rounded to nearest.

    Args:
        target: the layer and its format.
        search: see `fit_rtn`.
        weight: instead of the layer's own.
    """
    w = target.weight if weight is None else weight
    params = lp_search(w, target.spec, steps=40, shrink=0.015) if search else None
    return QuantLinear.of(target.module, target.spec, params=params, weight=weight, where=target.path)
