"""Llama-like decoders: Llama, Mistral, SmolLM, Qwen2, Qwen3, Phi-3, Mixtral, Qwen-MoE, Gemma 2 and 3.

They share one block: norm, attention with `o_proj`, residual addition, norm, gated MLP with
`down_proj`, residual addition. What differs is where q, k, v, gate and up are (Phi-3 fuses them),
what the MLP is (dense or experts) and whether a second norm stands before the addition (Gemma).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Columns, Heads, Layout, Tap, Taps, find, first_path, join
from actlas.core.layouts.common import attention_sites, fused, make_tower, size

MODEL_TYPES = (
    "llama",
    "mistral",
    "smollm3",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)


def build(model: nn.Module) -> Layout:
    """Return the layout of a llama-like model (with or without its language-model head)."""
    config: Any = model.config
    config = getattr(config, "text_config", None) or config
    root = first_path(model, "model.language_model", "language_model", "model", "")
    root = root if find(model, join(root, "layers")) is not None else ""
    block = find(model, join(root, "layers.0")) or nn.Module()
    heads = size(config, "num_attention_heads")
    kv_heads = size(config, "num_key_value_heads", default=heads)
    d_model = size(config, "hidden_size")
    head_dim = size(config, "head_dim", default=d_model // heads)
    d_mlp = size(config, "intermediate_size")

    second_norms = find(block, "pre_feedforward_layernorm") is not None
    mlp_norm = "pre_feedforward_layernorm" if second_norms else "post_attention_layernorm"
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": Tap("input_layernorm"),
        **attention_sites("self_attn"),
        "attn.z": Tap("self_attn.o_proj", "input", (Heads(heads, head_dim),)),
        "attn.out": Tap("post_attention_layernorm" if second_norms else "self_attn"),
        "resid_mid": Tap(mlp_norm, "input", in_place=True),
        "mlp_norm": Tap(mlp_norm),
        "mlp.act": Tap("mlp.down_proj", "input"),
        "mlp.out": Tap("post_feedforward_layernorm" if second_norms else "mlp"),
        "resid_post": Tap(""),
        "moe.router": Tap("mlp.gate", "linear", flat=True),
        "moe.experts": Tap("mlp.experts", flat=True),
    }
    if find(block, "self_attn.qkv_proj") is not None:
        q, k, v = fused("self_attn.qkv_proj", head_dim, heads, kv_heads, kv_heads)
    else:
        q = Tap("self_attn.q_proj", "output", (Heads(heads, head_dim),))
        k = Tap("self_attn.k_proj", "output", (Heads(kv_heads, head_dim),))
        v = Tap("self_attn.v_proj", "output", (Heads(kv_heads, head_dim),))
    sites |= {"attn.q": q, "attn.k": k, "attn.v": v}
    if find(block, "mlp.gate_up_proj") is not None:
        sites["mlp.gate"] = Tap("mlp.gate_up_proj", "output", (Columns(0, d_mlp),))
        sites["mlp.up"] = Tap("mlp.gate_up_proj", "output", (Columns(d_mlp, 2 * d_mlp),))
    else:
        sites["mlp.gate"] = Tap("mlp.gate_proj")
        sites["mlp.up"] = Tap("mlp.up_proj")

    experts = "the MLP of this block is a mixture of experts; each expert has its own"
    tower = make_tower(
        model=model,
        root=root,
        blocks=join(root, "layers"),
        sites=sites,
        absent={"mlp.gate": experts, "mlp.up": experts, "mlp.act": experts},
        d_model=d_model,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        d_mlp=d_mlp,
        embed=Tap(join(root, "layers.0"), "input"),
        final_norm=Tap(join(root, "norm")),
        attention="self_attn",
        out_proj="self_attn.o_proj",
        down_proj="mlp.down_proj",
        attn_out_norm="post_attention_layernorm" if second_norms else "",
        mlp_out_norm="post_feedforward_layernorm" if second_norms else "",
        norm=join(root, "norm"),
        unembed="lm_head" if find(model, "lm_head") is not None else "",
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    return Layout("llama", (tower,), *_logits(model))


def _logits(model: nn.Module) -> tuple[Tap | None, str]:
    if any(find(model, head) is not None for head in ("lm_head", "score", "classifier")):
        return Tap("", pick="logits"), ""
    return None, "this model was loaded without an output head"
