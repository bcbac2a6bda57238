"""Whisper: an audio encoder and a text decoder with cross-attention; pre-norm, ungated MLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Layout, Tap, Taps, Tower, find, first_path, join
from actlas.core.layouts.common import NOT_GATED, attention_sites, make_tower, size

MODEL_TYPES = ("whisper",)


def build(model: nn.Module) -> Layout:
    """Return the layout of a Whisper model."""
    config: Any = model.config
    root = first_path(model, "model", "")
    towers = [
        _tower(model, name, join(root, name), config)
        for name in ("encoder", "decoder")
        if find(model, join(root, name)) is not None
    ]
    head = find(model, "proj_out")
    return Layout(
        "whisper",
        tuple(towers),
        Tap("", pick="logits") if head is not None else None,
        "this model was loaded without an output head",
    )


def _tower(model: nn.Module, name: str, root: str, config: Any) -> Tower:
    heads, d_model = size(config, f"{name}_attention_heads"), size(config, "d_model")
    head_dim = d_model // heads
    views = (Heads(heads, head_dim),)
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": Tap("self_attn_layer_norm"),
        "attn.q": Tap("self_attn.q_proj", "output", views),
        "attn.k": Tap("self_attn.k_proj", "output", views),
        "attn.v": Tap("self_attn.v_proj", "output", views),
        **attention_sites("self_attn"),
        "attn.z": Tap("self_attn.out_proj", "input", views),
        "attn.out": Tap("self_attn"),
        "resid_mid": Tap("final_layer_norm", "input", in_place=True),
        "mlp_norm": Tap("final_layer_norm"),
        "mlp.up": Tap("fc1"),
        "mlp.act": Tap("fc2", "input"),
        "mlp.out": Tap("fc2"),
        "resid_post": Tap(""),
    }
    if name == "decoder":
        sites |= {
            "cross_attn.q": Tap("encoder_attn.q_proj", "output", views),
            "cross_attn.k": Tap("encoder_attn.k_proj", "output", views),
            "cross_attn.v": Tap("encoder_attn.v_proj", "output", views),
            **attention_sites("encoder_attn", "cross_attn"),
            "cross_attn.z": Tap("encoder_attn.out_proj", "input", views),
            "cross_attn.out": Tap("encoder_attn"),
        }
    return make_tower(
        model=model,
        name=name,
        root=root,
        blocks=join(root, "layers"),
        sites=sites,
        absent=NOT_GATED,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        d_mlp=size(config, f"{name}_ffn_dim"),
        embed=Tap(join(root, "layers.0"), "input"),
        final_norm=Tap(join(root, "layer_norm")),
        attention="self_attn",
        cross_attention="encoder_attn" if name == "decoder" else "",
        out_proj="self_attn.out_proj",
        down_proj="fc2",
        norm=join(root, "layer_norm"),
        unembed="proj_out" if name == "decoder" and find(model, "proj_out") is not None else "",
    )
