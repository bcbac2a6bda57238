"""Training beacons: the next-token loss of ordinary tokens, through the memory of windows before.

    fit_beacons(beacon, rows, steps=200, ratios=(2, 4, 8))

    loss = mean over tokens of -log p(x_{t+1} | memory, window up to t)

Every window draws its own ratio, so that one set of beacons serves them all. Only the beacons' embedding and
projections are trained; gradients pass through the frozen model and through the memory across windows.

Source: "Soaring from 4K to 400K: Extending LLM's Context with Activation Beacon" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.progress import progress


class Beacons(Protocol):
    """What can be trained here; `actlas.nn.ActivationBeacon` is one."""

    window: int
    stride: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained."""

    def losses(self, ids: Tensor, ratio: int | Callable[[int], int] | None = None) -> Tensor:
        """Return the loss of every token after the first."""

    def reset(self) -> None:
        """Forget what was read."""


def fit_beacons(
    beacon: Beacons,
    rows: Tensor,
    *,
    steps: int,
    ratios: Sequence[int] = (2, 4, 8),
    weights: Tensor | None = None,
    batch: int = 8,
    rate: float = 1e-3,
    clip: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Train beacons in place; return the loss of every step.

    Args:
        beacon: see `Beacons`.
        rows: texts as ids, `[n, length]`, longer than a window.
        steps: of Adam, each of `batch` rows drawn at random.
        ratios: one is drawn for every window.
        weights: how much the loss of each token counts, of the shape of `rows`; default all alike, as in the
            paper.
        batch: rows a step.
        rate: of Adam, falling to 0 by a cosine. (The paper's 5e-5 is for 7 billion parameters.)
        clip: greatest norm of the gradient.
        seed: of rows and ratios.

    Raises:
        InputError: texts that fit into one window (beacons would get no gradient), a ratio that does not
            divide the stride, or no steps.
    """
    if rows.ndim != 2 or rows.shape[1] <= beacon.window:
        raise InputError(
            f"rows must be [n, more than the window's {beacon.window} tokens], not {list(rows.shape)}"
        )
    wrong = [r for r in ratios if r < 1 or beacon.stride % r]
    if wrong or not ratios:
        raise InputError(f"ratios {list(ratios)} must divide the stride, {beacon.stride}")
    if weights is not None and weights.shape != rows.shape:
        raise InputError(f"weights are {list(weights.shape)}; they must be {list(rows.shape)}, like the rows")
    if steps < 1:
        raise InputError(f"steps is {steps}; it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    learned = list(beacon.parameters())
    optimiser = torch.optim.Adam(learned, lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []

    def draw(window: int) -> int:
        return ratios[int(torch.randint(len(ratios), (), generator=generator))]

    with progress("training beacons", steps, "steps") as advance:
        for _ in range(steps):
            some = torch.randint(len(rows), (batch,), generator=generator)
            each = beacon.losses(rows[some], draw)
            w = torch.ones_like(each) if weights is None else weights[some, 1:].to(each)
            loss = (each * w).sum() / w.sum()
            optimiser.zero_grad()
            loss.backward(inputs=learned)
            nn.utils.clip_grad_norm_(learned, clip)
            optimiser.step()
            falling.step()
            losses.append(float(loss.detach()))
            advance()
    beacon.reset()
    return losses
