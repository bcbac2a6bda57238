"""GPT-2: pre-norm blocks, fused q/k/v in a `Conv1D` (weights are `[in, out]`), an ungated MLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Layout, Tap, Taps, find, first_path, join
from actlas.core.layouts.common import NOT_GATED, attention_sites, fused, make_tower, size
from actlas.core.layouts.llama import _logits

MODEL_TYPES = ("gpt2",)


def build(model: nn.Module) -> Layout:
    """Return the layout of a GPT-2 model."""
    config: Any = model.config
    root = first_path(model, "transformer", "")
    heads, d_model = size(config, "n_head"), size(config, "n_embd")
    head_dim = d_model // heads
    q, k, v = fused("attn.c_attn", head_dim, heads, heads, heads)
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": Tap("ln_1"),
        "attn.q": q,
        "attn.k": k,
        "attn.v": v,
        **attention_sites("attn"),
        "attn.z": Tap("attn.c_proj", "input", (Heads(heads, head_dim),)),
        "attn.out": Tap("attn"),
        "resid_mid": Tap("ln_2", "input", in_place=True),
        "mlp_norm": Tap("ln_2"),
        "mlp.up": Tap("mlp.c_fc"),
        "mlp.act": Tap("mlp.c_proj", "input"),
        "mlp.out": Tap("mlp"),
        "resid_post": Tap(""),
    }
    tower = make_tower(
        model=model,
        root=root,
        blocks=join(root, "h"),
        sites=sites,
        absent=NOT_GATED,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        d_mlp=size(config, "n_inner", default=4 * d_model),
        embed=Tap(join(root, "h.0"), "input"),
        final_norm=Tap(join(root, "ln_f")),
        attention="attn",
        out_proj="attn.c_proj",
        down_proj="mlp.c_proj",
        norm=join(root, "ln_f"),
        unembed="lm_head" if find(model, "lm_head") is not None else "",
    )
    return Layout("gpt2", (tower,), *_logits(model))
