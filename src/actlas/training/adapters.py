"""Parameter-efficient adapters: small trainable parts beside frozen weights, that come off again as edits.

    ResidualAdapter   x + W_up relu(W_down x + b_down) + b_up      after an MLP (Pfeiffer et al. 2021)
    LoRA              W + (alpha / r) B A                          (Hu et al. 2022)

    adapters = bottleneck_adapters(model, reduction=16)           # an edit whose tensors can be trained
    with model.edit(adapters): ...train trainable(adapters)...

Both begin as nothing: W_up and B are zero. Bottleneck adapters are activation edits, so they take scopes and
gates; a LoRA folds into a `WeightEdit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.edit import ActivationEdit, Edit, Here, compose, register_edit
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.layout import plain_module
from actlas.core.model import Model
from actlas.core.sites import Site
from actlas.core.weight_edit import WeightEdit


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class ResidualAdapter(ActivationEdit):
    """Add a small ReLU network of the activation to it; see the module docstring.

    Attributes:
        down: `[r, d]`. down_bias: `[r]`. up: `[d, r]`. up_bias: `[d]`.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    #: A fresh adapter is nothing, on purpose.
    may_do_nothing: ClassVar[bool] = True

    def check(self, site: Site) -> None:
        super().check(site)
        if site.features is not None and tuple(site.features) != (self.down.shape[1],):
            raise ShapeError(
                f"this adapter reads {self.down.shape[1]} channels; {site.name} is [{site.shape}]"
            )

    def value(self, x: Tensor, here: Here) -> Tensor:
        hidden = F.relu(F.linear(x, self.down.to(x), self.down_bias.to(x)))
        return x + F.linear(hidden, self.up.to(x), self.up_bias.to(x))


def bottleneck_adapters(model: Model, *, reduction: int = 16, seed: int = 0) -> Edit:
    """Return an adapter after each block's MLP, with tensors that require gradients.

    Args:
        model: a model with a layout.
        reduction: channels of the residual stream over channels of the bottleneck.
        seed: of the start of W_down.

    Raises:
        InputError: a reduction below 1 or above the number of channels.
        ModelError: no layout.
    """
    d = model.d_model
    if d is None or model.n_blocks is None:
        raise ModelError(f"{model.name} has no layout, so adapters cannot be placed")
    if not 1 <= reduction <= d:
        raise InputError(f"reduction is {reduction}; with {d} channels it must be 1 to {d}")
    r = d // reduction
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for b in range(model.n_blocks):
        down = torch.randn(r, d, generator=generator) / math.sqrt(d)
        tensors = (down, torch.zeros(r), torch.zeros(d, r), torch.zeros(d))
        parts.append(
            ResidualAdapter(
                f"blocks.{b}.mlp.out", *(t.to(model.device).requires_grad_(True) for t in tensors)
            )
        )
    return compose(parts)


def trainable(edit: Edit) -> list[Tensor]:
    """Return the tensors of an edit's adapters."""
    return [
        t
        for p in edit.parts()
        if isinstance(p, ResidualAdapter)
        for t in (p.down, p.down_bias, p.up, p.up_bias)
    ]


def frozen(edit: Edit) -> Edit:
    """Return the same adapters without gradients, to save and use."""
    return compose(
        ResidualAdapter(
            p.site,
            p.down.detach(),
            p.down_bias.detach(),
            p.up.detach(),
            p.up_bias.detach(),
            strength=p.strength,
        )
        if isinstance(p, ResidualAdapter)
        else p
        for p in edit.parts()
    )


class LoRA:
    """Low-rank changes of a model's linear weights, in training.

    Args:
        model: a model.
        rank: r.
        alpha: the change is scaled by alpha / r; default 2 r.
        inside: only weights whose name contains one of these; default the MLP's.
        seed: of the start of A.

    Attributes:
        parameters: what is trained: A and B of every weight.

    Raises:
        InputError: a rank below 1, or no such weights.
    """

    kinds: ClassVar[tuple[str, ...]] = (".mlp.",)

    def __init__(
        self,
        model: Model,
        rank: int = 8,
        *,
        alpha: float | None = None,
        inside: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise InputError(f"rank is {rank}; it must be at least 1")
        wanted = inside or self.kinds
        self.model, self.scale = model, (2.0 * rank if alpha is None else alpha) / rank
        generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in plain_module(model.module).named_modules():
            if isinstance(module, nn.Linear) and any(w in f".{name}." for w in wanted):
                rows, columns = module.weight.shape
                a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
                pair = (a.to(module.weight), torch.zeros(rows, rank).to(module.weight))
                self.pairs[name] = (pair[0].requires_grad_(True), pair[1].requires_grad_(True))
        if not self.pairs:
            raise InputError(f"{model.name} has no nn.Linear whose name contains {' or '.join(wanted)}")

    @property
    def parameters(self) -> list[Tensor]:
        return [t for pair in self.pairs.values() for t in pair]

    @contextmanager
    def installed(self) -> Iterator[LoRA]:
        """Add the changes to the outputs of the linear maps while the block runs."""
        handles = []
        for name, (a, b) in self.pairs.items():
            module = plain_module(self.model.module).get_submodule(name)

            def add(
                _m: nn.Module, args: tuple[Tensor, ...], y: Tensor, a: Tensor = a, b: Tensor = b
            ) -> Tensor:
                return y + self.scale * F.linear(F.linear(args[0], a), b)

            handles.append(module.register_forward_hook(add))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def edit(self) -> WeightEdit:
        """Return what was learned as a change of weights: `scale * B A`."""
        deltas = {
            f"{n}.weight": (self.scale * (b.detach().double() @ a.detach().double())).float()
            for n, (a, b) in self.pairs.items()
        }
        return WeightEdit(deltas, note="lora")
