"""Mixture of hidden dimensions (MoHD): a component that works on a part of the hidden dimensions of each
token.

    S = the N_s shared slices and the K routed ones with the largest g,   g = softmax(R x), R [N - N_s, d]
    m = 1 on shared slices, g_i on chosen routed ones, 0 elsewhere         (one number a slice of d / N
    channels)
    y = fuse( N / (N_s + K) * m * component(m * x) )

Multiplying the input by m uses only the columns of the component's first maps that belong to S, multiplying
the output only the rows of its last: of a wide component each token pays for a narrow one. `fuse` is a
Monarch matrix (block diagonal, permutation, block diagonal; about 2 d sqrt(d) parameters), the identity at
the start.

Source: "Mixture of Hidden-Dimensions Transformer" (2024). Only its abstract and secondary pages were at hand.
That slices are shared or routed, that activations are scaled and that groups are fused is the paper's; the
router, where m is applied, the factor N / (N_s + K) and the form of the fusion are our completion.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ShapeError
from actlas.nn.experts import Routing


class MonarchLinear(nn.Module):
    """A structured `[d, d]` map: block diagonal, permutation, block diagonal, permutation back.

    Args:
        d: channels. blocks: number of blocks of the first factor; it divides d. Default: the divisor nearest
            to sqrt(d).
    """

    def __init__(self, d: int, blocks: int = 0) -> None:
        super().__init__()
        if d < 1 or (blocks and d % blocks):
            raise InputError(f"{d} channels cannot be cut into {blocks} blocks; take a divisor")
        divisors = [i for i in range(1, d + 1) if d % i == 0]
        self.blocks = blocks or min(divisors, key=lambda i: abs(math.log(i * i / d)))
        other = d // self.blocks
        self.first = nn.Parameter(torch.eye(other).repeat(self.blocks, 1, 1))
        self.second = nn.Parameter(torch.eye(self.blocks).repeat(other, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = x.unflatten(-1, (self.blocks, -1))
        z = torch.einsum("...bi,boi->...bo", z, self.first)
        z = torch.einsum("...bo,ocb->...co", z, self.second)
        return z.flatten(-2)


class MoHD(nn.Module):
    """A component (an MLP, attention) behind a choice of hidden dimensions; equations in the module
    docstring.

    Args:
        component: called with `[..., d]` first; it returns `[..., d]`, or a tuple that begins with it.
        d: channels. n_sub: N, slices; it divides d. n_shared: N_s. top_k: K routed slices a token.
        fusion: `"monarch"` or `"none"`.
        scale: multiply by N / (N_s + K).

    Attributes:
        routed: the `Routing` of the last call with gradients; `routed.balance()` is the balance loss (weight
            1e-2).

    Raises:
        InputError: sizes that do not fit.
    """

    routed: Routing | None

    def __init__(
        self,
        component: nn.Module,
        d: int,
        *,
        n_sub: int = 16,
        n_shared: int = 4,
        top_k: int = 4,
        fusion: Literal["monarch", "none"] = "monarch",
        scale: bool = True,
    ) -> None:
        super().__init__()
        if n_sub < 1 or d % n_sub:
            raise InputError(f"n_sub is {n_sub}; it must divide the {d} channels")
        if not 0 <= n_shared < n_sub or not 1 <= top_k <= n_sub - n_shared:
            raise InputError(
                f"n_shared is {n_shared} and top_k {top_k}; of {n_sub} slices some must be routed, and at "
                f"most {n_sub} used"
            )
        if fusion not in ("monarch", "none"):
            raise InputError(f"fusion is {fusion!r}; it must be 'monarch' or 'none'")
        self.component, self.d = component, d
        self.n_sub, self.n_shared, self.top_k = n_sub, n_shared, top_k
        self.router = nn.Linear(d, n_sub - n_shared, bias=False)
        self.fusion = MonarchLinear(d) if fusion == "monarch" else nn.Identity()
        self.factor = n_sub / (n_shared + top_k) if scale else 1.0
        self.routed = None

    @property
    def active_share(self) -> float:
        """The share of hidden dimensions that a token uses."""
        return (self.n_shared + self.top_k) / self.n_sub

    def route(self, x: Tensor) -> Routing:
        """Return the routed slices of rows `[n, d]`, counted from the first routed one."""
        scores = torch.nn.functional.linear(x.float(), self.router.weight.float())
        gates, chosen = torch.softmax(scores, -1).topk(self.top_k, dim=-1)
        return Routing(chosen, gates, scores)

    def mask(self, x: Tensor) -> Tensor:
        """Return m for every channel, of x's shape."""
        if x.shape[-1] != self.d:
            raise ShapeError(f"MoHD reads {self.d} channels; it was given {list(x.shape)}")
        rows = x.reshape(-1, self.d)
        said = self.route(rows)
        self.routed = said if torch.is_grad_enabled() else None
        routed = torch.zeros_like(said.scores).scatter(1, said.experts, said.gates)
        m = torch.cat([routed.new_ones(len(rows), self.n_shared), routed], 1)
        return m.repeat_interleave(self.d // self.n_sub, 1).to(x).reshape(x.shape)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        m = self.mask(x)
        found = self.component(m * x, *args, **kwargs)
        y = found[0] if isinstance(found, tuple) else found
        y = self.fusion(self.factor * m * y)
        return (y, *found[1:]) if isinstance(found, tuple) else y
