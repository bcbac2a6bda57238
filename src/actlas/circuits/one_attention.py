"""Run one block's attention again with changed queries, keys or values, at the price of that attention alone.

    attention = OneAttention(model, pairs.clean, 20)
    attention.z({"attn.q": change})              # [n, pos, heads, head_dim]

What enters the attention is kept from one run of the model up to the block. Changes are made where queries,
keys and values leave their projections, so before rotation: the model rotates what was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError
from actlas.core.hooks import attach
from actlas.core.layout import find, join

if TYPE_CHECKING:
    from actlas.core.model import Model

_KINDS = ("attn.q", "attn.k", "attn.v")


class OneAttention:
    """The attention of one block on some prompts.

    Args:
        model: a model with a layout; installed edits before this attention apply.
        encoded: its arguments, padded on the left.
        block: the block's number.

    Attributes:
        values: queries, keys, values and head outputs `[n, pos, heads, head_dim]` as they were, by kind.

    Raises:
        ModelError: a model without a layout, or without separate queries, keys and values.
    """

    def __init__(self, model: Model, encoded: Mapping[str, Tensor], block: int) -> None:
        tower = model.tower
        module = (
            find(model.module, join(tower.blocks, str(block), tower.attention)) if tower is not None else None
        )
        if tower is None or module is None:
            raise ModelError(f"{model.name} has no layout, so its attention is not known")
        self.model, self.block, self._module = model, block, module
        self._n = len(encoded["input_ids"])
        self._sites = {k: model.resolve(f"blocks.{block}.{k}")[0] for k in (*_KINDS, "attn.z")}
        kept: dict[str, Any] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept["args"], kept["kwargs"] = args, kwargs

        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            trace = model.trace(dict(encoded), list(self._sites.values()))
        finally:
            handle.remove()
        self.values = {kind: trace[site.name] for kind, site in self._sites.items()}
        cache = [
            k
            for k in ("past_key_values", "past_key_value", "layer_past")
            if kept["kwargs"].get(k) is not None
        ]
        if cache:
            kept["kwargs"] = {k: v for k, v in kept["kwargs"].items() if k not in cache}
        self._args, self._kwargs = kept["args"], kept["kwargs"]

    def z(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """Return the heads' outputs `[n, pos, heads, head_dim]` with queries, keys or values changed.

        Args:
            changes: `"attn.q"`, `"attn.k"` or `"attn.v"` -> function from `[n, pos, heads, head_dim]` to the
                same shape (keys and values have one head a group).

        Raises:
            InputError: another site.
        """
        wrong = [k for k in changes if k not in _KINDS]
        if wrong:
            raise InputError(f"{wrong[0]!r} cannot be changed here; change {', '.join(_KINDS)}")
        found: list[Tensor] = []

        def read(x: Tensor) -> Tensor:
            found.append(x)
            return x

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind, change in changes.items():
                site = self._sites[kind]
                stack.callback(attach(self.model.module, site, change, batch=lambda: self._n).remove)
            stack.callback(
                attach(self.model.module, self._sites["attn.z"], read, batch=lambda: self._n).remove
            )
            self._module(*self._args, **self._kwargs)
        return found[0]
