"""CLIP: two towers of the same pre-norm block, `text` and `vision`."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Layout, Tap, Taps, Tower, find, join
from actlas.core.layouts.common import NOT_GATED, attention_sites, make_tower, size

MODEL_TYPES = ("clip",)


def build(model: nn.Module) -> Layout:
    """Return the layout of a CLIP model with both towers, or of the one it has."""
    towers = []
    config: Any = model.config
    if find(model, "text_model") is not None:
        towers.append(_tower(model, "text", "text_model", getattr(config, "text_config", config)))
    if find(model, "vision_model") is not None:
        towers.append(_tower(model, "vision", "vision_model", getattr(config, "vision_config", config)))
    return Layout("clip", tuple(towers), None, "CLIP has similarities, not logits over a vocabulary")


def _tower(model: nn.Module, name: str, root: str, config: Any) -> Tower:
    heads, d_model = size(config, "num_attention_heads"), size(config, "hidden_size")
    head_dim = d_model // heads
    views = (Heads(heads, head_dim),)
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": Tap("layer_norm1"),
        "attn.q": Tap("self_attn.q_proj", "output", views),
        "attn.k": Tap("self_attn.k_proj", "output", views),
        "attn.v": Tap("self_attn.v_proj", "output", views),
        **attention_sites("self_attn"),
        "attn.z": Tap("self_attn.out_proj", "input", views),
        "attn.out": Tap("self_attn"),
        "resid_mid": Tap("layer_norm2", "input", in_place=True),
        "mlp_norm": Tap("layer_norm2"),
        "mlp.up": Tap("mlp.fc1"),
        "mlp.act": Tap("mlp.fc2", "input"),
        "mlp.out": Tap("mlp"),
        "resid_post": Tap(""),
    }
    norm = join(root, "final_layer_norm" if name == "text" else "post_layernorm")
    return make_tower(
        model=model,
        name=name,
        root=root,
        blocks=join(root, "encoder.layers"),
        sites=sites,
        absent=NOT_GATED,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        d_mlp=size(config, "intermediate_size"),
        embed=Tap(join(root, "encoder.layers.0"), "input"),
        final_norm=Tap(norm),
        attention="self_attn",
        out_proj="self_attn.out_proj",
        down_proj="mlp.fc2",
        norm=norm,
    )
