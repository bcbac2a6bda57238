"""Integrated gradients: how much each part of an input adds to a number that a model computes.

    IG_i(x) = (x_i - x'_i) * integral_0^1 dF/dx_i (x' + a (x - x')) da
    sum_i IG_i(x) = F(x) - F(x')                                        (completeness)

x' is the baseline, the input that says nothing. The integral is a weighted sum over points on the line
from x' to x; how far the sum of the attributions is from F(x) - F(x') tells whether there were enough of
them, so it is always returned. Everything is computed in float32 or better: in bfloat16 the rounding of
one gradient is larger than the attributions of most tokens.

    found = integrate(function, x, baseline, steps=64)
    found.values, found.gap              # the attributions, and what their sum misses

How a language model's answer becomes such a function is in `answer_function`.

Source: Sundararajan, Taly and Yan 2017, "Axiomatic Attribution for Deep Networks", equations 1 to 3 and
proposition 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError

Rule = Literal["gauss", "midpoint", "right"]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Integrated:
    """Attributions of one number.

    Attributes:
        values: the attributions, of the input's shape, float64.
        gradient: the mean gradient along the path, float64; `values` are it times `x - baseline`.
        value, baseline_value: F at the input and at the baseline.
        steps: points on the path.
    """

    values: Tensor
    gradient: Tensor
    value: float
    baseline_value: float
    steps: int

    @property
    def gap(self) -> float:
        """Sum of the attributions minus `F(x) - F(x')`; 0 for an exact integral."""
        return float(self.values.sum()) - (self.value - self.baseline_value)

    @property
    def error(self) -> float:
        """The gap as a fraction of `|F(x) - F(x')|` (infinite if that is 0 and the gap is not)."""
        change = abs(self.value - self.baseline_value)
        return abs(self.gap) / change if change > 0 else (0.0 if self.gap == 0 else float("inf"))


def integrate(
    function: Function,
    x: Tensor,
    baseline: Tensor | float = 0.0,
    *,
    steps: int = 64,
    rule: Rule = "gauss",
    batch: int = 16,
) -> Integrated:
    """Return the integrated gradients of one number; see `integrate_each` for several at once."""
    return integrate_each(
        lambda z: function(z).unsqueeze(-1), x, baseline, steps=steps, rule=rule, batch=batch
    )[0]


def integrate_each(
    function: Function,
    x: Tensor,
    baseline: Tensor | float = 0.0,
    *,
    steps: int = 64,
    rule: Rule = "gauss",
    batch: int = 16,
) -> list[Integrated]:
    """Return the integrated gradients of each of k numbers that one forward pass gives.

    Args:
        function: differentiable; from `[b, ...]` to `[b, k]`, row by row.
        x: the input, `[...]` without a batch axis, float32 or float64.
        baseline: a number, or a tensor that broadcasts against `x`.
        steps: points on the path.
        rule: `"gauss"` (Gauss-Legendre), `"midpoint"`, or `"right"`: the points k / steps for k = 1 to
            steps, as most released code has it.
        batch: points in one pass.

    Raises:
        InputError: no steps, an unknown rule, or a function that does not depend on its input.
        ShapeError: an input that is not floating point, or a baseline that does not fit.
        NonFiniteError: the function or its gradient is NaN or infinite on the path.
    """
    nodes, weights = _nodes(steps, rule)
    if not x.is_floating_point() or x.dtype in (torch.float16, torch.bfloat16):
        raise ShapeError(f"integrated gradients need a float32 or float64 input, not {x.dtype}")
    x = x.detach()
    start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        start = start.expand_as(x)
    except RuntimeError:
        raise ShapeError(
            f"the baseline has shape {list(start.shape)}; the input has {list(x.shape)}"
        ) from None
    with torch.no_grad():
        ends = function(torch.stack([start, x])).double()
    if ends.ndim != 2 or len(ends) != 2:
        raise ShapeError(f"the function must give one row for each input, not {list(ends.shape)} for 2")
    total = [torch.zeros_like(x, dtype=torch.float64) for _ in range(ends.shape[1])]
    for at in range(0, steps, batch):
        a = torch.tensor(nodes[at : at + batch], dtype=x.dtype, device=x.device)
        a = a.reshape(-1, *([1] * x.ndim))
        weight = torch.tensor(weights[at : at + batch], dtype=torch.float64, device=x.device).reshape_as(a)
        points = (start + a * (x - start)).requires_grad_()
        with torch.enable_grad():
            found = function(points)
        if not found.requires_grad:
            raise InputError("the target does not depend on the input through anything that has a gradient")
        for k in range(found.shape[1]):
            more = k + 1 < found.shape[1]
            (slope,) = torch.autograd.grad(found[:, k].sum(), points, retain_graph=more, allow_unused=True)
            if slope is not None:
                total[k] += (weight * slope.double()).sum(0)
    if not all(bool(torch.isfinite(t).all()) for t in (ends, *total)):
        raise NonFiniteError("the target or its gradient is NaN or infinite between baseline and input")
    difference = (x - start).double()
    return [
        Integrated(difference * t, t, float(ends[1, k]), float(ends[0, k]), steps)
        for k, t in enumerate(total)
    ]


def _nodes(steps: int, rule: str) -> tuple[list[float], list[float]]:
    """Return points in [0, 1] and weights that sum to 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps!r}; it must be a whole number of at least 1")
    if rule == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
    if rule not in ("midpoint", "right"):
        raise InputError(f"rule is {rule!r}; it must be 'gauss', 'midpoint' or 'right'")
    shift = 0.5 if rule == "midpoint" else 1.0
    return [(k + shift) / steps for k in range(steps)], [1 / steps] * steps
