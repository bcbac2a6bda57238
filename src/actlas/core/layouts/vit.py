"""ViT image encoders: pre-norm blocks over patch tokens, an ungated MLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Layout, Tap, Taps, find, first_path, join
from actlas.core.layouts.common import NOT_GATED, attention_sites, make_tower, size

MODEL_TYPES = ("vit",)


def build(model: nn.Module) -> Layout:
    """Return the layout of a ViT."""
    config: Any = model.config
    root = first_path(model, "vit", "")
    heads, d_model = size(config, "num_attention_heads"), size(config, "hidden_size")
    head_dim = d_model // heads
    views = (Heads(heads, head_dim),)
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": Tap("layernorm_before"),
        "attn.q": Tap("attention.q_proj", "output", views),
        "attn.k": Tap("attention.k_proj", "output", views),
        "attn.v": Tap("attention.v_proj", "output", views),
        **attention_sites("attention"),
        "attn.z": Tap("attention.o_proj", "input", views),
        "attn.out": Tap("attention"),
        "resid_mid": Tap("layernorm_after", "input", in_place=True),
        "mlp_norm": Tap("layernorm_after"),
        "mlp.up": Tap("mlp.fc1"),
        "mlp.act": Tap("mlp.fc2", "input"),
        "mlp.out": Tap("mlp"),
        "resid_post": Tap(""),
    }
    tower = make_tower(
        model=model,
        root=root,
        blocks=join(root, "layers"),
        sites=sites,
        absent=NOT_GATED,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        d_mlp=size(config, "intermediate_size"),
        embed=Tap(join(root, "embeddings")),
        final_norm=Tap(join(root, "layernorm")),
        attention="attention",
        out_proj="attention.o_proj",
        down_proj="mlp.fc2",
        norm=join(root, "layernorm"),
    )
    has_head = find(model, "classifier") is not None
    return Layout(
        "vit", (tower,), Tap("", pick="logits") if has_head else None, "this ViT has no classifier head"
    )
