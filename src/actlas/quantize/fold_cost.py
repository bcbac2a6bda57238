"""What folding activation scales costs the weights, layer by layer.

The error of a quantised weight counts where the inputs are. With C = E[x x^T] of the calibration text,

    error(Q) = tr((W - Q) C (W - Q)^T) / tr(W C W^T)

for three ways to quantise the same layer with one scale a row:

    plain         Q = Q(W)
    folded        Q = Q(W diag s) diag(1/s),  s from max |x|
    symmetrised   the same with s from max |x - z|, and the moments of x - z (the part W z is in the bias)

Source: the cost side of Wang et al. 2024, "OutlierTune" (arXiv 2406.18832).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.calibration import calibrate
from actlas.core.numbers import QuantSpec, quantize
from actlas.quantize.channel_ranges import channel_ranges

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(frozen=True)
class FoldCost:
    """Relative squared errors of one layer's output, from its weight alone.

    Attributes:
        path: of the layer.
        plain, folded, symmetrised: see the module's text.
        lopsided: mean over channels of |middle of the range| over half the range.
    """

    path: str
    plain: float
    folded: float
    symmetrised: float
    lopsided: float


def fold_costs(
    model: Model,
    corpus: Iterable[Any],
    paths: Iterable[str],
    *,
    bits: int = 6,
    tokens: int = 1024,
    context: int | None = None,
) -> list[FoldCost]:
    """Return the cost of each layer.

    Args:
        model: the model.
        corpus: calibration text.
        paths: linear layers.
        bits: of weights; the activations' bits only scale s, which changes nothing here.
        tokens, context: how much is read.
    """
    from actlas.quantize.layers import WeightFormat, targets

    texts, wanted = list(corpus), set(paths)
    spec = QuantSpec(bits, granularity="channel")
    chosen = [t for t in targets(model, WeightFormat(bits, 0)) if t.path in wanted]
    sites = {t.path: model.resolve(f"module:{t.path}.input")[0].name for t in chosen}
    options: dict[str, Any] = {"max_tokens": tokens, "context": context}
    ranges = channel_ranges(model, texts, list(sites.values()), **options)
    seen = calibrate(model, texts, list(sites.values()), ("moments", "hessian"), keep_massive=True, **options)
    out = []
    for target in chosen:
        name = sites[target.path]
        found, statistics = ranges[name], seen[name]
        moment = _second_moments(statistics.covariance, statistics.mean)
        z = found.middle()
        centred = _second_moments(statistics.covariance, statistics.mean - z)
        weight = target.weight.double()
        out.append(
            FoldCost(
                target.path,
                _error(weight, spec, None, moment),
                _error(weight, spec, found.absmax, moment),
                _error(weight, spec, found.shifted(z).absmax, centred, moment),
                float(found.lopsidedness.mean()),
            )
        )
    return out


def _second_moments(covariance: Tensor, mean: Tensor) -> Tensor:
    return covariance.double() + torch.outer(mean.double(), mean.double())


def _error(
    weight: Tensor, spec: QuantSpec, reach: Tensor | None, moment: Tensor, over: Tensor | None = None
) -> float:
    """Return the weighted error of a weight that is rounded with its columns times `reach`."""
    scale = torch.ones(weight.shape[1], dtype=torch.float64)
    if reach is not None:
        scale = reach.double().clamp_min(max(1e-5 * float(reach.median()), 1e-12))
    off = weight - quantize(weight * scale, spec) / scale
    total = ((weight @ (moment if over is None else over)) * weight).sum()
    return float(((off @ moment) * off).sum() / total)
