"""Fold an edit into the weights, where that is exact, and refuse where it is not.

    Add at mlp.out, attn.out or resid_post      the bias of the projection before it
    Scale, Zero, HeadScale at attn.z, mlp.act   the columns of the projection after it
    ProjectOut, Scale, Zero at attn.out, mlp.out  the projection before it and its bias
    SwapModule                                  the module stays swapped

An edit with a scope or a condition depends on the input and cannot be folded. Everything is computed
before the first weight changes, so a refusal leaves the model as it was. Exact means up to the
rounding of the model's dtype: a sum inside a matrix product rounds otherwise than one after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actlas.core.edit import ActivationEdit, Edit
from actlas.core.edits import Add, HeadScale, ProjectOut, Scale, SwapModule, Zero
from actlas.core.errors import InputError
from actlas.core.layout import Tower, find, join
from actlas.core.model import Model
from actlas.core.scope import Scope
from actlas.core.sites import Site, site_shape


@dataclass
class _Change:
    """New weight `[out, in]` and bias of one linear map."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None


def bake(edit: Edit, model: Model) -> Model:
    """Fold an edit into the model's weights, in place, and return the model.

    Args:
        edit: any edit or composition.
        model: the model to change; edits installed on it are not part of this.

    Raises:
        InputError: folding would not be exact, with the reason; the model is unchanged.
    """
    changes: dict[int, _Change] = {}
    swaps: list[SwapModule] = []
    for part in edit.parts():
        if part.fingerprint is not None:
            part.fingerprint.check(model.fingerprint, part.describe())
        if isinstance(part, SwapModule):
            part._original(model.module)
            swaps.append(part)
        elif isinstance(part, ActivationEdit):
            if swaps:
                raise _refusal(part, "it comes after a module swap; bake the parts one after the other")
            if part.strength != 0.0:
                for site in model.resolve(part.site):
                    part.check(site)
                    _fold(part, site, model, changes)
        else:
            raise _refusal(part, "it is not made of activations or modules")
    with torch.no_grad():
        for change in changes.values():
            _write(change)
        for swap in swaps:
            swap.module.train(swap.swap_in(model.module).training)
    model.__dict__.pop("fingerprint", None)
    return model


def _refusal(edit: Edit, why: str) -> InputError:
    return InputError(f"cannot bake {edit.describe()}: {why}; install it with model.edit instead")


def _fold(edit: ActivationEdit, site: Site, model: Model, changes: dict[int, _Change]) -> None:
    if edit.scope != Scope() or edit.condition is not None:
        raise _refusal(edit, "it depends on tokens, positions, phase, rows or a gate")
    if isinstance(edit, Add) and edit.keep_norm:
        raise _refusal(edit, "keeping the norm is not a linear map")
    tower = model.layout.tower(site.tower) if model.layout is not None else None
    if tower is None or site.block is None:
        raise _refusal(edit, f"no linear map is known before or after {site.name}")
    if site.kind in ("attn.z", "mlp.act"):
        path = tower.out_proj if site.kind == "attn.z" else tower.down_proj
        _fold_after(edit, site, tower, _change_of(edit, tower, site.block, path, model, changes))
    elif site.kind in ("attn.out", "mlp.out", "resid_post"):
        _fold_before(edit, site, tower, model, changes)
    else:
        raise _refusal(edit, f"no linear map carries exactly {site.kind}")


def _change_of(
    edit: Edit, tower: Tower, block: int, path: str, model: Model, changes: dict[int, _Change]
) -> _Change:
    module = find(model.module, join(tower.blocks, str(block), path)) if path else None
    weight = getattr(module, "weight", None)
    if module is None or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise _refusal(edit, "this block has no linear map there (a mixture of experts?)")
    if _shared(weight, model.module):
        raise _refusal(edit, "its weight is tied to another module")
    if id(module) not in changes:
        bias = getattr(module, "bias", None)
        matrix = weight.T if type(module).__name__ == "Conv1D" else weight
        changes[id(module)] = _Change(
            module, matrix.detach().clone(), None if bias is None else bias.detach().clone()
        )
    return changes[id(module)]


def _fold_after(edit: ActivationEdit, site: Site, tower: Tower, change: _Change) -> None:
    """W (c x) = (W c) x: scale the columns of the map that follows."""
    if not isinstance(edit, (Scale, Zero, HeadScale)):
        raise _refusal(edit, f"only scaling passes through the map after {site.kind}")
    assert site.features is not None
    whole, _ = site_shape(tower, site.kind)
    assert whole is not None
    ones = torch.ones((1, 1, *site.features), dtype=torch.float64)
    scaled = _effect(edit, site)(ones)
    if site.selector is not None:
        scaled = site.selector.write(torch.ones((1, 1, *whole), dtype=torch.float64), scaled)
    factor = scaled.flatten()
    change.weight = (change.weight.double() * factor.to(change.weight.device)).to(change.weight.dtype)


def _fold_before(
    edit: ActivationEdit, site: Site, tower: Tower, model: Model, changes: dict[int, _Change]
) -> None:
    """f(W x + b) for a linear f: change the rows of the map that came before."""
    norm = tower.attn_out_norm if site.kind == "attn.out" else tower.mlp_out_norm
    if norm:
        raise _refusal(edit, "a norm stands between the projection and the residual stream")
    if site.selector is not None:
        raise _refusal(edit, "it edits single channels after the projection")
    if site.kind == "resid_post" and (tower.post_norm or not isinstance(edit, Add)):
        raise _refusal(edit, "only an addition passes from the residual stream into the last projection")
    path = tower.out_proj if site.kind == "attn.out" else tower.down_proj
    assert site.block is not None
    change = _change_of(edit, tower, site.block, path, model, changes)
    bias = change.bias if change.bias is not None else change.weight.new_zeros(change.weight.shape[0])
    if isinstance(edit, Add):
        vector = edit.vector.to(device=bias.device, dtype=torch.float64)
        if vector.ndim > 1 and vector.numel() != vector.shape[-1]:
            raise _refusal(edit, "its vector differs from token to token")
        change.bias = (bias.double() + edit.strength * vector.flatten()).to(bias.dtype)
        return
    if not isinstance(edit, (Scale, Zero, ProjectOut)):
        raise _refusal(edit, f"{type(edit).__name__} is not linear in the activation")
    effect = _effect(edit, site)
    change.weight = effect(change.weight.double().T).T.to(change.weight.dtype).contiguous()
    if change.bias is not None:
        change.bias = effect(bias.double()).to(bias.dtype)


def _effect(edit: ActivationEdit, site: Site) -> Callable[[Tensor], Tensor]:
    """Return the (linear) edit as a plain function."""
    from actlas.core.edit import Here
    from actlas.core.passes import Pass

    run = Pass(1, None, None, None, 0, None, None)
    here = Here(site, run, None)  # type: ignore[arg-type]
    return lambda x: edit.change(x, here)


def _shared(weight: Tensor, root: nn.Module) -> bool:
    owners = [m for m in root.modules() for p in m._parameters.values() if p is weight]
    return len(owners) > 1


def _write(change: _Change) -> None:
    module = change.module
    target = module.weight
    assert isinstance(target, Tensor)
    matrix = change.weight.T if type(module).__name__ == "Conv1D" else change.weight
    target.copy_(matrix)
    if change.bias is not None:
        own = getattr(module, "bias", None)
        if isinstance(own, Tensor):
            own.copy_(change.bias)
        else:
            module.bias = nn.Parameter(change.bias, requires_grad=target.requires_grad)
