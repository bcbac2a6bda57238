"""A norm whose scale is held: the linear map that it is at given inputs.

    N(x) = g * C(x) / s(x) + b         C(x) = x - mean(x) for LayerNorm, x for RMSNorm

With s(x) held, a part u of x goes through as g * C(u) / s(x), and parts of x sum to N(x) - b. Gain and bias
are found by running the norm on two large opposite vectors, so that every way of storing them (1 + weight
in Gemma, no bias, ...) is the same here; s(x) by least squares on the norm's own output, so that no epsilon
is missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.layout import find

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

_LARGE = 1e4  # large enough that an epsilon of 1e-5 is below float32's resolution
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class FrozenNorm:
    """The norm before a block's attention at some inputs.

    Attributes:
        gain, bias: `[d]`.
        centred: whether the mean over channels is taken out.
        inverse_scale: `1 / s(x)` of each input, float64 `[n]` on the CPU.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    inverse_scale: Tensor

    def direction(self, u: Tensor) -> Tensor:
        """Return `g * C(u)` for directions `[n, d]`; times `inverse_scale` it is what u becomes."""
        return self.gain * _centre(u, self.centred)

    @classmethod
    def of(cls, model: Model, where: Site, x: Tensor) -> FrozenNorm:
        """Return the norm before the attention that `where` belongs to, at residual states `x` `[n, d]`.

        Raises:
            InputError: this block's norm is neither LayerNorm nor RMSNorm.
        """
        module = _module(model, where)
        if module is None:
            ones = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
            return cls(ones, torch.zeros_like(ones), False, torch.ones(len(x), dtype=torch.float64))
        with model.without_edits():
            return _probe(module, x, where.name)


def _probe(module: nn.Module, x: Tensor, name: str) -> FrozenNorm:
    d = x.shape[-1]
    probe = torch.ones(d, dtype=x.dtype, device=x.device)
    probe[::2] = -1.0
    ahead, behind, shifted = module(torch.stack([_LARGE * probe, -_LARGE * probe, _LARGE * (probe + 1)]))
    flat = _LARGE * (probe + 1)
    bias = (ahead + behind) / 2
    found = []
    for centred in (True, False):
        unit = _centre(probe, centred)
        gain = (ahead - behind) / 2 / (unit / unit.square().mean().sqrt())
        other = _centre(flat, centred)
        expected = gain * other / other.square().mean().sqrt() + bias
        found.append((float((shifted - expected).norm() / (shifted - bias).norm()), centred, gain))
    error, centred, gain = min(found, key=lambda f: f[0])
    wide = (gain * _centre(x, centred)).double()
    normed = (module(x) - bias).double()
    inverse = (wide * normed).sum(-1) / wide.square().sum(-1)
    error = max(error, float((normed - inverse.unsqueeze(-1) * wide).norm() / normed.norm()))
    if not error < _TOLERANCE:
        raise InputError(
            f"the norm before {name} ({type(module).__name__}) is neither LayerNorm nor RMSNorm (off by "
            f"{error:.1%}), so features cannot be followed through it"
        )
    return FrozenNorm(gain, bias, centred, inverse.cpu())


def _centre(u: Tensor, centred: bool) -> Tensor:
    return u - u.mean(-1, keepdim=True) if centred else u


def _module(model: Model, where: Site) -> nn.Module | None:
    """Return the norm's module; `None` where attention reads the residual stream itself (post-norm)."""
    name = where.name.removesuffix("attn.z") + "attn_norm"
    site = next((s for s in model.sites() if s.name == name), None)
    if site is not None and site.absent is None:
        return find(model.module, site.module)
    tower = model.layout.tower(where.tower) if model.layout is not None else None
    if tower is not None and tower.post_norm:
        return None
    raise InputError(f"{model.name} has no norm site {name}, so features cannot be followed into attention")
