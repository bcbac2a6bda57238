"""Helpers that the layout files share: sizes from a config, fused projections, default reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from actlas.core.layout import BLOCK_KINDS, Columns, Heads, Tap, Taps, Tower, find

DENSE = {
    "moe.router": "the MLP is dense; there is no router",
    "moe.experts": "the MLP is dense; there are no experts",
}
NO_CROSS = {
    f"cross_attn.{k}": "this stack has no cross-attention"
    for k in ("q", "k", "v", "scores", "pattern", "z", "out")
}
NOT_GATED = {"mlp.gate": "the MLP is not gated; see mlp.up"}
PARALLEL = {
    "resid_mid": "attention and MLP run in parallel: resid_post = resid_pre + attn.out + mlp.out",
}


def size(config: Any, *names: str, default: int | None = None) -> int:
    """Return the first of the config's fields that is set, as an int."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    if default is None:
        raise AttributeError(f"{type(config).__name__} has none of the sizes {', '.join(names)}")
    return default


def fused(module: str, head_dim: int, *heads: int) -> list[Tap]:
    """Return taps on the consecutive parts of a fused projection (`heads` heads in each part)."""
    taps, start = [], 0
    for n in heads:
        stop = start + n * head_dim
        taps.append(Tap(module, "output", (Columns(start, stop), Heads(n, head_dim))))
        start = stop
    return taps


def attention_sites(attention: str, name: str = "attn") -> dict[str, Tap]:
    """Return taps on the scores and the pattern inside an attention module."""
    return {
        f"{name}.scores": Tap(attention, "scores"),
        f"{name}.pattern": Tap(attention, "pattern"),
    }


def make_tower(
    *,
    model: nn.Module,
    blocks: str,
    sites: Mapping[str, Taps],
    absent: Mapping[str, str],
    name: str = "",
    **fields: Any,
) -> Tower:
    """Build a Tower, giving every canonical kind that is not in `sites` a reason for its absence."""
    reasons = {**NO_CROSS, **DENSE, **absent}
    for kind in BLOCK_KINDS:
        if kind not in sites and kind not in reasons:
            reasons[kind] = "this architecture does not compute it as a separate tensor"
    stack = find(model, blocks)
    n_blocks = len(stack) if isinstance(stack, (nn.ModuleList, nn.Sequential)) else 0
    return Tower(name=name, blocks=blocks, n_blocks=n_blocks, sites=sites, absent=reasons, **fields)
