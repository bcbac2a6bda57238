"""What a forward pass computes: parameters, multiply-adds and activation elements, by module.

    complexity(model, example=None, *, attention="scores", tokens=256) -> Complexity

Two networks with equal FLOPs can differ several times in how many activation elements they write,
and on hardware that is bound by memory traffic the second number predicts the run time better
(Dollar, Singh, Girshick 2021, "Fast and Accurate Model Scaling", section 3). Both are counted here
on the real tensors of one forward pass; `opcount` states the conventions. Operators that were not
counted are listed in every result, with how often they ran. `cost` adds run time and cache size.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure.opcount import OpCount, count_operations

if TYPE_CHECKING:
    from actlas.core.model import Model

Attention = Literal["scores", "none"]
TEXT_KINDS = ("causal-lm", "encoder")


@dataclass(frozen=True)
class ModuleCost:
    """Sums over the operators that ran directly in one module (not in its children)."""

    macs: int = 0
    activations: int = 0
    scores: int = 0
    calls: int = 0

    def __add__(self, other: ModuleCost) -> ModuleCost:
        return ModuleCost(
            self.macs + other.macs,
            self.activations + other.activations,
            self.scores + other.scores,
            self.calls + other.calls,
        )


@dataclass(frozen=True)
class Complexity:
    """What one forward pass computed, in total and per item.

    Attributes:
        parameters: elements of all parameters; a tied parameter counts once.
        item, items: what one item is (`"token"`, `"image"`, `"input"`) and how many there were.
        attention: whether score elements are part of `activations`.
        by_module: module name -> its own cost; the sum over all is the total.
        uncounted: operator name -> how often it ran; its work is in no total.
    """

    parameters: int
    item: str
    items: int
    attention: Attention
    by_module: Mapping[str, ModuleCost] = field(repr=False)
    uncounted: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> ModuleCost:
        """The sum over modules."""
        return sum(self.by_module.values(), ModuleCost())

    @property
    def macs(self) -> int:
        """Multiply-adds of the whole pass."""
        return self.total.macs

    @property
    def flops(self) -> int:
        """Floating-point operations: twice the multiply-adds."""
        return 2 * self.macs

    @property
    def activations(self) -> int:
        """Activation elements of the whole pass, with scores unless `attention="none"`."""
        return self.total.activations + (self.total.scores if self.attention == "scores" else 0)

    def under(self, prefix: str) -> ModuleCost:
        """Return the cost of a module with everything inside it."""
        inside = (c for name, c in self.by_module.items() if name == prefix or name.startswith(f"{prefix}."))
        return sum(inside, ModuleCost())

    def by_role(self) -> dict[str, ModuleCost]:
        """Return costs with layer numbers replaced by `*`, e.g. `model.layers.*.mlp.up_proj`."""
        out: dict[str, ModuleCost] = {}
        for name, cost_ in self.by_module.items():
            role = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
            out[role] = out.get(role, ModuleCost()) + cost_
        return out

    def measurements(self) -> list[Measurement]:
        """Return parameters, multiply-adds and activation elements per item as measurements."""
        note = ""
        if self.uncounted:
            note = "not counted: " + ", ".join(f"{op} x{n}" for op, n in sorted(self.uncounted.items()))
        roles = self.by_role()
        shared: dict[str, Any] = {"items": self.items, "uncounted": dict(self.uncounted)}

        def share(value: Callable[[ModuleCost], int]) -> dict[str, float]:
            return {role: value(c) / self.items for role, c in roles.items() if value(c)}

        return [
            Measurement("parameters", float(self.parameters), "count", 1),
            Measurement(
                "multiply-adds",
                self.macs / self.items,
                f"multiply-adds/{self.item}",
                1,
                better="lower",
                note=note,
                details={**shared, "flops": self.flops / self.items, "by_role": share(lambda c: c.macs)},
            ),
            Measurement(
                "activation-elements",
                self.activations / self.items,
                f"elements/{self.item}",
                1,
                better="lower",
                note=note,
                details={
                    **shared,
                    "attention": self.attention,
                    "scores": self.total.scores / self.items,
                    "by_role": share(lambda c: c.activations),
                },
            ),
        ]


def complexity(
    model: Model | nn.Module,
    example: Any = None,
    *,
    attention: Attention = "scores",
    tokens: int = 256,
    seed: int = 0,
) -> Complexity:
    """Count parameters, multiply-adds and activation elements in one forward pass.

    Args:
        model: a Model or any module.
        example: a tensor, a tuple of tensors, or a dictionary of keyword arguments. A Model for text
            or images makes its own: `tokens` random ids, or one random image.
        attention: `"scores"` counts attention scores as activations (they are written to memory);
            `"none"` does not (a fused kernel never writes them). Multiply-adds are the same.
        tokens: length of the example made for a text model; scores per token grow with it.
        seed: seed of the example.

    Raises:
        InputError: no example for a model that cannot make one, or an unknown `attention`.
    """
    if attention not in ("scores", "none"):
        raise InputError(f'attention must be "scores" or "none", not {attention!r}')
    module, args, kwargs = forward_arguments(model, example, tokens, seed)
    found, _ = count_operations(module, args, kwargs)
    return Complexity(
        parameters=sum(p.numel() for p in module.parameters()),
        item=_item(model),
        items=_items(model, args, kwargs),
        attention=attention,
        by_module=_by_module(found),
        uncounted=_uncounted(found),
    )


# Helpers -----------------------------------------------------------------------------------------


def forward_arguments(
    model: Model | nn.Module, example: Any, tokens: int, seed: int
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return the module with the positional and keyword arguments of one forward pass."""
    module = model if isinstance(model, nn.Module) else model.module
    if example is None:
        example = _example(model, tokens, seed)
    if isinstance(example, Mapping):
        return module, (), dict(example)
    return module, tuple(example) if isinstance(example, list | tuple) else (example,), {}


