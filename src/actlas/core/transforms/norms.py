"""How a norm uses its weight, found by calling it.

    norm(x) = (offset + w) * n(x) + b        n(x) = (x - mean) / std   or   x / rms

`offset` is 1 for Gemma-like norms and 0 for all others. A norm is any small module with one vector (or one
number) of weights whose output follows this equation; what it is called does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.swap import register_module

_SKIP = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)


@dataclass(frozen=True)
class NormUse:
    """What a norm does.

    Attributes:
        offset: what is added to the weight before it multiplies.
        centres: whether the mean is taken away (LayerNorm).
        bias: whether it has one.
        single: whether its weight is one number for all channels.
        eps: the small number under its root, as near as it can be told.
    """

    offset: float
    centres: bool
    bias: bool
    single: bool
    eps: float


def norm_use(module: nn.Module) -> NormUse | None:
    """Return how `module` uses its weight, or `None` if it is not a norm."""
    weight = getattr(module, "weight", None)
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, _SKIP) or not isinstance(weight, nn.Parameter) or set(own) - {"weight", "bias"}:
        return None
    if any(True for _ in module.children()) or weight.ndim > 1 or not weight.is_floating_point():
        return None
    single = weight.numel() == 1
    width = 16 if single else weight.numel()
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            zero, one, four = (_call(module, x, value) for value in (0.0, 1.0, 4.0))
            moved = _call(module, x + 1.0, 1.0)
            larger = _call(module, 3.0 * x, 1.0)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
    if any(not isinstance(v, Tensor) or v.shape != x.shape for v in (zero, one, four)):
        return None
    n = (one - zero).double()
    limit = 2e-2 * float(n.abs().max())

    def near(a: Tensor, b: Tensor) -> bool:
        return float((a.double() - b.double()).abs().max()) <= limit

    if not bool(n.any()) or not near(four - zero, 4 * n) or not near(larger, one):
        return None
    size = n.square().mean(-1)
    if not bool((size - size.mean()).abs().max() < 0.05 * size.mean()) or not 0.5 < float(size.mean()) < 2:
        return None
    offset = float((zero.double() * n).sum() / n.square().sum())
    if abs(offset - round(offset)) > 1e-2:
        return None
    return NormUse(float(round(offset)), near(moved, one), "bias" in own, single, _eps(module))


def _call(module: nn.Module, x: Tensor, weight: float) -> Any:
    """Call the module with all its weights set to one value and no bias."""
    held = dict(module.named_parameters(recurse=False))
    changed = {n: torch.full_like(p, weight if n == "weight" else 0.0) for n, p in held.items()}
    return torch.func.functional_call(module, changed, (x,))


def _eps(module: nn.Module) -> float:
    for name in ("eps", "variance_epsilon", "layer_norm_epsilon", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return 0.0


@register_module
class PlainNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps) + bias`: what a LayerNorm is on values whose mean is zero.

    It takes the place of LayerNorms when a residual stream is rotated: taking the mean away and rotating do
    not commute, so the mean is taken away once, in what is written to the stream.
    """

    def __init__(self, width: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {"width": self.weight.numel(), "eps": self.eps, "bias": self.bias is not None}

    @classmethod
    def from_config(cls, config: Any) -> PlainNorm:
        """Build one of these sizes."""
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out = out * self.weight.to(out) if self.bias is None else torch.addcmul(self.bias, out, self.weight)
        return out.to(x.dtype)
