"""BLOOM: ALiBi attention, q/k/v interleaved per head; attention and MLP add the residual themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Interleaved, Layout, Tap, Taps, find, first_path, join
from actlas.core.layouts.common import NOT_GATED, attention_sites, make_tower, size
from actlas.core.layouts.llama import _logits

MODEL_TYPES = ("bloom",)


def build(model: nn.Module) -> Layout:
    """Return the layout of a BLOOM model."""
    config: Any = model.config
    root = first_path(model, "transformer", "")
    heads, d_model = size(config, "n_head"), size(config, "hidden_size")
    head_dim = d_model // heads

    def part(index: int) -> Tap:
        view = Interleaved(heads, 3, head_dim, index, index + 1)
        return Tap("self_attention.query_key_value", "output", (view,))

    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": Tap("input_layernorm"),
        "attn.q": part(0),
        "attn.k": part(1),
        "attn.v": part(2),
        **attention_sites("self_attention"),
        "attn.z": Tap("self_attention.dense", "input", (Heads(heads, head_dim),)),
        "attn.out": Tap("self_attention.dense"),
        "resid_mid": Tap("self_attention"),
        "mlp_norm": Tap("post_attention_layernorm"),
        "mlp.up": Tap("mlp.dense_h_to_4h"),
        "mlp.act": Tap("mlp.dense_4h_to_h", "input"),
        "mlp.out": Tap("mlp.dense_4h_to_h"),
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
        d_mlp=4 * d_model,
        embed=Tap(join(root, "word_embeddings_layernorm")),
        final_norm=Tap(join(root, "ln_f")),
        attention="self_attention",
        out_proj="self_attention.dense",
        down_proj="mlp.dense_4h_to_h",
        norm=join(root, "ln_f"),
        unembed="lm_head" if find(model, "lm_head") is not None else "",
    )
    return Layout("bloom", (tower,), *_logits(model))
