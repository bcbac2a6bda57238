"""Losses that make neighbouring tokens share experts (BlockFFN), for any router with scores.

    locality   L_al = mean over tokens t and experts of BCE(sigmoid(alpha A0(x_t)), sigmoid(alpha A0(x_t+1)))
    chunk      p_i^k = A1_i(x_k) / (sum_j A1_j(x_k) + eps)
               P_i   = 1 - prod over the tokens k of a chunk of (1 - p_i^k)         expert i is needed by the
               chunk
               L_cs  = mean over chunks and experts of P_i

A0 are the router's scores, A1 its non-negative weights. alpha = 100, chunks of 64 tokens. `AdaptiveWeight` is
the rule by which the chunk loss's weight grows while the loss falls (and never above 4 times its start).

Source: "BlockFFN" (2025), section 3, equations of the two losses and the adaptive factor scheduler; eps =
1e-5 as in the released code, whose target of the locality loss has a gradient too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError

_EPS = 1e-5


def activation_locality(scores: Tensor, *, alpha: float = 100.0, documents: Tensor | None = None) -> Tensor:
    """Return the locality loss, a scalar.

    Args:
        scores: A0 `[batch, pos, M]`.
        alpha: how sharply the sign of a score is read.
        documents: `[batch, pos]`; pairs of tokens of different documents do not count.

    Raises:
        ShapeError: scores of another shape, or single tokens.
    """
    _check(scores, 2)
    x = alpha * scores.float()
    loss = F.binary_cross_entropy_with_logits(x[:, :-1], torch.sigmoid(x[:, 1:]), reduction="none").mean(-1)
    if documents is None:
        return loss.mean()
    same = (documents[:, :-1] == documents[:, 1:]).to(loss)
    return (loss * same).sum() / same.sum().clamp(min=1)


def chunk_sparsification(weights: Tensor, *, chunk: int = 64, mask: Tensor | None = None) -> Tensor:
    """Return the chunk loss, a scalar; tokens behind the last whole chunk are left out.

    Args:
        weights: A1 `[batch, pos, M]`, non-negative.
        chunk: tokens in a chunk.
        mask: bool `[batch, pos]`; padding does not count.

    Raises:
        ShapeError: weights of another shape. InputError: a chunk longer than the text, or below 1.
    """
    _check(weights, 1)
    length = weights.shape[1]
    if not 1 <= chunk <= length:
        raise InputError(f"chunk is {chunk}; with {length} tokens it must be 1 to {length}")
    w = weights.float()
    if mask is not None:
        w = w * mask.unsqueeze(-1)  # a new tensor: the weights themselves stay
    p = w / (w.sum(-1, keepdim=True) + _EPS)
    p = p[:, : length // chunk * chunk].unflatten(1, (-1, chunk))
    needed = 1 - torch.log1p(-p.clamp(max=1.0) + _EPS).sum(2).exp()
    return needed.mean()


@dataclass
class AdaptiveWeight:
    """The chunk loss's weight: constant, then raised in steps as long as it helps.

    After `warm` steps, at every `every` steps: ratio = mean loss of the last `every` steps over that of the
    `every` before; above 1 it is at least 1.025; the weight then goes linearly to weight * ratio (at most
    `most` times the start) during the next `every` steps.

    Attributes:
        start: the first weight. warm, every: in steps. most: bound, in multiples of the start.
    """

    start: float = 5e-2
    warm: int = 1000
    every: int = 100
    most: float = 4.0
    _losses: list[float] = field(default_factory=list, repr=False)
    _from: float = field(default=float("nan"), repr=False)
    _to: float = field(default=float("nan"), repr=False)
    _since: int = field(default=0, repr=False)
    _steps: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if self.every < 1 or self.warm < 2 * self.every:
            raise InputError(f"warm is {self.warm}; it must be at least twice every, which is {self.every}")
        self._from = self._to = self.start

    @property
    def value(self) -> float:
        """The weight of now."""
        return self._from + (self._to - self._from) * min(1.0, self._since / self.every)

    def step(self, loss: float) -> float:
        """Note one step's chunk loss; return the weight for the next step."""
        self._losses = [*self._losses[-2 * self.every + 1 :], float(loss)]
        self._steps += 1
        self._since += 1
        if self._steps >= self.warm and (self._steps - self.warm) % self.every == 0:
            before, last = self._losses[: self.every], self._losses[self.every :]
            ratio = sum(last) / max(sum(before), 1e-12)
            ratio = max(1.025, ratio) if ratio > 1 else ratio
            now = self.value
            self._from, self._to, self._since = now, min(now * ratio, self.most * self.start), 0
        return self.value


def _check(x: Tensor, least: int) -> None:
    if x.ndim != 3 or x.shape[1] < least:
        raise ShapeError(
            f"scores must be [batch, pos, experts] with {least} or more tokens, not {list(x.shape)}"
        )
