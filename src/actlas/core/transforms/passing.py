"""Which output channels of a linear map are, up to a factor for each token, input channels of another.

Output channel j of the producer is multiplied by a number of its own. If input channel c of the reader is
then multiplied by exactly that number, whatever the token, j passes through to c: values through attention,
`up` through the gate's product, anything through a relu. To tell thousands of channels apart within rounding,
each j has two digits, one for each of two trials, and a digit is one of a few dozen well-separated factors.

A fused producer (queries, keys and values in one; gate and up in one) passes in part: its rows are halved
until each part passes or does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actlas.core.layout import weight_matrix
from actlas.core.model import Model
from actlas.core.transforms.dataflow import Flow
from actlas.core.transforms.probing import Outcome, Trial, run_trials

_EXACT = 2e-3


@dataclass
class Passing:
    """What passes from a producer to a reader.

    Attributes:
        rows: producer's rows that pass, ascending, or `None`.
        index: for each input of the reader, which of `rows` it is.
    """

    rows: Tensor | None = None
    index: Tensor | None = None


@dataclass
class _Part:
    pair: tuple[str, str]
    start: int
    stop: int


def channels_that_pass(
    model: Model, inputs: Mapping[str, Any], flow: Flow, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Passing]:
    """Return for each (producer, reader) what passes."""
    widths = {p: tuple(weight_matrix(flow.linears[p]).shape) for p in {q for pair in pairs for q in pair}}
    waiting = [_Part(pair, 0, widths[pair[0]][0]) for pair in pairs]
    sources: dict[tuple[str, str], Tensor] = {
        pair: torch.full((widths[pair[1]][1],), -1, dtype=torch.long) for pair in pairs
    }
    while waiting:
        trials = [t for part in waiting for t in _trials(part, widths[part.pair[0]][0])]
        outcomes = run_trials(model, inputs, trials)
        again: list[_Part] = []
        for i, part in enumerate(waiting):
            found = _match(part, outcomes[2 * i : 2 * i + 2])
            if found is not None:
                known = sources[part.pair]
                sources[part.pair] = torch.where(known >= 0, known, found)
            elif widths[part.pair[0]][0] > widths[part.pair[1]][1] and part.stop - part.start > 1:
                middle = (part.start + part.stop) // 2
                again += [_Part(part.pair, part.start, middle), _Part(part.pair, middle, part.stop)]
        waiting = again
    return {pair: _passing(_fill(source)) for pair, source in sources.items()}


def _digits(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two digits of each of n channels, and the factor that a digit stands for."""
    base = max(2, math.ceil(math.sqrt(n)))
    j = torch.arange(n)
    factors = torch.exp(torch.linspace(0.1, 1.1, base, dtype=torch.float64))
    return j // base, j % base, factors


def _trials(part: _Part, width: int) -> list[Trial]:
    high, low, factors = _digits(part.stop - part.start)
    out = []
    for digit in (high, low):
        scale = torch.ones(width, dtype=torch.float64)
        scale[part.start : part.stop] = factors[digit]
        out.append(Trial(outputs={part.pair[0]: scale}, watch=part.pair[1]))
    return out


def _match(part: _Part, outcomes: Sequence[Outcome]) -> Tensor | None:
    """Return the producer's row for each input channel (-1: not touched or always zero), or `None`."""
    n = part.stop - part.start
    base = len(_digits(n)[2])
    logs = torch.linspace(0.1, 1.1, base, dtype=torch.float64)
    digits, touched = [], None
    for outcome in outcomes:
        assert outcome.before is not None and outcome.after is not None
        x, y = outcome.before.double(), outcome.after.double()
        size = x.square().sum(0)
        alive = size > 1e-12 * size.max().clamp_min(1e-30)
        ratio = (x * y).sum(0) / size.clamp_min(1e-300)
        off = (y - ratio * x).norm(dim=0) / x.norm(dim=0).clamp_min(1e-150)
        if bool((off[alive] > _EXACT * ratio[alive].abs().clamp_min(1)).any()):
            return None
        log = torch.where(alive, ratio.clamp_min(1e-9).log(), torch.zeros_like(ratio))
        near = (log[:, None] - logs).abs()
        distance, digit = near.min(1)
        same = log.abs() < 0.25 * min(0.1, 1 / max(base - 1, 1))
        if bool((alive & ~same & (distance > 0.25 / max(base - 1, 1))).any()):
            return None
        now = alive & ~same
        touched = now if touched is None else touched & now
        digits.append(digit)
    assert touched is not None
    if not bool(touched.any()):
        return None
    row = part.start + digits[0] * base + digits[1]
    return torch.where(touched & (row < part.stop), row, torch.full_like(row, -1)).cpu()


def _fill(source: Tensor) -> Tensor:
    """Guess channels that were zero for every token from their neighbours; what is wrong is refused later."""
    if bool((source >= 0).all()) or not bool((source >= 0).any()):
        return source
    out = source.clone()
    for order, step in ((range(1, len(out)), 1), (range(len(out) - 2, -1, -1), -1)):
        for c in order:
            if out[c] < 0 and out[c - step] >= 0:
                out[c] = out[c - step] + step
    return out


def _passing(source: Tensor) -> Passing:
    if not bool((source >= 0).all()):
        return Passing()
    rows, index = source.unique(return_inverse=True)
    return Passing(rows, index)
