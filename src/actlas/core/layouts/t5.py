"""T5: encoder and decoder; every sub-layer holds its norm and adds the residual itself.

`attn.out` and `mlp.out` are the outputs of the projections (`o`, `wo`); with dropout off they are
exactly what is added to the residual stream.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Layout, Tap, Taps, Tower, find, join
from actlas.core.layouts.common import NOT_GATED, attention_sites, make_tower, size

MODEL_TYPES = ("t5",)


def build(model: nn.Module) -> Layout:
    """Return the layout of a T5 model (encoder, and decoder where there is one)."""
    config: Any = model.config
    towers = [_tower(model, name, config) for name in ("encoder", "decoder") if find(model, name) is not None]
    has_head = find(model, "lm_head") is not None
    return Layout(
        "t5",
        tuple(towers),
        Tap("", pick="logits") if has_head else None,
        "this model was loaded without an output head",
    )


def _tower(model: nn.Module, name: str, config: Any) -> Tower:
    heads, d_model, head_dim = size(config, "num_heads"), size(config, "d_model"), size(config, "d_kv")
    views = (Heads(heads, head_dim),)
    last = "layer.1" if name == "encoder" else "layer.2"
    dense = f"{last}.DenseReluDense"
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": Tap("layer.0.layer_norm"),
        "attn.q": Tap("layer.0.SelfAttention.q", "output", views),
        "attn.k": Tap("layer.0.SelfAttention.k", "output", views),
        "attn.v": Tap("layer.0.SelfAttention.v", "output", views),
        **attention_sites("layer.0.SelfAttention"),
        "attn.z": Tap("layer.0.SelfAttention.o", "input", views),
        "attn.out": Tap("layer.0.SelfAttention.o"),
        "resid_mid": Tap(last, "input"),
        "mlp_norm": Tap(f"{last}.layer_norm"),
        "mlp.act": Tap(f"{dense}.wo", "input"),
        "mlp.out": Tap(f"{dense}.wo"),
        "resid_post": Tap(""),
    }
    absent: dict[str, str] = {}
    if config.is_gated_act:
        sites["mlp.gate"] = Tap(f"{dense}.wi_0")
        sites["mlp.up"] = Tap(f"{dense}.wi_1")
    else:
        sites["mlp.up"] = Tap(f"{dense}.wi")
        absent |= NOT_GATED
    if name == "decoder":
        cross = "layer.1.EncDecAttention"
        sites |= {
            "cross_attn.q": Tap(f"{cross}.q", "output", views),
            "cross_attn.k": Tap(f"{cross}.k", "output", views),
            "cross_attn.v": Tap(f"{cross}.v", "output", views),
            **attention_sites(cross, "cross_attn"),
            "cross_attn.z": Tap(f"{cross}.o", "input", views),
            "cross_attn.out": Tap(f"{cross}.o"),
        }
    tied = bool(getattr(config, "tie_word_embeddings", True))
    scale = bool(getattr(config, "scale_decoder_outputs", tied))
    return make_tower(
        model=model,
        name=name,
        root=name,
        blocks=join(name, "block"),
        sites=sites,
        absent=absent,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        d_mlp=size(config, "d_ff"),
        embed=Tap(join(name, "block.0"), "input"),
        final_norm=Tap(join(name, "final_layer_norm")),
        attention="layer.0.SelfAttention",
        cross_attention="layer.1.EncDecAttention" if name == "decoder" else "",
        out_proj="layer.0.SelfAttention.o",
        down_proj=f"{dense}.wo",
        norm=join(name, "final_layer_norm"),
        unembed="lm_head" if name == "decoder" and find(model, "lm_head") is not None else "",
        logit_scale=d_model**-0.5 if scale else 1.0,
    )
