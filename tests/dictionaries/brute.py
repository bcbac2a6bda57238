"""What the tests of all kinds share: run states, float64 copies, gradients by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from actlas.dictionaries.objective import TrainSettings, TrainState
from actlas.dictionaries.sae import SAE


def state(sae: SAE, dead: list[int] | None = None, step: int = 10**6, **options: Any) -> TrainState:
    """Return a run's state after the warm-up, with some features dead."""
    fired = torch.zeros(sae.features, dtype=torch.int64)
    fired[dead or []] = 10**9
    return TrainState(TrainSettings(tokens=1000, batch=16, **options), fired, step=step)


def random_weights(sae: Any, seed: int = 0, spread: float = 0.3) -> Any:
    """Return a float64 copy with biases and unit atoms at random, so that no term of a loss is 0 by chance."""
    g = torch.Generator().manual_seed(seed)
    given = {
        name: getattr(sae, name).double()
        + spread * torch.randn(getattr(sae, name).shape, generator=g).double()
        for name in sae.trainable
    }
    given["W_dec"] /= given["W_dec"].norm(dim=1, keepdim=True)
    return replace(sae.to(dtype=torch.float64), **given)


def numeric(loss: Callable[[Tensor], float], at: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the gradient of a function of one tensor by central differences."""
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        moved = []
        for sign in (1, -1):
            x = at.clone()
            x.view(-1)[i] += sign * eps
            moved.append(loss(x))
        out.view(-1)[i] = (moved[0] - moved[1]) / (2 * eps)
    return out


def check_gradients(
    sae: Any, batch: Any, run: TrainState, loss: Callable[[Any], float], names: tuple[str, ...]
) -> None:
    """Hold `gradients` to finite differences of an independent loss, up to the decoder's constraint."""
    objective, found = sae.gradients(batch, run)
    assert abs(float(objective.loss.detach()) - loss(sae)) < 1e-9 * max(1.0, abs(loss(sae)))
    for name in names:
        expected = numeric(lambda t, name=name: loss(replace(sae, **{name: t})), getattr(sae, name))
        constrained = sae.constrain({"W_dec": expected})["W_dec"] if name == "W_dec" else expected
        torch.testing.assert_close(
            found[name], constrained, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def recovery(truth: Tensor, atoms: Tensor) -> float:
    """Return the mean, over true directions, of the largest cosine with an atom."""
    unit = [t / t.norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (truth, atoms)]
    return float((unit[0] @ unit[1].T).max(1).values.mean())
