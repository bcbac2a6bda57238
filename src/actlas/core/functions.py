"""Read and write values that no module boundary shows: attention scores, patterns, router logits.

Inside the forward pass of one attention module, a `TorchFunctionMode` watches for the call that
computes attention: `scaled_dot_product_attention`, or the `softmax` of an eager implementation.
Scores and pattern are computed beside it from the same inputs, so reading them leaves the model's own
kernel, and every bit of its output, alone. Only when an edit really changes a score or a probability
is the fused kernel replaced by the explicit product. This works for every family, whether or not it
uses the transformers attention interface, and for `nn.Module`s of one's own.

    scores = q k^T * scale + mask      pattern = softmax(scores)      z = pattern v
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from actlas.core.errors import SiteError
from actlas.core.layout import End

Function = Callable[[Tensor], Tensor]
_KEY = "_actlas_functions"
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class FunctionHandle:
    """Removes one watcher; the module's own `forward` returns when the last one goes."""

    def __init__(self, watch: _Watch, entry: _Entry) -> None:
        self._watch, self._entry = watch, entry

    def remove(self) -> None:
        """Remove the watcher; doing it twice does no harm."""
        if self._entry in self._watch.entries:
            self._watch.entries.remove(self._entry)
        self._watch.uninstall_if_empty()


class _Entry:
    def __init__(self, end: End, function: Function, explicit: bool, last_rows: int | None) -> None:
        self.end, self.function, self.explicit, self.last_rows = end, function, explicit, last_rows


def watch(
    module: nn.Module, end: End, function: Function, *, explicit: bool = False, last_rows: int | None = None
) -> FunctionHandle:
    """Call `function(value) -> value` on the scores, pattern or first linear result inside a module.

    Args:
        module: the module in whose forward pass the value appears.
        end: `"scores"` (`[batch, heads, query, key]`, after scale and mask), `"pattern"` or `"linear"`.
        function: gets the value; returning the same tensor changes nothing.
        explicit: compute attention explicitly, so that gradients reach scores and pattern.
        last_rows: give only the last so many query rows (readers only).
    """
    state = module.__dict__.get(_KEY)
    if state is None:
        state = _Watch(module)
    entry = _Entry(end, function, explicit, last_rows)
    state.entries.append(entry)
    return FunctionHandle(state, entry)


class _Watch:
    """Wraps `module.forward` while at least one watcher is there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.entries: list[_Entry] = []
        self._had_own = module.__dict__.get("forward")
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            mode = _Mode(self.entries, type(module).__name__)
            with mode:
                result = original(*args, **kwargs)
            mode.check_seen()
            return result

        module.__dict__[_KEY] = self
        module.__dict__["forward"] = forward

    def uninstall_if_empty(self) -> None:
        if self.entries or self.module.__dict__.get(_KEY) is not self:
            return
        del self.module.__dict__[_KEY]
        if self._had_own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._had_own


class _Mode(TorchFunctionMode):
    def __init__(self, entries: list[_Entry], where: str) -> None:
        super().__init__()
        self.scores = [e for e in entries if e.end == "scores"]
        self.pattern = [e for e in entries if e.end == "pattern"]
        self.linear = [e for e in entries if e.end == "linear"]
        self.where = where

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (self.scores or self.pattern) and func is F.scaled_dot_product_attention:
            return self._fused(func, args, kwargs)
        if (self.scores or self.pattern) and func in _SOFTMAX and _is_attention(args):
            return self._softmax(func, args, kwargs)
        result = func(*args, **kwargs)
        if self.linear and func is F.linear:
            for entry in self.linear:
                result = entry.function(result)
            self.linear = []
        return result

    def check_seen(self) -> None:
        """Raise when the attention call that was asked for never came."""
        if self.scores or self.pattern or self.linear:
            raise SiteError(
                f"{self.where} computes attention in a way that cannot be observed (flash attention?); "
                "load the model with attn_implementation='sdpa' or 'eager'"
            )

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores_entries, pattern_entries = self.scores, self.pattern
        self.scores, self.pattern = [], []
        entries = scores_entries + pattern_entries
        explicit = any(e.explicit for e in entries)
        rows = None
        if not explicit and all(e.last_rows for e in entries):
            rows = max(e.last_rows or 0 for e in entries)
        query, key, value = args[:3] if len(args) >= 3 else (kwargs[k] for k in ("query", "key", "value"))
        extra = dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False)) | kwargs
        first = attention_scores(query, key, rows=rows, **extra)
        scores = first
        for entry in scores_entries:
            scores = _call(entry, scores, rows)
        before = torch.softmax(scores, dim=-1)
        pattern = before
        for entry in pattern_entries:
            pattern = _call(entry, pattern, rows)
        unchanged = _same(scores, first) and _same(pattern, before)
        if unchanged and not explicit:
            return func(*args, **kwargs)
        return pattern.to(value.dtype) @ _repeat(value, query.shape[1])

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores_entries, pattern_entries = self.scores, self.pattern
        self.scores, self.pattern = [], []
        scores = args[0]
        for entry in scores_entries:
            scores = _call(entry, scores, None)
        pattern = func(scores, *args[1:], **kwargs)
        for entry in pattern_entries:
            pattern = _call(entry, pattern, None)
        return pattern


def attention_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    rows: int | None = None,
) -> Tensor:
    """Return `query key^T * scale + mask` in float32 (or float64), as the fused kernel means it.

    Args:
        query: `[batch, heads, query, head_dim]`.
        key: `[batch, kv_heads, key, head_dim]`; repeated when there are fewer heads.
        attn_mask: boolean (True = may attend) or additive, broadcast to `[batch, heads, query, key]`.
        dropout_p, enable_gqa: accepted as in `scaled_dot_product_attention`; they do not change scores.
        is_causal: a lower-triangular mask from the top left corner.
        scale: `None` means `head_dim ** -0.5`.
        rows: only the last so many query rows.

    Returns:
        `[batch, heads, query, key]`; masked entries hold the dtype's most negative finite number.
    """
    length = query.shape[-2]
    if rows is not None and rows < length:
        query = query[..., -rows:, :]
        if attn_mask is not None and attn_mask.shape[-2] == length:
            attn_mask = attn_mask[..., -rows:, :]
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.to(wide) @ _repeat(key, query.shape[1]).to(wide).transpose(-2, -1) * factor
    lowest = torch.finfo(wide).min
    if is_causal:
        keys = key.shape[-2]
        allowed = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed[-query.shape[-2] :], lowest)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, lowest)
        else:
            scores = (scores + attn_mask.to(wide)).clamp_min(lowest)
    return scores


def _call(entry: _Entry, value: Tensor, rows: int | None) -> Tensor:
    if entry.last_rows is not None and (rows is None or entry.last_rows < value.shape[-2]):
        entry.function(value[..., -entry.last_rows :, :])
        return value
    return entry.function(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _is_attention(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].ndim == 4
