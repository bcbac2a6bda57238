"""How sharp a loss is along some parameters: the top eigenvalue and the trace of its Hessian.

    top_eigenvalue(loss, parameters)    power iteration on  H v = d(g^T v)/dw,  v <- H v / ||H v||
    hessian_trace(loss, parameters)     Hutchinson: mean of v^T H v over random signs v
    layer_sharpness(losses, groups)     Omega = |mean_j lambda_j| + std_j lambda_j over shards j of the data

`loss` computes the loss anew with gradients each time it is called. The eigenvalue is the Rayleigh quotient
v^T H v, so its sign is kept: power iteration finds the largest magnitude, and a negative one says that the
parameters are not at a minimum. Attention must allow a second derivative: fused kernels do not, so the plain
products are used while a loss runs inside `twice_differentiable`.

Sources: Shen et al. 2020, "Q-BERT" (arXiv 1909.05840), equation 1; Yao et al. 2020, "PyHessian"
(arXiv 1912.07145).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, NonFiniteError

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Eigenvalue:
    """What power iteration found.

    Attributes:
        value: the eigenvalue of largest magnitude, with its sign.
        iterations: how many products with the Hessian it took.
        converged: whether two successive values agreed within the tolerance.
    """

    value: float
    iterations: int
    converged: bool


def top_eigenvalue(
    loss: Loss,
    parameters: Sequence[Tensor],
    *,
    iterations: int = 100,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Eigenvalue:
    """Return the Hessian's eigenvalue of largest magnitude.

    Args:
        loss: computes the loss, a scalar.
        parameters: the Hessian's variables; all others are constants.
        iterations: products at most.
        tolerance: relative change at which to stop.
        seed: of the first vector.

    Raises:
        InputError: no parameters, or a loss that does not depend on them.
        NonFiniteError: the loss or a product is NaN or infinite.
    """
    with _watched(parameters):
        gradient = _gradient(loss, parameters)
        generator = torch.Generator().manual_seed(seed)
        v = _normal([torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters])
        value = math.nan
        for step in range(1, iterations + 1):
            hv = _product(gradient, parameters, v)
            now = _dot(v, hv)
            if not math.isfinite(now):
                raise NonFiniteError("a product with the Hessian is NaN or infinite")
            length = math.sqrt(_dot(hv, hv))
            if length == 0.0:
                return Eigenvalue(0.0, step, True)
            v = [x / length for x in hv]
            if step > 1 and abs(now - value) <= tolerance * max(abs(now), 1e-30):
                return Eigenvalue(now, step, True)
            value = now
    return Eigenvalue(value, iterations, False)


def hessian_trace(
    loss: Loss, parameters: Sequence[Tensor], *, samples: int = 32, seed: int = 0
) -> tuple[float, float]:
    """Return the Hessian's trace and its standard error.

    Args:
        loss, parameters: as in `top_eigenvalue`.
        samples: random sign vectors; seed: of them.
    """
    if samples < 2:
        raise InputError(f"the trace needs at least 2 samples for its error, not {samples}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    with _watched(parameters):
        gradient = _gradient(loss, parameters)
        for _ in range(samples):
            v = [torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1 for p in parameters]
            found.append(_dot(v, _product(gradient, parameters, v)))
    values = torch.tensor(found, dtype=torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("a product with the Hessian is NaN or infinite")
    return float(values.mean()), float(values.std() / math.sqrt(samples))


@dataclass(frozen=True)
class Sharpness:
    """Sharpness of one group of parameters.

    Attributes:
        eigenvalues: top eigenvalue on each shard of the data.
        size: how many parameters.
    """

    eigenvalues: tuple[float, ...]
    size: int

    @property
    def omega(self) -> float:
        """Return `|mean| + standard deviation` of the eigenvalues: larger means more bits."""
        values = torch.tensor(self.eigenvalues, dtype=torch.float64)
        spread = float(values.std()) if len(values) > 1 else 0.0
        return abs(float(values.mean())) + spread


def layer_sharpness(
    losses: Sequence[Loss],
    groups: Mapping[str, Sequence[Tensor]],
    *,
    iterations: int = 30,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> dict[str, Sharpness]:
    """Return the sharpness of groups of parameters, each with all others held fixed.

    Args:
        losses: one for each shard of the data.
        groups: name -> parameters, e.g. the linear weights of a block. Compare groups of equal shapes: the
            eigenvalue changes with the scale of the parameters.
        iterations, tolerance, seed: of the power iteration.

    Raises:
        InputError: no shards or no groups.
    """
    if not losses or not groups:
        raise InputError("sharpness needs at least one shard of data and one group of parameters")
    out = {}
    for name, parameters in groups.items():
        found = [
            top_eigenvalue(loss, parameters, iterations=iterations, tolerance=tolerance, seed=seed).value
            for loss in losses
        ]
        out[name] = Sharpness(tuple(found), sum(p.numel() for p in parameters))
    return out


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Run a transformers model with plain attention products, in evaluation mode, for a while."""
    configs: list[Any] = [
        m.config for m in module.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    ]
    unique = list({id(c): c for c in configs}.values())
    before = [c._attn_implementation for c in unique]
    training = module.training
    module.eval()
    try:
        for c in unique:
            c._attn_implementation = "eager"
        yield
    finally:
        for c, was in zip(unique, before, strict=True):
            c._attn_implementation = was
        module.train(training)


@contextmanager
def _watched(parameters: Sequence[Tensor]) -> Iterator[None]:
    if not parameters:
        raise InputError("the Hessian needs at least one parameter")
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _gradient(loss: Loss, parameters: Sequence[Tensor]) -> list[Tensor]:
    value = loss()
    if value.ndim or not bool(torch.isfinite(value)):
        raise NonFiniteError(f"the loss must be one finite number, not {value.detach()}")
    found = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    if all(g is None for g in found):
        raise InputError("the loss does not depend on any of the parameters")
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _product(gradient: Sequence[Tensor], parameters: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """Return H v."""
    v = [x.to(p) for x, p in zip(v, parameters, strict=True)]
    inner = torch.stack([(g * x).sum() for g, x in zip(gradient, v, strict=True)]).sum()
    if not inner.requires_grad:  # a linear loss
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(inner, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h.detach() for h, p in zip(found, parameters, strict=True)]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double().cpu() * y.double().cpu()).sum()) for x, y in zip(a, b, strict=True))


def _normal(v: Sequence[Tensor]) -> list[Tensor]:
    length = math.sqrt(_dot(v, v))
    return [x / length for x in v]
