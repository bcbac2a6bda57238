"""Falcon: fused q/k/v in three arrangements; attention and MLP in parallel (usually)."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Interleaved, Layout, Tap, Taps, find, first_path, join
from actlas.core.layouts.common import NOT_GATED, PARALLEL, attention_sites, fused, make_tower, size
from actlas.core.layouts.llama import _logits

MODEL_TYPES = ("falcon",)


def build(model: nn.Module) -> Layout:
    """Return the layout of a Falcon model."""
    config: Any = model.config
    root = first_path(model, "transformer", "")
    heads, d_model = size(config, "num_attention_heads"), size(config, "hidden_size")
    head_dim = d_model // heads
    parallel = bool(config.parallel_attn or config.new_decoder_architecture)
    fused_at = "self_attention.query_key_value"
    if config.new_decoder_architecture:
        kv_heads = size(config, "num_kv_heads")
        per = heads // kv_heads + 2
        q, k, v = (
            Tap(fused_at, "output", (Interleaved(kv_heads, per, head_dim, a, b),))
            for a, b in ((0, per - 2), (per - 2, per - 1), (per - 1, per))
        )
    elif config.multi_query:
        kv_heads = 1
        q, k, v = fused(fused_at, head_dim, heads, 1, 1)
    else:
        kv_heads = heads
        q, k, v = (Tap(fused_at, "output", (Interleaved(heads, 3, head_dim, i, i + 1),)) for i in range(3))
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": (Tap("ln_attn"), Tap("input_layernorm")),
        "attn.q": q,
        "attn.k": k,
        "attn.v": v,
        **attention_sites("self_attention"),
        "attn.z": Tap("self_attention.dense", "input", (Heads(heads, head_dim),)),
        "attn.out": Tap("self_attention"),
        "mlp.up": Tap("mlp.dense_h_to_4h"),
        "mlp.act": Tap("mlp.dense_4h_to_h", "input"),
        "mlp.out": Tap("mlp", copy=parallel),
        "resid_post": Tap(""),
    }
    absent = {**NOT_GATED, **PARALLEL}
    if not parallel:
        sites["resid_mid"] = Tap("post_attention_layernorm", "input", in_place=True)
        sites["mlp_norm"] = Tap("post_attention_layernorm")
    else:
        sites["mlp_norm"] = Tap("ln_mlp")
        absent["mlp_norm"] = "the MLP reads the same norm as attention; see attn_norm"
    tower = make_tower(
        model=model,
        root=root,
        blocks=join(root, "h"),
        sites=sites,
        absent=absent,
        d_model=d_model,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        d_mlp=size(config, "ffn_hidden_size", default=4 * d_model),
        embed=Tap(join(root, "h.0"), "input"),
        final_norm=Tap(join(root, "ln_f")),
        attention="self_attention",
        out_proj="self_attention.dense",
        down_proj="mlp.dense_4h_to_h",
        norm=join(root, "ln_f"),
        unembed="lm_head" if find(model, "lm_head") is not None else "",
        parallel=parallel,
    )
    return Layout("falcon", (tower,), *_logits(model))
