"""Two runs over the same text, compared: how much the loss rose, and how sure that is.

    loss_rise(base, other) -> (rise in nats per token, paired standard error)
    perplexity_ratio(base, other, ...) -> Measurement

Both runs score the same tokens, so what the documents have in common cancels; the interval comes from
documents that are drawn for both runs together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure.likelihood import Losses
from actlas.measure.statistics import paired_difference


def loss_rise(base: Losses, other: Losses) -> tuple[float, float]:
    """Return the mean rise of the loss per token, and its standard error over documents.

    The error is that of a ratio estimator (documents are the units, tokens their weights); `nan` for one
    document.

    Raises:
        InputError: the runs did not score the same documents.
    """
    _check(base, other)
    difference, weight = other.nll - base.nll, base.tokens
    rise = float(difference.sum() / weight.sum())
    n = len(weight)
    if n < 2:
        return rise, math.nan
    residual = difference - rise * weight
    return rise, float(np.sqrt(n / (n - 1) * (residual**2).sum()) / weight.sum())


def perplexity_ratio(
    base: Losses,
    other: Losses,
    *,
    name: str = "perplexity-ratio",
    seed: int = 0,
    group: Mapping[str, str] | None = None,
    note: str = "",
    details: Mapping[str, Any] | None = None,
) -> Measurement:
    """Return perplexity of `other` over perplexity of `base`, with a paired bootstrap over documents.

    `details` hold the rise of the loss in nats per token, its standard error and both perplexities.
    """
    rise, error = loss_rise(base, other)
    low = high = None
    if len(base.tokens) > 1:
        drawn = paired_difference(base.nll / base.tokens, other.nll / other.tokens, base.tokens, seed=seed)
        low, high = math.exp(drawn.low), math.exp(drawn.high)
    return Measurement(
        name,
        math.exp(rise),
        "ratio",
        len(base.tokens),
        low,
        high,
        "paired bootstrap over documents",
        seed,
        group=group or {},
        better="lower",
        note=", ".join(part for part in (note, base.note) if part),
        details={
            "loss_rise": rise,
            "loss_error": error,
            "perplexity": math.exp(other.nll.sum() / other.tokens.sum()),
            "base_perplexity": math.exp(base.nll.sum() / base.tokens.sum()),
            **(details or {}),
        },
        samples=(other.nll - base.nll) / base.tokens,
        weights=base.tokens,
    )


def _check(base: Losses, other: Losses) -> None:
    if base.ids != other.ids or not np.array_equal(base.tokens, other.tokens):
        raise InputError("the two runs scored different tokens; compare runs over the same text and options")
