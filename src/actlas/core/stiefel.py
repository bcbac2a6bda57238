"""Adam on orthogonal matrices: the Stiefel manifold, with a Cayley or a QR retraction.

For an orthogonal R `[n, n]` with gradient G of the loss:

    xi = (G - R G^T R) / 2                      the gradient's part along the manifold
    m <- b1 m + (1 - b1) xi,   v <- b2 v + (1 - b2) mean(xi^2)         one v for a matrix: rotations of the
                                                                       coordinates change nothing
    A = M R^T with M the part of m / (sqrt(v) + eps) along the manifold, so that A is skew
    R <- (I + lr/2 A)^-1 (I - lr/2 A) R         Cayley: exactly orthogonal
    R <- qf(R - lr A R)                         QR: the orthogonal factor, with a positive diagonal

Rounding lets R drift off the manifold; every few steps it is put back to the nearest orthogonal matrix.

Sources: "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform" (Li, Fuxin and
Todorovic 2020); "Riemannian Adaptive Optimization Methods" (Becigneul and Ganea 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError

Retraction = Literal["cayley", "qr"]


class StiefelAdam(torch.optim.Optimizer):
    """Adam for orthogonal parameters `[n, n]` or batches of them `[..., n, n]`.

    Args:
        params: orthogonal to 1e-3.
        lr: size of a step; an entry of the skew matrix A is about lr.
        betas, eps: as in Adam.
        retraction: `"cayley"` or `"qr"`.
        every: steps after which matrices are made orthogonal again.

    Raises:
        ShapeError: a parameter that is not square. InputError: one that is not orthogonal, or wrong settings.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        retraction: Retraction = "cayley",
        every: int = 10,
    ) -> None:
        if retraction not in get_args(Retraction):
            raise InputError(
                f"retraction is {retraction!r}; it must be one of {', '.join(get_args(Retraction))}"
            )
        if not lr > 0 or not all(0 <= b < 1 for b in betas) or every < 1:
            raise InputError(f"lr {lr}, betas {betas} and every {every} must be > 0, in [0, 1) and >= 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "retraction": retraction, "every": every}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2 or p.shape[-1] != p.shape[-2]:
                    raise ShapeError(f"an orthogonal matrix is square; a parameter is {list(p.shape)}")
                off = drift(p.detach())
                if not off < 1e-3:
                    raise InputError(f"a parameter of {list(p.shape)} is not orthogonal: off by {off:.2g}")

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
                if p.grad is not None:
                    self._one(p, group)
        return loss

    def _one(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        r, g = p.double(), p.grad.double()
        if not bool(torch.isfinite(g).all()):
            raise NonFiniteError(f"the gradient of a rotation {list(p.shape)} holds NaN or infinity")
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(r)
            state["size"] = torch.zeros((*r.shape[:-2], 1, 1), dtype=r.dtype, device=r.device)
        state["step"] += 1
        t, (b1, b2) = state["step"], group["betas"]
        along = tangent(r, g)
        mean = b1 * state["mean"] + (1 - b1) * along
        size = b2 * state["size"] + (1 - b2) * along.square().mean((-2, -1), keepdim=True)
        ahead = mean / (1 - b1**t) / ((size / (1 - b2**t)).sqrt() + group["eps"])
        new = retract(r, tangent(r, ahead), group["lr"], group["retraction"])
        if t % group["every"] == 0:
            new = nearest_orthogonal(new)
        state["mean"], state["size"] = tangent(new, mean), size
        p.copy_(new)


def tangent(r: Tensor, g: Tensor) -> Tensor:
    """Return the part of g along the manifold at an orthogonal r: `(g - r g^T r) / 2`."""
    return (g - r @ g.transpose(-1, -2) @ r) / 2


def retract(r: Tensor, along: Tensor, lr: float, how: Retraction = "cayley") -> Tensor:
    """Return the orthogonal matrix that a step of `-lr * along` from r leads to."""
    if how == "qr":
        q, upper = torch.linalg.qr(r - lr * along)
        diagonal: Tensor = upper.diagonal(dim1=-2, dim2=-1).sign()
        turned: Tensor = q * diagonal.unsqueeze(-2)
        return turned
    skew = along @ r.transpose(-1, -2)
    skew = (skew - skew.transpose(-1, -2)) / 2
    one = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    moved: Tensor = torch.linalg.solve(one + lr / 2 * skew, (one - lr / 2 * skew) @ r)
    return moved


def nearest_orthogonal(r: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to r (the polar factor)."""
    u, _, v = torch.linalg.svd(r.double())
    near: Tensor = (u @ v).to(r.dtype)
    return near


def drift(r: Tensor) -> float:
    """Return the largest entry of |R^T R - I|."""
    wide = r.double()
    one = torch.eye(r.shape[-1], dtype=wide.dtype, device=wide.device)
    return float((wide.transpose(-1, -2) @ wide - one).abs().max())
