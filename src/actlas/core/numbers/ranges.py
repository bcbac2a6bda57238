"""Which range a format should cover: observers and searches, each ending in the ends of a range.

    low, high = percentile(x, spec, 0.1)            # per group
    params = lp_search(w, spec, p=2.4)              # the shrunk range with the least L_p error
    observer = Observer(spec, "ema"); observer.add(batch); params = observer.params()

Clipping a few large values costs them and spares the others: the searches find the best trade.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.numbers.grids import QuantParams, _wide, decode, encode, params_of, ranges
from actlas.core.numbers.spec import QuantSpec

Rule = Literal["minmax", "ema", "percentile"]


def percentile(x: Tensor, spec: QuantSpec, percent: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return the `percent`-th and `100 - percent`-th percentiles of each group, `[rows, groups]`."""
    if not 0 <= percent < 50:
        raise InputError(f"a percentile lies between 0 and 50, not {percent}")
    groups = _wide(spec.groups(x))
    ordered = groups.sort(-1).values
    last = ordered.shape[-1] - 1
    at = [percent / 100 * last, (1 - percent / 100) * last]
    found = []
    for place in at:
        below = int(place)
        above, part = min(below + 1, last), place - below
        found.append(ordered[..., below] * (1 - part) + ordered[..., above] * part)
    return found[0], found[1]


def lp_search(
    x: Tensor,
    spec: QuantSpec,
    *,
    p: float = 2.4,
    steps: int = 80,
    shrink: float = 0.01,
    weight: Tensor | None = None,
) -> QuantParams:
    """Return the params of the range `(1 - i * shrink) [min, max]`, i < steps, with the least L_p error.

    Args:
        x: what will be encoded.
        spec: the format.
        p: of the error `sum |x - x_hat|^p`.
        steps, shrink: of the search.
        weight: importance of the entries, of x's shape or of one row.
    """
    low, high = ranges(x, spec)
    groups = _wide(spec.groups(x))
    parts = None
    if weight is not None:
        parts = _wide(spec.groups(weight.expand_as(x)))
    best_error: Tensor | None = None
    best = params_of(x, spec, low, high)
    for i in range(steps):
        keep = 1 - i * shrink
        if keep <= 0:
            break
        params = params_of(x, spec, low * keep, high * keep)
        value = decode(encode(x, spec, params), spec, params)
        error = (_wide(spec.groups(value)) - groups).abs().pow(p)
        error = (error if parts is None else error * parts).sum(-1)
        if best_error is None:
            best_error = error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = _choose(better, params, best)
    return best


def _choose(better: Tensor, new: QuantParams, old: QuantParams) -> QuantParams:
    mask = better if new.scale.ndim == better.ndim else better.unsqueeze(-1)
    zero = None
    if new.zero is not None and old.zero is not None:
        zero = torch.where(better, new.zero, old.zero)
    return QuantParams(torch.where(mask, new.scale, old.scale), zero, old.outer)


@cache
def gaussian_scale(bits: float) -> float:
    """Return the half range, in standard deviations, of the centred grid of `2^bits` levels with the least
    squared error on a Gaussian; found numerically (ternary levels: `bits = log2 3`)."""
    levels = round(2**bits)
    if levels < 2:
        raise InputError(f"a grid has at least 2 levels, not {levels}")
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * x.square())
    density = density / density.sum()

    def error(half: float) -> float:
        step = 2 * half / (levels - 1)
        code = (x / step + (levels - 1) / 2).round().clamp(0, levels - 1)
        return float(((x - step * (code - (levels - 1) / 2)).square() * density).sum())

    return _golden(error, 0.1, 8.0)


def _golden(f: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one minimum is least."""
    part = (5**0.5 - 1) / 2
    a, b = high - part * (high - low), low + part * (high - low)
    fa, fb = f(a), f(b)
    while high - low > 1e-6:
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - part * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + part * (high - low)
            fb = f(b)
    return (low + high) / 2


class Observer:
    """The range of activations over many batches.

    Args:
        spec: the format; `"tensor"`: one range; `"channel"` and `"group"` mean ranges of the *columns*
            (one for each input channel, or for groups of them), since rows of activations come and go.
        rule: `"minmax"` of all values, `"ema"` of the batches' ends, or the mean of their `"percentile"`s.
        decay: of the moving average.
        percent: of the percentiles.
    """

    def __init__(
        self, spec: QuantSpec, rule: Rule = "minmax", *, decay: float = 0.95, percent: float = 0.1
    ) -> None:
        if rule not in get_args(Rule):
            raise InputError(f"there is no range rule {rule!r}; there are {', '.join(get_args(Rule))}")
        self.spec, self.rule, self.decay, self.percent = spec, rule, decay, percent
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.batches = 0

    def add(self, x: Tensor) -> None:
        """Take in a batch of activations `[..., channels]`."""
        if x.numel() == 0:
            return
        rows = _wide(x).reshape(-1, x.shape[-1])
        if self.spec.granularity == "tensor":
            rows = rows.reshape(1, -1)
        elif self.spec.granularity == "channel":
            rows = rows.T
        else:
            self.spec.check(x.shape[-1])
            rows = rows.reshape(len(rows), -1, self.spec.group_size or 1).transpose(0, 1).flatten(1)
        whole = QuantSpec(8, granularity="channel")
        low, high = (
            percentile(rows, whole, self.percent) if self.rule == "percentile" else ranges(rows, whole)
        )
        low, high = low[:, 0], high[:, 0]
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif self.rule == "minmax":
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            new = 1 - self.decay if self.rule == "ema" else 1 / (self.batches + 1)
            self.low, self.high = self.low.lerp(low, new), self.high.lerp(high, new)
        self.batches += 1

    def params(self) -> QuantParams:
        """Return scales `[1, channels or groups or 1]`.

        Raises:
            InputError: nothing was observed.
        """
        if self.low is None or self.high is None:
            raise InputError("no activations were observed; the calibration data never reached this place")
        low, high = self.low.view(1, -1), self.high.view(1, -1)
        return params_of(
            low, QuantSpec(**{**self.spec.__dict__, "granularity": "channel", "scale_rule": "max"}), low, high
        )
