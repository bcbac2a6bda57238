"""AWQ's two searches: the scale of the channels of one input, and the clipped range of each group.

Equations and source: `awq.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actlas.core.errors import NonFiniteError
from actlas.core.numbers import QuantParams, QuantSpec, decode, encode, params_of
from actlas.quantize.block_inputs import capped
from actlas.quantize.channel_scales import Place
from actlas.quantize.inspected import Inspected
from actlas.quantize.layers import Target

Statistic = Literal["activation", "weight", "permuted"]
QUERY_AND_KEY = ("q_proj", "k_proj", "query", "key")
LEAST = 1e-4
CLIP_STEPS = 10


@dataclass(frozen=True)
class Search:
    """Options of the scale search.

    Attributes:
        ratios: how many exponents are tried.
        cap: a token's error counts as if its output were no longer than so many median ones.
        statistic: what the scales are powers of, or a control.
        seed: of the permuted control.
    """

    ratios: int = 20
    cap: float | None = None
    statistic: Statistic = "activation"
    seed: int = 0


def scale_for(part: Inspected, layers: Mapping[str, Target], place: Place, search: Search) -> Tensor:
    """Return the scale `[width]` with the least error of the inspected module's output.

    Args:
        part: layers that share an input.
        layers: name -> target.
        place: which channels must share a scale.
        search: options.

    Raises:
        NonFiniteError: the error is NaN or infinite for some scale.
    """
    weights = {name: part.weight(name) for name in part.names}
    if search.statistic == "weight":
        columns = torch.cat([w.abs() for w in weights.values()]).mean(0)
    else:
        columns = part.rows.abs().mean(0, dtype=torch.float64)
    a = place.mean(columns)
    base = part.outputs()
    weigh = None if search.cap is None else capped(base, search.cap).unsqueeze(1)
    best, least = torch.ones(place.width, dtype=torch.float64), float("inf")
    for step in range(search.ratios):
        s = candidate(a, step / search.ratios)
        wide = place.columns(s).to(base)
        tried = {n: round_fast(w * wide, layers[n].spec).div_(wide) for n, w in weights.items()}
        with part.weights(tried):
            off = part.outputs().sub_(base)
        error = float((off if weigh is None else off.mul_(weigh)).square().mean(dtype=torch.float64))
        if error != error or error == float("inf"):
            first = layers[part.names[0]].path
            raise NonFiniteError(
                f"{first}: the error with scales of ratio {step / search.ratios:g} is {error}"
            )
        if error < least:
            best, least = s, error
    if search.statistic == "permuted":
        generator = torch.Generator().manual_seed(search.seed)
        best = best[torch.randperm(place.width, generator=generator)]
    return best


def candidate(a: Tensor, ratio: float) -> Tensor:
    """Return `max(a^r, 1e-4) / sqrt(max * min)`; ones for r = 0."""
    s = a.pow(ratio).clamp_min(LEAST)
    return s / (s.max() * s.min()).sqrt()


def clip_range(weight: Tensor, gram: Tensor, spec: QuantSpec) -> QuantParams:
    """Return the scales of the groups whose range, shrunk from both ends, gives the least output error.

    A group's error is that of its own part of the dot products, `d^T (X_g^T X_g) d` with d its error.

    Args:
        weight: `[out, in]`, scaled.
        gram: `X^T X` of the inputs of that weight, `[in, in]`.
        spec: the format; only those with groups or channels are clipped.
    """
    groups = spec.groups(weight)
    n, size = groups.shape[1:]
    if spec.granularity == "tensor":
        return params_of(weight, spec)
    blocks = torch.stack(
        [gram[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(n)]
    ).float()
    low, high = groups.aminmax(dim=-1)
    most = torch.maximum(low.abs(), high.abs())
    best, least = params_of(weight, spec), torch.full_like(low, float("inf"))
    best_low, best_high = low, high
    for step in range(CLIP_STEPS):
        bound = most * (1 - 0.05 * step)
        below, above = torch.maximum(low, -bound), torch.minimum(high, bound)
        value = round_fast(weight, spec, below, above)
        off = spec.groups(value).sub(groups).transpose(0, 1)  # [groups, out, size]
        error = (torch.bmm(off, blocks) * off).sum(-1).T
        better = error < least
        least = torch.where(better, error, least)
        best_low, best_high = torch.where(better, below, best_low), torch.where(better, above, best_high)
    best = params_of(weight, spec, best_low, best_high)
    return best


def round_fast(x: Tensor, spec: QuantSpec, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Return what `quantize` with stored scales would return, in fewer passes for plain integers.

    Args:
        x: `[out, in]`.
        spec: the format.
        low, high: ends of the groups' ranges; default: those of x.
    """
    params = params_of(x, spec, low, high).stored(spec)
    plain = spec.grid == "int" and not spec.centred and not spec.symmetric and spec.zero_point == "int"
    if not plain:
        return decode(encode(x, spec, params), spec, params).to(x.dtype)
    assert params.zero is not None
    s = params.scale.to(x).unsqueeze(-1)
    z = params.zero.to(x).unsqueeze(-1)
    groups = spec.groups(x)
    return (groups / s).round_().add_(z).clamp_(0, 2**spec.bits - 1).sub_(z).mul_(s).reshape(x.shape)
