"""Orthogonal columns for WINA: a linear layer that skips inputs in a rotated basis.

With W diag(g) = U S V^T (g: the scale of the RMSNorm in front) and x = g * n, the layer is rewritten as

    y = (W diag(g) V) (m * (V^T n))

whose columns are orthogonal, with norms S, so that WINA's rule is exactly optimal for this layer. V comes
from k_proj for all that attention reads and from gate_proj for all that the MLP reads: both share their
input. The paper folds the rotation into the residual stream block by block (as SliceGPT does), which makes
it free; here it stays inside the layer, which gives the same numbers and makes plain what the rotation does
to quality. o_proj and down_proj are rotated only on their output side, which changes no score.

The released code also subtracts the mean from the embeddings. That keeps the function of LayerNorm models
only, and is left out. Source: Chen et al. 2025 (arXiv 2505.19427), section 3.3, and its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.calibration import Calibration
from actlas.core.edit import Edit
from actlas.core.errors import ModelError
from actlas.core.layout import find
from actlas.core.skip_inputs import SkipInputs
from actlas.core.swap import SwapModule, register_module
from actlas.measure.linear_layers import LinearLayer, linear_layers
from actlas.sparsity.input_sparsity import check_sparsity, finish, threshold_at

if TYPE_CHECKING:
    from actlas.core.model import Model

_LEADER = {"q_proj": "k_proj", "k_proj": "k_proj", "v_proj": "k_proj", "gate_proj": "gate_proj"}
_LEADER["up_proj"] = "gate_proj"
_SITES = {"k_proj": "attn_norm", "gate_proj": "mlp_norm"}


@register_module
class RotatedLinear(nn.Module):
    """`y = weight (m * (turn x)) + bias`, with `m_i = 1` where `|(turn x)_i| factor_i >= threshold`."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_buffer("turn", torch.zeros(in_features, in_features))
        self.register_buffer("factor", torch.ones(in_features))
        self.register_buffer("threshold", torch.zeros(()))

    turn: Tensor
    factor: Tensor
    threshold: Tensor

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        has_bias = self.bias is not None
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": has_bias}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RotatedLinear:
        """Build an empty one of these sizes."""
        return cls(**config)

    def inputs_kept(self, x: Tensor) -> Tensor:
        """Return how many inputs each row of `x` `[n, d]` keeps."""
        return ((x @ self.turn.T).abs() * self.factor >= self.threshold).sum(1)

    def weights_touched(self, x: Tensor) -> Tensor:
        """Return how many weights each row needs, the turn (which can be folded away) left out."""
        return self.inputs_kept(x) * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x, self.turn)
        z = torch.where(z.abs() * self.factor >= self.threshold, z, z.new_zeros(()))
        return nn.functional.linear(z, self.weight, self.bias)


def orthogonal_skips(model: Model, calibration: Calibration, sparsity: float) -> Edit:
    """Return WINA's released rule on rotated layers, with uniform budgets.

    Args:
        model: a model with RMSNorm before separate q, k, v, gate and up projections.
        calibration: of `calibrate_inputs`.
        sparsity: share of skipped inputs.

    Raises:
        ModelError: no such layout.
    """
    check_sparsity(sparsity)
    layers = linear_layers(model)
    known = {(layer.block, layer.name): layer for layer in layers}
    turns: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    made: list[Edit] = []
    for layer in layers:
        rows = calibration[layer.reads].rows
        leader = _LEADER.get(layer.name)
        if leader is None:
            made.append(SkipInputs(layer.input_site, 1.0, threshold_at(rows.abs(), sparsity)))
            continue
        key = (layer.block, leader)
        if key not in known:
            raise ModelError(f"{model.name} has no separate {leader}; the rotation needs a llama-like block")
        if key not in turns:
            turns[key] = _basis(model, known[key])
        basis, scale = turns[key]
        new = _rotated(model, layer, basis, scale, with_norms=layer.name == leader)
        scores = (rows @ new.turn.T.cpu()).abs() * new.factor.cpu()
        new.threshold.fill_(threshold_at(scores, sparsity))
        made.append(SwapModule(layer.path, new))
    return finish(model, made, "all")


def _basis(model: Model, layer: LinearLayer) -> tuple[Tensor, Tensor]:
    """Return V `[d, d]` of W diag(g), and g, in float64."""
    site = model.resolve(f"blocks.{layer.block}.{_SITES[layer.name]}")[0]
    norm = find(model.module, site.module)
    scale = getattr(norm, "weight", None)
    if not isinstance(scale, Tensor) or getattr(norm, "bias", None) is not None:
        raise ModelError(f"{site.module} is no RMSNorm with a scale; the rotation needs one")
    g = scale.detach().double()
    if "Gemma" in type(norm).__name__:
        g = g + 1
    _, _, v = torch.linalg.svd(layer.weight(model).double() * g, full_matrices=True)
    return v.T, g


def _rotated(
    model: Model, layer: LinearLayer, basis: Tensor, scale: Tensor, *, with_norms: bool
) -> RotatedLinear:
    weight = layer.weight(model)
    bias = getattr(layer.module(model), "bias", None)
    new = RotatedLinear(layer.columns, layer.rows, bias is not None).to(weight)
    alive = scale.abs() > 1e-12
    inverse = torch.where(alive, 1 / scale.where(alive, torch.ones_like(scale)), torch.zeros_like(scale))
    with torch.no_grad():
        turned = (weight.double() * scale) @ basis
        new.weight.copy_(turned)
        new.turn.copy_(basis.T * inverse)
        if with_norms:
            new.factor.copy_(turned.norm(dim=0))
        if bias is not None and new.bias is not None:
            new.bias.copy_(bias)
    return new.eval()
