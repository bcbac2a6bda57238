"""Token pruning at work: the hooks that drop tokens, and what later blocks get instead.

The blocks behind a pruning one receive fewer tokens, and the masks, position ids and rotations of these. With
a cache, such a block's layer holds only what it computed, at the true positions; later passes look at that.
Behind the last block the dropped tokens come back with the states that they had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from actlas.core.errors import InputError, ModelError
from actlas.core.hooks import attach
from actlas.core.layout import find, join
from actlas.sparsity.kv_policy import KeptLayer
from actlas.sparsity.token_scores import keep_best, token_scores

if TYPE_CHECKING:
    from actlas.core.installation import Installation
    from actlas.sparsity.token_pruning import PruneTokens


class PruningRun:
    """The hooks of one installed edit."""

    def __init__(self, edit: PruneTokens, installation: Installation) -> None:
        self.edit, self.installation, self.model = edit, installation, installation.model
        tower = self.model.tower
        if self.model.kind != "causal-lm" or tower is None or not tower.attention:
            raise ModelError(
                f"{self.model.name} ({self.model.kind}) is no causal language model with attention"
            )
        self.blocks = tower.n_blocks
        wrong = [i for i in edit.schedule if not 0 <= i < self.blocks - 1]
        if wrong:
            raise InputError(
                f"block {wrong[0]} cannot prune; {self.model.name} has blocks 0 to {self.blocks - 1}, and "
                "tokens that are dropped after the last one save nothing"
            )
        self.length = 0
        self.kept: Tensor | None = None
        self.real: Tensor | None = None
        self.count: Tensor | None = None
        self.whole: Tensor | None = None
        self.prompt = False
        self._score: Tensor | None = None

    def attach(self) -> None:
        """Place the hooks."""
        tower = self.model.tower
        assert tower is not None
        first = min(self.edit.schedule)
        for i in range(self.blocks):
            block = find(self.model.module, join(tower.blocks, str(i)))
            assert block is not None
            keep = self.installation.keep
            if i == 0:
                keep(block.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
            if i > first:
                keep(block.register_forward_pre_hook(self._narrow(i), with_kwargs=True, prepend=True))
            if i >= first:
                keep(block.register_forward_hook(self._after(i), with_kwargs=True))
            if i in self.edit.schedule:
                site = self.model.resolve(f"blocks.{i}.attn.pattern")[0]
                keep(attach(self.model.module, site, self._read(i)))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self.installation.watcher.of(self.model.resolve("blocks.0.resid_pre")[0])
        self.kept = self.whole = self._score = None
        self.prompt = run.past == 0 and run.length is not None and run.length > 2
        if not self.prompt:
            return
        assert run.length is not None
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        self.length, self.real = run.length, run.real(x.device)
        self.count = self.real.sum(1)

    def _read(self, i: int) -> Callable[[Tensor], Tensor]:
        def read(pattern: Tensor) -> Tensor:
            if self.prompt:
                assert self.real is not None
                real = self.real if self.kept is None else self.real.gather(1, self.kept)
                seed = 1000 * self.edit.seed + i
                self._score = token_scores(pattern.detach(), self.edit.scores, seed, real)
            return pattern

        return read

    def _narrow(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
            hidden = args[0] if args else kwargs["hidden_states"]
            if not self.prompt:
                layer = cache.layers[i] if cache is not None and len(cache.layers) > i else None
                if not isinstance(layer, KeptLayer) or layer.keys is None:
                    return None
                columns, total = layer.positions[:, 0], layer.seen + hidden.shape[1]
                return _map(args, kwargs, lambda x: _later_mask(x, columns, layer.seen, total))
            if self.kept is None:
                return None
            if cache is not None:
                self._layer(cache, i)
            kept, n = self.kept, self.length
            return _map(args, kwargs, lambda x: _gather(x, kept, n))

        return hook

    def _layer(self, cache: Cache, i: int) -> None:
        """Give block i a cache layer that knows which tokens it holds."""
        if not isinstance(cache, DynamicCache):
            raise ModelError(f"token pruning needs a plain growing cache, not a {type(cache).__name__}")
        if len(cache.layers) > i:
            if type(cache.layers[i]).__name__ not in ("DynamicLayer", "KeptLayer"):
                raise ModelError(f"token pruning cannot be combined with a {type(cache.layers[i]).__name__}")
            cache.layers[i] = KeptLayer(i)
        else:
            cache.layers.append(KeptLayer(i))

    def _after(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if not self.prompt:
                return None
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if self.kept is not None:
                cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
                if cache is not None and isinstance(layer := cache.layers[i], KeptLayer):
                    heads = layer.positions.shape[1]
                    layer.positions = self.kept.unsqueeze(1).expand(-1, heads, -1).clone()
                    layer.seen = self.length
            if i in self.edit.schedule:
                hidden = self._prune(i, hidden)
            if i == self.blocks - 1 and self.kept is not None:
                assert self.whole is not None
                hidden = _scatter(self.whole, self.kept, hidden)
                self.kept = self.whole = None
            if isinstance(output, (tuple, list)):
                return type(output)([hidden, *output[1:]])
            return hidden

        return hook

    def _prune(self, i: int, hidden: Tensor) -> Tensor:
        """Drop tokens; keep their states for the output."""
        assert self._score is not None and self.count is not None and self.real is not None
        score, self._score = self._score, None
        before = self.kept
        real = self.real if before is None else self.real.gather(1, before)
        gone = (self.count.double() * self.edit.schedule[i] + 1e-6).floor().long()
        gone = torch.minimum(gone, (self.count - 2).clamp_min(0)) - (self.count - real.sum(1))
        if not bool((gone > 0).any()):
            return hidden
        places = keep_best(score, real, gone.clamp_min(0))
        self.whole = (
            hidden.clone() if self.whole is None or before is None else _scatter(self.whole, before, hidden)
        )
        self.kept = places if before is None else before.gather(1, places)
        return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def _map(args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Any:
    """Change all tensors (and tuples of them) that a block gets besides its input."""

    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
            return tuple(change(v) for v in value)
        return value

    changed = {k: v if k == "hidden_states" else each(v) for k, v in kwargs.items()}
    return (*args[:1], *(each(a) for a in args[1:])), changed


def _gather(x: Tensor, kept: Tensor, n: int) -> Tensor:
    """Return the kept tokens of what a block gets besides its input: masks, position ids, rotations."""
    batch = len(kept)
    if x.ndim == 4 and x.shape[-2:] == (n, n):
        x = x.expand(batch, -1, -1, -1)
        x = x.gather(2, kept[:, None, :, None].expand(-1, x.shape[1], -1, n))
        return x.gather(3, kept[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))
    if x.ndim == 3 and x.shape[1:] == (1, n) and x.shape[0] % batch == 0:  # ALiBi, by head
        x = x.reshape(batch, -1, n)
        return x.gather(2, kept.unsqueeze(1).expand(-1, x.shape[1], -1)).reshape(-1, 1, kept.shape[1])
    if x.ndim in (2, 3) and x.shape[1] == n and x.shape[0] in (1, batch):
        x = x.expand(batch, *x.shape[1:])
        index = kept if x.ndim == 2 else kept.unsqueeze(-1).expand(-1, -1, x.shape[2])
        return x.gather(1, index)
    return x


def _later_mask(x: Tensor, columns: Tensor, seen: int, total: int) -> Tensor:
    """Return the columns of a later pass's mask that this block's cache holds, and those of the pass
    itself."""
    batch = len(columns)
    if x.ndim not in (3, 4) or x.shape[-1] != total:
        return x
    new = torch.arange(seen, x.shape[-1], device=x.device).expand(batch, -1)
    index = torch.cat([columns, new], 1)[:, None, None, :]
    if x.ndim == 3:
        if x.shape[1] != 1 or x.shape[0] == batch or x.shape[0] % batch:
            return x
        x = x.reshape(batch, -1, 1, x.shape[-1])
        return x.gather(3, index.expand(-1, x.shape[1], -1, -1)).flatten(0, 1)
    x = x.expand(batch, -1, -1, -1)
    return x.gather(3, index.expand(-1, x.shape[1], x.shape[2], -1))


def _scatter(whole: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    return whole.scatter(1, kept.unsqueeze(-1).expand(-1, -1, whole.shape[-1]), hidden)
