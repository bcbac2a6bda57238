"""GPT-NeoX and Pythia: q, k, v interleaved per head; attention and MLP in parallel (usually)."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Interleaved, Layout, Tap, Taps, first_path, join
from actlas.core.layouts.common import NOT_GATED, PARALLEL, attention_sites, make_tower, size

MODEL_TYPES = ("gpt_neox",)


def build(model: nn.Module) -> Layout:
    """Return the layout of a GPT-NeoX model."""
    config: Any = model.config
    root = first_path(model, "gpt_neox", "")
    heads, d_model = size(config, "num_attention_heads"), size(config, "hidden_size")
    head_dim = d_model // heads
    parallel = bool(config.use_parallel_residual)

    def part(index: int) -> Tap:
        view = Interleaved(heads, 3, head_dim, index, index + 1)
        return Tap("attention.query_key_value", "output", (view,))

    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn_norm": Tap("input_layernorm"),
        "attn.q": part(0),
        "attn.k": part(1),
        "attn.v": part(2),
        **attention_sites("attention"),
        "attn.z": Tap("attention.dense", "input", (Heads(heads, head_dim),)),
        "attn.out": Tap("attention"),
        "mlp_norm": Tap("post_attention_layernorm"),
        "mlp.up": Tap("mlp.dense_h_to_4h"),
        "mlp.act": Tap("mlp.dense_4h_to_h", "input"),
        "mlp.out": Tap("mlp"),
        "resid_post": Tap(""),
    }
    if not parallel:
        sites["resid_mid"] = Tap("post_attention_layernorm", "input", in_place=True)
    head = first_path(model, "lm_head", "embed_out", "score", "classifier", "")
    tower = make_tower(
        model=model,
        root=root,
        blocks=join(root, "layers"),
        sites=sites,
        absent={**NOT_GATED, **PARALLEL},
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        d_mlp=size(config, "intermediate_size"),
        embed=Tap(join(root, "layers.0"), "input"),
        final_norm=Tap(join(root, "final_layer_norm")),
        attention="attention",
        out_proj="attention.dense",
        down_proj="mlp.dense_4h_to_h",
        norm=join(root, "final_layer_norm"),
        unembed=head if head in ("lm_head", "embed_out") else "",
        parallel=parallel,
    )
    logits = Tap("", pick="logits") if head else None
    return Layout("gpt_neox", (tower,), logits, "this model was loaded without an output head")
