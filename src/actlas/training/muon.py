"""Muon: momentum made orthogonal, so that no coordinate has a learning rate of its own.

    m <- 0.95 m + g,    u = g + 0.95 m
    X = u / ||u||_F (the shorter side first), five times:
        A = X X^T,   X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X
    W <- W - lr (0.2 sqrt(max(rows, columns)) X + decay W)

The singular values of X end between about 0.7 and 1.2; they do not converge to 1. The factor 0.2 sqrt(max)
gives an update the root mean square that Adam's usually has. Vectors and scalars take `u / ||u||` instead.
Adam divides every coordinate by its own size, which favours a few axes; this does not, and outlier channels
have nowhere to grow.

Sources: "Muon: An optimizer for hidden layers" (Jordan et al. 2024); "Muon is Scalable for LLM Training" (Liu
et al. 2025) for the factor; "Outlier-Safe Pre-Training" (Park et al. 2025) for vectors. torch has the matrix
part as `torch.optim.Muon`, in bfloat16; this one computes in float32 and takes every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """See the module's text.

    Args:
        params: matrices; those with more axes are read as `[first, all others]`. Vectors and scalars may be
            among them. Several matrices that are stored as one (queries, keys and values) should be split
            beforehand.
        lr: learning rate.
        momentum: of the buffer.
        decay: weight decay of matrices.
        steps: Newton-Schulz steps.

    Raises:
        InputError: settings that make no sense.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-4,
        *,
        momentum: float = 0.95,
        decay: float = 0.01,
        steps: int = 5,
    ) -> None:
        if not lr > 0 or not 0 <= momentum < 1 or decay < 0 or steps < 1:
            raise InputError(
                f"lr {lr}, momentum {momentum}, decay {decay}, steps {steps}: "
                "they must be > 0, in [0, 1), >= 0 and >= 1"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Raises:
            NonFiniteError: a gradient with NaN or infinity.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "buffer" not in state:
                    state["buffer"] = torch.zeros_like(p)
                m = state["buffer"].mul_(group["momentum"]).add_(p.grad)
                u = p.grad + group["momentum"] * m
                size = float(u.norm())
                if not size < float("inf"):
                    raise NonFiniteError(f"the gradient of a parameter {list(p.shape)} holds NaN or infinity")
                if p.ndim < 2:
                    p.add_(u, alpha=-group["lr"] / max(size, 1e-12))
                    continue
                flat = orthogonalised(u.flatten(1), group["steps"])
                factor = 0.2 * max(flat.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(flat.view_as(p).to(p.dtype), alpha=-group["lr"] * factor)
        return loss


def orthogonalised(u: Tensor, steps: int = 5) -> Tensor:
    """Return a matrix with about the singular vectors of u `[rows, columns]` and singular values near 1.

    All zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    x = u.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
