"""OPT: pre-norm blocks (post-norm in the 350m variant) whose MLP works on a flattened batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Layout, Tap, Taps, find, first_path, join
from actlas.core.layouts.common import NOT_GATED, attention_sites, make_tower, size
from actlas.core.layouts.llama import _logits

MODEL_TYPES = ("opt",)


def build(model: nn.Module) -> Layout:
    """Return the layout of an OPT model."""
    config: Any = model.config
    root = first_path(model, "model.decoder", "decoder", "")
    heads, d_model = size(config, "num_attention_heads"), size(config, "hidden_size")
    head_dim = d_model // heads
    pre_norm = bool(config.do_layer_norm_before)
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn.q": Tap("self_attn.q_proj", "output", (Heads(heads, head_dim),)),
        "attn.k": Tap("self_attn.k_proj", "output", (Heads(heads, head_dim),)),
        "attn.v": Tap("self_attn.v_proj", "output", (Heads(heads, head_dim),)),
        **attention_sites("self_attn"),
        "attn.z": Tap("self_attn.out_proj", "input", (Heads(heads, head_dim),)),
        "attn.out": Tap("self_attn"),
        "mlp.up": Tap("fc1", flat=True),
        "mlp.act": Tap("fc2", "input", flat=True),
        "mlp.out": Tap("fc2", flat=True),
        "resid_post": Tap(""),
    }
    absent = dict(NOT_GATED)
    if pre_norm:
        sites["attn_norm"] = Tap("self_attn_layer_norm")
        sites["mlp_norm"] = Tap("final_layer_norm", flat=True)
        sites["resid_mid"] = Tap("final_layer_norm", "input", in_place=True, flat=True)
    else:
        sites["mlp_norm"] = Tap("self_attn_layer_norm")
        sites["resid_mid"] = Tap("self_attn_layer_norm", "input")
        absent["attn_norm"] = "post-norm block: attention reads resid_pre itself"
    norm = join(root, "final_layer_norm")
    has_norm = find(model, norm) is not None
    tower = make_tower(
        model=model,
        root=root,
        blocks=join(root, "layers"),
        sites=sites,
        absent=absent,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        d_mlp=size(config, "ffn_dim"),
        embed=Tap(join(root, "layers.0"), "input"),
        final_norm=Tap(norm) if has_norm else None,
        attention="self_attn",
        out_proj="self_attn.out_proj",
        down_proj="fc2",
        norm=norm if has_norm else "",
        unembed="lm_head" if find(model, "lm_head") is not None else "",
        post_norm=not pre_norm,
    )
    return Layout("opt", (tower,), *_logits(model))
