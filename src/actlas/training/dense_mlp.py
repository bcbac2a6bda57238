"""The weights of a dense MLP, found through the model's layout: plain (GPT-2) or gated (Llama).

plain   y = W_out a(W_in x + b_in) + b_out
gated   y = W_out (a(W_in x + b_in) * (W_up x + b_up)) + b_out          W_in is the gate
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actlas.core.activation_function import activation_name
from actlas.core.errors import ModelError
from actlas.core.layout import Columns, Tap, Tower, find, forward_parameters, join, weight_matrix
from actlas.core.model import Model


@dataclass(frozen=True, eq=False)
class DenseMLP:
    """One block's MLP.

    Attributes:
        path: of the module, from the model's root.
        w_in: `[D, d]`. w_out: `[d, D]`. b_in: `[D]`. b_out: `[d]`.
        w_up, b_up: of the linear half of a gated MLP.
        activation: its transformers name; empty if the model's configuration does not say.
    """

    path: str
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    w_up: Tensor | None
    b_up: Tensor | None
    activation: str

    @property
    def gated(self) -> bool:
        return self.w_up is not None

    @property
    def bias(self) -> bool:
        return any(b is not None for b in (self.b_in, self.b_out, self.b_up))


def dense_mlp(model: Model, block: int) -> DenseMLP:
    """Return the weights of a block's MLP (views of the model's own).

    Raises:
        ModelError: the model has no layout, the block's MLP is not one module, or it has experts already.
    """
    tower = model.tower
    if tower is None:
        raise ModelError(f"{model.name} has no layout, so its MLPs are not known")
    root = model.block(block)
    inside = tower.down_proj.rpartition(".")[0]
    down = find(root, tower.down_proj) if tower.down_proj else None
    if down is None:
        raise ModelError(f"block {block} of {model.name} has no dense MLP (it may have experts already)")
    parts = {kind: _part(model, tower, root, block, kind) for kind in ("mlp.gate", "mlp.up")}
    if not inside or any(p is not None and not p[0].startswith(f"{inside}.") for p in parts.values()):
        raise ModelError(
            f"block {block} of {model.name} ({type(root).__name__}) has its MLP spread over several modules, "
            "so none can be swapped; llama- and GPT-2-like blocks can"
        )
    whole = find(root, inside)
    needed = [] if whole is None else _required(whole)
    if len(needed) != 1:
        raise ModelError(
            f"the MLP of block {block} of {model.name} ({type(whole).__name__}) is called with "
            f"{', '.join(needed)}; a mixture of experts takes the activation only"
        )
    gate, up = parts["mlp.gate"], parts["mlp.up"]
    if up is None:
        raise ModelError(
            f"block {block} of {model.name} has no mlp.up, so its MLP cannot be cut into experts"
        )
    first, second = (gate, up) if gate is not None else (up, None)
    return DenseMLP(
        path=join(tower.blocks, str(block), inside),
        w_in=first[1],
        w_out=weight_matrix(down).detach(),
        b_in=first[2],
        b_out=_bias(down),
        w_up=None if second is None else second[1],
        b_up=None if second is None else second[2],
        activation=activation_name(model),
    )


def _part(
    model: Model, tower: Tower, root: nn.Module, block: int, kind: str
) -> tuple[str, Tensor, Tensor | None] | None:
    """Return (path in the block, weight `[D, d]`, bias) of the map whose output is this site."""
    if kind not in tower.sites:
        return None
    found = tower.sites[kind]
    for tap in (found,) if isinstance(found, Tap) else found:
        module = find(root, tap.module)
        if module is None or tap.end != "output":
            continue
        weight, bias = weight_matrix(module).detach(), _bias(module)
        for view in tap.views:
            if not isinstance(view, Columns):
                raise ModelError(
                    f"{kind} of block {block} of {model.name} is cut in a way that is not known here"
                )
            weight = weight[view.start : view.stop]
            bias = None if bias is None else bias[view.start : view.stop]
        return tap.module, weight, bias
    return None


def _required(module: nn.Module) -> list[str]:
    known = forward_parameters(module).items()
    return [n for n, p in known if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None
