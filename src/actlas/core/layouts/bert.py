"""BERT, RoBERTa and MiniLM: post-norm encoders. `resid_mid` is what enters the attention's LayerNorm."""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.layout import Heads, Layout, Tap, Taps, find, first_path, join
from actlas.core.layouts.common import NOT_GATED, attention_sites, make_tower, size

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")


def build(model: nn.Module) -> Layout:
    """Return the layout of a BERT-like encoder (with or without a head)."""
    config: Any = model.config
    root = first_path(model, "bert", "roberta", "")
    heads, d_model = size(config, "num_attention_heads"), size(config, "hidden_size")
    head_dim = d_model // heads
    views = (Heads(heads, head_dim),)
    sites: dict[str, Taps] = {
        "resid_pre": Tap("", "input"),
        "attn.q": Tap("attention.self.query", "output", views),
        "attn.k": Tap("attention.self.key", "output", views),
        "attn.v": Tap("attention.self.value", "output", views),
        **attention_sites("attention.self"),
        "attn.z": Tap("attention.output.dense", "input", views),
        "attn.out": Tap("attention.output.dense"),
        "resid_mid": Tap("attention.output.LayerNorm", "input"),
        "mlp_norm": Tap("attention.output.LayerNorm"),
        "mlp.up": Tap("intermediate.dense"),
        "mlp.act": Tap("output.dense", "input"),
        "mlp.out": Tap("output.dense"),
        "resid_post": Tap(""),
    }
    absent = {**NOT_GATED, "attn_norm": "post-norm block: attention reads resid_pre itself"}
    head = first_path(model, "cls.predictions.decoder", "lm_head.decoder", "classifier", "")
    tower = make_tower(
        model=model,
        root=root,
        blocks=join(root, "encoder.layer"),
        sites=sites,
        absent=absent,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        d_mlp=size(config, "intermediate_size"),
        embed=Tap(join(root, "embeddings")),
        attention="attention.self",
        out_proj="attention.output.dense",
        down_proj="output.dense",
        post_norm=True,
    )
    logits = Tap("", pick="logits") if head and find(model, head) is not None else None
    return Layout("bert", (tower,), logits, "this encoder has no output head")
