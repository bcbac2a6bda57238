"""Training a controller, by labels ("bce") or by what its steering does to the answer ("outcome").

"bce" (the paper): binary cross-entropy of the scalar with the label, and on prompts to steer

    0.1 ( mean |sigmoid(w) - 0.5| + 0.01 mean sigmoid(w) )

which is all that ever reaches the layers' weights, so they end near 0.5. Batches mix both labels.

"outcome" (ours): from there on, the steered model itself is the loss,

    - log P(opening | prompt) / tokens        on prompts to steer
    + kl_weight KL(base || steered)           at the first answer token of the others
    + the cross-entropy of the scalar

so that the layers' weights learn where a push works. Only the opening's tokens are run (`openings`), with
gradients through the pushes; nothing else of the model is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from actlas.core.errors import InputError
from actlas.core.progress import progress
from actlas.steering.controller import Controller, Scalar
from actlas.steering.openings import OpeningScorer, pushed

if TYPE_CHECKING:
    from actlas.core.model import Model

_TRAINED = ("w1", "b1", "w2", "b2")


def train_controller(
    x: Tensor,
    y: Tensor,
    read_sites: Sequence[str],
    steer_sites: Sequence[str],
    *,
    hidden: int = 1024,
    epochs: int = 10,
    batch: int = 8,
    lr: float = 1e-3,
    seed: int = 0,
) -> Controller:
    """Return the controller that tells rows with label 1 from rows with label 0.

    Args:
        x: activations of the read sites side by side, float32 `[n, R]`.
        y: labels `[n]`, 0 or 1.
        read_sites, steer_sites: names.
        hidden: width; 1024 in the paper.
        epochs: passes over the rows; the weights after the best one (by its mean loss) are kept.
        batch: rows in a step, drawn from both labels mixed.
        lr: of AdamW. The paper's 5e-5 is for activations that are not standardised.
        seed: of weights and order.

    Raises:
        InputError: one class only, or sizes below 1.
    """
    if set(y.tolist()) != {0.0, 1.0}:
        raise InputError(
            f"a controller is trained on labels 0 and 1, both of them, not {sorted(set(y.tolist()))}"
        )
    if min(hidden, epochs, batch) < 1 or not lr > 0:
        raise InputError("hidden, epochs and batch must be at least 1, and lr above 0")
    generator = torch.Generator().manual_seed(seed)
    centre, spread = x.mean(0), x.std(0)
    spread = torch.where(spread > 1e-6 * spread.max().clamp_min(1e-30), spread, torch.ones_like(spread))
    z = (x - centre) / spread
    sizes = {"w1": (hidden, x.shape[1]), "w2": (1 + len(steer_sites), hidden)}
    weights = {
        n: (torch.randn(s, generator=generator) / s[1] ** 0.5).requires_grad_() for n, s in sizes.items()
    }
    weights |= {f"b{n[1]}": torch.zeros(s[0], requires_grad=True) for n, s in sizes.items()}
    optimiser = torch.optim.AdamW(list(weights.values()), lr=lr)
    best, kept = float("inf"), {}
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(z), generator=generator).split(batch):
            out = torch.relu(z[rows] @ weights["w1"].T + weights["b1"]) @ weights["w2"].T + weights["b2"]
            loss = binary_cross_entropy_with_logits(out[:, 0], y[rows])
            layers = torch.sigmoid(out[y[rows] == 1][:, 1:])
            if layers.numel():
                loss = loss + 0.1 * ((layers - 0.5).abs().mean() + 0.01 * layers.mean())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimiser.step()
            total += float(loss.detach()) * len(rows)
        if total < best:
            best, kept = total, {n: w.detach().clone() for n, w in weights.items()}
    return Controller(tuple(read_sites), tuple(steer_sites), centre, spread, *(kept[n] for n in _TRAINED))


def train_on_outcome(
    model: Model,
    controller: Controller,
    vectors: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    texts: Sequence[str],
    *,
    opening: str,
    scalar: Scalar = "sigmoid",
    steps: int = 40,
    batch: int = 8,
    lr: float = 1e-3,
    kl_weight: float = 1.0,
    seed: int = 0,
) -> Controller:
    """Train a controller further by what its steering does; see the module's docstring.

    Args:
        model: the model; its weights stay as they are.
        controller: where to start, from `train_controller`.
        vectors: by steered site, what a push of 1 adds.
        x, y, texts: read activations `[n, R]`, labels and prompts.
        opening: how answers to prompts with label 1 should begin.
        scalar: as in the edit.
        steps: optimiser steps, each with a batch of either label.
        batch: prompts of either label in a step.
        lr: of AdamW.
        kl_weight: weight of the divergence on prompts with label 0, in nats.
        seed: of the order.
    """
    if steps < 1 or kl_weight < 0:
        raise InputError(f"steps is {steps} and kl_weight {kl_weight}; they must be at least 1 and 0")
    sides = {label: torch.nonzero(y == label).squeeze(1) for label in (1.0, 0.0)}
    scorers = {
        label: OpeningScorer(model, [texts[i] for i in rows.tolist()], opening, batch)
        for label, rows in sides.items()
    }
    tokens = len(scorers[1.0].opening)
    _, base = scorers[0.0].run()
    trained = {n: getattr(controller, n).clone().requires_grad_() for n in _TRAINED}
    live = Controller(
        controller.read_sites, controller.steer_sites, controller.centre, controller.spread, **trained
    )
    optimiser = torch.optim.AdamW(list(trained.values()), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    next_of = {label: _cycle(len(s.batches), generator) for label, s in scorers.items()}
    with progress("training a controller on outcomes", steps, "steps") as advance:
        for _ in range(steps):
            loss = torch.zeros(())
            for label, scorer in scorers.items():
                number = next_of[label]()
                index = scorer.batches[number]
                rows = x[sides[label][index]]
                s, _ = live.forward(rows)
                loss = loss + 0.5 * binary_cross_entropy_with_logits(s, torch.full_like(s, label))
                with model.edit(pushed(vectors, live.pushes(rows, scalar))):
                    logits = scorer.logits(number, grad=True)
                if label == 1.0:
                    loss = loss - scorer.log_likelihood(logits).mean() / tokens
                else:
                    log_q = torch.log_softmax(logits[:, 0].float(), -1)
                    log_p = base[index]
                    loss = loss + kl_weight * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            gradients = torch.autograd.grad(loss, list(trained.values()))
            for weight, gradient in zip(trained.values(), gradients, strict=True):
                weight.grad = gradient
            torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimiser.step()
            advance()
    return Controller(
        controller.read_sites,
        controller.steer_sites,
        controller.centre,
        controller.spread,
        *(trained[n].detach() for n in _TRAINED),
    )


def _cycle(n: int, generator: torch.Generator) -> Callable[[], int]:
    """Return a function that goes through 0 to n - 1 again and again, each time in another order."""
    waiting: list[int] = []

    def draw() -> int:
        if not waiting:
            waiting.extend(torch.randperm(n, generator=generator).tolist())
        return waiting.pop()

    return draw