def _example(model: Model | nn.Module, tokens: int, seed: int) -> dict[str, Tensor]:
    kind = getattr(model, "kind", None)
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(model, nn.Module) and kind in TEXT_KINDS:
        length = min(tokens, model.context_length or tokens)
        ids = torch.randint(model.vocab_size or 2, (1, length), generator=generator)
        return {"input_ids": ids.to(model.device)}
    if not isinstance(model, nn.Module) and kind == "image-classifier":
        pixels = torch.randn(1, 3, *_image_size(model), generator=generator)
        return {_first_argument(model.module): pixels.to(model.device, model.dtype)}
    what = f"a model of kind {kind!r}" if kind else type(model).__name__
    raise InputError(f"{what} cannot make its own example; give example=: a tensor, a tuple or a dictionary")


def _image_size(model: Model) -> tuple[int, int]:
    size = getattr(model.config, "image_size", None)
    if size is None:
        size = getattr(model.processor, "size", None)
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", 224)
        return int(size.get("height", edge)), int(size.get("width", edge))
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return (int(size), int(size)) if isinstance(size, int) else (224, 224)


def _first_argument(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))


def _item(model: Model | nn.Module) -> str:
    kind = getattr(model, "kind", "module")
    return "token" if kind in (*TEXT_KINDS, "seq2seq") else "image" if kind == "image-classifier" else "input"


def _items(model: Model | nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    if first is None:
        return 1
    per_token = _item(model) == "token" and first.dim() > 1
    return first.shape[0] * first.shape[1] if per_token else first.shape[0] if first.dim() else 1


def _by_module(found: list[OpCount]) -> dict[str, ModuleCost]:
    out: dict[str, ModuleCost] = {}
    for c in found:
        if c.counted:
            out[c.module] = out.get(c.module, ModuleCost()) + ModuleCost(c.macs, c.activations, c.scores, 1)
    return out


def _uncounted(found: list[OpCount]) -> dict[str, int]:
    out: dict[str, int] = {}
    for c in found:
        if not c.counted:
            out[c.op] = out.get(c.op, 0) + 1
    return out
