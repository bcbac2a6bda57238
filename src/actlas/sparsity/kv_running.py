"""A cache policy at work: what is hooked while one is installed, and what happens in a forward pass.

Before a prompt is read: compress it (SpecPC), put the draft's tokens behind it (SpecKV), give the cache
layers that can drop positions. In each attention module: read the last rows of the pattern. After each
attention module: cut that layer. After the pass: cut the outputs to the prompt's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError
from actlas.core.hooks import Handle, attach
from actlas.core.installation import Installation
from actlas.core.layout import find, join
from actlas.core.model import Model
from actlas.sparsity.draft import as_draft
from actlas.sparsity.kv_policy import KeptLayer, KVPolicy, plain_cache


@dataclass
class _Prompt:
    """One pass over a prompt: its length, what was selected of it, how much of a draft follows."""

    length: int
    selected: Tensor | None
    ahead: int

    @property
    def read(self) -> int:
        return self.length if self.selected is None else int(self.selected.numel())


class PolicyRun:
    """The hooks of one installed policy."""

    def __init__(self, policy: KVPolicy, installation: Installation) -> None:
        self.policy, self.installation, self.model = policy, installation, installation.model
        tower = self.model.tower
        if self.model.kind != "causal-lm" or tower is None or not tower.attention:
            raise ModelError(f"{self.model.name} ({self.model.kind}) has no cache of keys and values to cut")
        self.blocks, self.kv_heads = tower.n_blocks, tower.kv_heads
        self.draft: Model | None = None
        self._readers: list[Handle] = []
        self._patterns: dict[int, Tensor] = {}
        self._layers: list[KeptLayer] = []
        self._prompt: _Prompt | None = None
        given = getattr(policy, "draft", None)
        if hasattr(policy, "draft"):
            self.draft = as_draft(self.model, given)

    def attach(self) -> None:
        """Place the hooks."""
        tower = self.model.tower
        assert tower is not None
        root = find(self.model.module, tower.root)
        assert root is not None
        keep = self.installation.keep
        keep(root.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
        keep(root.register_forward_hook(self._after, with_kwargs=True))
        for i in range(self.blocks):
            module = find(self.model.module, join(tower.blocks, str(i), tower.attention))
            assert module is not None
            keep(module.register_forward_hook(self._cut(i)))
        keep(_Undo(self._stop))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._stop()
        cache = plain_cache(kwargs, self.blocks)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if cache is None:
            return None
        if not isinstance(ids, Tensor):
            raise InputError("a cache policy reads prompts as token ids (input_ids), not as embeddings")
        if cache.get_seq_length() == 0:
            return self._begin(cache, ids, kwargs)
        if not all(isinstance(x, KeptLayer) for x in cache.layers):
            return None  # filled before the policy was installed
        self._layers = list(cache.layers)
        if self.policy.rolling:
            self._read(ids.shape[1])
        shift = self._layers[0].shift
        if not shift:
            self._layers = self._layers if self.policy.rolling else []
            return None
        start = self._layers[0].seen - shift
        places = torch.arange(start, start + ids.shape[1], device=ids.device)[None].expand(ids.shape[0], -1)
        self._layers = self._layers if self.policy.rolling else []
        return args, {**kwargs, "position_ids": places}

    def _begin(self, cache: Any, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and (mask.ndim != 2 or not bool(mask.bool().all())):
            raise InputError("a cache policy takes prompts without padding; give them one by one")
        length = ids.shape[1]
        if length <= self.policy.limit(length) and not self.policy.rolling:
            return None
        ahead = self.policy.lookahead(self.draft, ids)
        selected = self.policy.select(self.draft, ids, ahead)
        read = ids if selected is None else ids[:, selected]
        evicts = self.policy.evicts and (read.shape[1] > self.policy.capacity or self.policy.rolling)
        extra = ahead.shape[1] if ahead is not None and evicts else 0
        self._prompt = _Prompt(length, selected, extra)
        if extra:
            assert ahead is not None
            read = torch.cat([read, ahead.to(read)], 1)
        self._layers = [KeptLayer(i) for i in range(self.blocks)]
        cache.layers[:] = self._layers
        if evicts:
            self._read(self.policy.rows(self._prompt.read, extra))
        else:
            self._layers = []
        if read.shape[1] == length and selected is None:
            return None
        changed: dict[str, Any] = {"input_ids": read}
        places = kwargs.get("position_ids")
        if isinstance(places, Tensor) or selected is not None:
            changed["position_ids"] = torch.arange(read.shape[1], device=ids.device)[None]
        if isinstance(mask, Tensor):
            changed["attention_mask"] = mask.new_ones(mask.shape[0], read.shape[1])
        return (), {**kwargs, **changed}

    def _read(self, rows: int) -> None:
        """Read the last rows of every layer's attention in this pass."""
        if not rows:
            return
        for i, site in enumerate(
            self.model.resolve([f"blocks.{i}.attn.pattern" for i in range(self.blocks)])
        ):
            self._readers.append(attach(self.model.module, site, self._take(i), last_rows=rows))

    def _take(self, i: int) -> Callable[[Tensor], Tensor]:
        def take(pattern: Tensor) -> Tensor:
            self._patterns[i] = pattern.detach()
            return pattern

        return take

    def _cut(self, i: int) -> Callable[..., None]:
        def cut(module: nn.Module, args: Any, output: Any) -> None:
            if not self._layers:
                return
            layer, pattern = self._layers[i], self._patterns.pop(i, None)
            length = self._prompt.read if self._prompt is not None else layer.positions.shape[-1]
            if pattern is not None:
                pattern = pattern.unflatten(1, (self.kv_heads, -1))
            layer.keep(self.policy.choose(layer, pattern, length))
            if self._prompt is not None:
                layer.seen = length

        return cut

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        prompt = self._prompt
        if prompt is None:
            self._stop()
            return None
        cache = plain_cache(kwargs, self.blocks)
        assert cache is not None
        for layer in cache.layers:
            assert isinstance(layer, KeptLayer)
            layer.shift = prompt.length - prompt.read
            layer.seen = prompt.length
        self._stop()
        if prompt.selected is None and not prompt.ahead:
            return None
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        own = hidden[:, : prompt.read]
        if prompt.selected is not None:  # tokens that were not read have no state: zeros
            own = hidden.new_zeros(hidden.shape[0], prompt.length, hidden.shape[-1]).index_copy(
                1, prompt.selected.to(hidden.device), own
            )
        if isinstance(output, tuple):
            return (own, *output[1:])
        output.last_hidden_state = own
        return output

    def _stop(self) -> None:
        for handle in self._readers:
            handle.remove()
        self._readers.clear()
        self._patterns.clear()
        self._layers, self._prompt = [], None


class _Undo:
    """A handle that runs a function."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def remove(self) -> None:
        self._function()
