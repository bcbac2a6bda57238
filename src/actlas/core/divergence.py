"""Divergences between distributions that are given as logits, in nats.

    KL(p || q) = sum_x p(x) (log p(x) - log q(x))
    JS(p, q)   = (KL(p || m) + KL(q || m)) / 2,   m = (p + q) / 2        0 <= JS <= ln 2, symmetric
    Var_p(u)   = sum_x p(x) (u(x) - E_p u)^2

The last is what a small change u of the logits costs: KL(p || p') = Var_p(u) / 2 + O(|u|^3).
Computed in float32 (float64 kept), a few rows at a time, summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from actlas.core.errors import ShapeError

_CHUNK_BYTES = 8 * 2**20


def kl_divergence(base: Tensor, other: Tensor) -> Tensor:
    """Return KL(softmax(base) || softmax(other)) of each row, float64 `[...]`, from logits `[..., v]`.

    An outcome of probability 0 under `base` counts 0; equal logits give exactly 0.

    Raises:
        ShapeError: logits of different shapes.
    """

    def rows(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return _expectation(log_p, log_p - log_q).clamp_min(0)

    return _by_rows(rows, base, other)


def js_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each row, float64 `[...]` between 0 and ln 2, from logits."""

    def rows(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        both = _expectation(log_p, log_p - log_m) + _expectation(log_q, log_q - log_m)
        return (both / 2).clamp(0, math.log(2))

    return _by_rows(rows, one, other)


def logit_variance(base: Tensor, change: Tensor) -> Tensor:
    """Return Var_p(change) of each row under p = softmax(base), float64 `[...]`."""

    def rows(z: Tensor, u: Tensor) -> Tensor:
        log_p = z.log_softmax(-1)
        centred = u - (log_p.exp() * u).sum(-1, keepdim=True)
        return _expectation(log_p, centred**2)

    return _by_rows(rows, base, change)


def _expectation(log_p: Tensor, x: Tensor) -> Tensor:
    """`sum p x` with `0 * inf = 0`, float64."""
    p = log_p.exp()
    return torch.where(p > 0, p * x, torch.zeros_like(p)).double().sum(-1)


def _by_rows(rows: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape or one.ndim < 1:
        raise ShapeError(
            f"two sets of logits must have one shape, not {list(one.shape)} and {list(other.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    a, b = one.reshape(-1, one.shape[-1]), other.reshape(-1, one.shape[-1])
    step = max(1, _CHUNK_BYTES // (8 * max(a.shape[-1], 1)))
    parts = [rows(a[i : i + step].to(wide), b[i : i + step].to(wide)) for i in range(0, len(a), step)]
    whole = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    return whole.reshape(one.shape[:-1])
