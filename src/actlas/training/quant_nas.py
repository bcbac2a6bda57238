"""Search a super-net for operations and bit widths at once (QuantNAS), and train what was found.

    trace = search(net, batches, steps=400, entropy=1e-3, penalty=1.0)
    net.choice                                   # operation and bits of every edge

    L_w     = |SR(x) - y|                                                    on one batch, for the weights
    L_alpha = |SR(x) - y| + entropy w1(t) w2(t) sum H(p) + penalty BitOps / BitOps_0     on another, for the
    logits

For the first steps (warm-up) only the weights move. BitOps is the expectation under p; BitOps_0 its value at
the start. w1 rises linearly and w2, 0 for the first quarter after the warm-up, like a logarithm, so that
choices are explored and then made. Weights: Adam 1e-3 with a cosine; logits: Adam with betas (0.5, 0.999).

Works on any module that has edges with `logits`, `entropy()` and `bit_operations()`:
`actlas.nn.mixed_op.MixedOp` is one. `bit_search` does the same for the widths of a language model's layers.

Source: Shvetsov et al. 2024, "QuantNAS for super resolution", and its code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.progress import progress
from actlas.training.bit_search import entropy_weight


@runtime_checkable
class Edge(Protocol):
    """What a search needs of an edge."""

    logits: nn.Parameter
    probabilities: Tensor

    def entropy(self) -> Tensor:
        """Return the entropy of the choice."""

    def bit_operations(self) -> Tensor:
        """Return the expected bit operations."""


@dataclass
class SearchTrace:
    """What a search did.

    Attributes:
        losses: L1 of the weights' batches.
        entropy: mean entropy of the edges, by step.
        bit_operations: expected ones, by step.
        seconds: wall-clock time of the steps after the warm-up, both updates.
    """

    losses: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    bit_operations: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


Batches = Iterator[tuple[Tensor, Tensor]]


def edges_of(net: nn.Module) -> list[Any]:
    """Return the edges of a super-net, in order.

    Raises:
        InputError: there is none.
    """
    found = [
        m
        for m in net.modules()
        if isinstance(getattr(m, "logits", None), nn.Parameter) and isinstance(m, Edge)
    ]
    if not found:
        raise InputError(
            f"{type(net).__name__} has no edges to search (modules with logits); see nn.mixed_op"
        )
    return found


def search(
    net: nn.Module,
    batches: Batches,
    *,
    steps: int,
    warmup: float = 0.3,
    lr: float = 1e-3,
    lr_logits: float = 3e-4,
    entropy: float = 1e-3,
    penalty: float = 0.0,
) -> SearchTrace:
    """Train a super-net's weights and logits by turns, in place.

    Args:
        net: images in, images out.
        batches: yields (input, target) without end; weights and logits take separate ones.
        steps: updates of the weights.
        warmup: share of them before the logits move (the paper's 9 of 20 epochs: 0.45).
        lr, lr_logits: rates.
        entropy, penalty: weights in the logits' loss.

    Raises:
        InputError: bad sizes, or no edges. NonFiniteError: the loss became NaN or infinite.
    """
    if steps < 1 or not 0 <= warmup < 1 or not 0 < lr < math.inf or not 0 < lr_logits < math.inf:
        raise InputError(
            f"steps={steps}, warmup={warmup:g}, lr={lr:g}, lr_logits={lr_logits:g}: see search()"
        )
    if entropy < 0 or penalty < 0:
        raise InputError(f"entropy={entropy:g}, penalty={penalty:g}: weights of losses are not negative")
    edges = edges_of(net)
    logits = [e.logits for e in edges]
    known = {id(p) for p in logits}
    weights = [p for p in net.parameters() if id(p) not in known and p.requires_grad]
    by_weight = torch.optim.Adam(weights, lr=lr, weight_decay=3e-8)
    by_logit = torch.optim.Adam(logits, lr=lr_logits, betas=(0.5, 0.999))
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(by_weight, steps)
    trace, first = SearchTrace(), round(warmup * steps)
    start: Tensor | None = None
    net.train()
    with progress("searching", steps, "steps") as advance:
        for step in range(steps):
            begin = time.perf_counter()
            x, y = next(batches)
            loss = functional.l1_loss(net(x), y)
            _finite(loss, step)
            by_weight.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 5.0)
            by_weight.step()
            fall.step()
            cost = torch.stack([e.bit_operations() for e in edges]).sum()
            start = cost.detach() if start is None else start
            if step >= first:
                x, y = next(batches)
                loss_a = functional.l1_loss(net(x), y)
                spread = torch.stack([e.entropy() for e in edges]).sum()
                cost = torch.stack([e.bit_operations() for e in edges]).sum()
                weight = entropy_weight(step - first, steps - first)
                loss_a = loss_a + entropy * weight * spread + penalty * cost / start
                _finite(loss_a, step)
                by_logit.zero_grad()
                loss_a.backward()
                by_logit.step()
                trace.seconds.append(time.perf_counter() - begin)
            trace.losses.append(float(loss.detach()))
            trace.entropy.append(float(torch.stack([e.entropy() for e in edges]).mean().detach()))
            trace.bit_operations.append(float(cost.detach()))
            advance()
    net.eval()
    return trace


def train_images(net: nn.Module, batches: Batches, *, steps: int, lr: float = 1e-3) -> list[float]:
    """Train a fixed network on images by L1 and Adam with a cosine, in place; return the loss of each step.

    Raises:
        InputError: bad sizes. NonFiniteError: the loss became NaN or infinite.
    """
    if steps < 1 or not 0 < lr < math.inf:
        raise InputError(f"steps={steps}, lr={lr:g}: both must be positive")
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    net.train()
    with progress("training", steps, "steps") as advance:
        for step in range(steps):
            x, y = next(batches)
            loss = functional.l1_loss(net(x), y)
            _finite(loss, step)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimiser.step()
            fall.step()
            losses.append(float(loss.detach()))
            advance()
    net.eval()
    return losses


def _finite(loss: Tensor, step: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the loss is {float(loss)} at step {step}; use a smaller lr")
