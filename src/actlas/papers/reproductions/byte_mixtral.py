"""Tiny byte-level Mixtrals: what reproductions about experts train, and the three kinds of text they see."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actlas.core.model import Model
from actlas.papers.reproductions.byte_models import CONTEXT, byte_tokenizer, train_checkpoints

DOMAINS = ("prose", "code", "sums")


def byte_mixtral(
    experts: int, seed: int, *, width: int = 64, hidden: int = 48, layers: int = 3, balance: float = 0.01
) -> Model:
    """Return an untrained byte-level Mixtral with two experts a token.

    Args:
        experts: E of each block. seed: of the weights. width: of the residual stream.
        hidden: neurons of an expert. layers: blocks. balance: coefficient of the load-balance loss.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=balance,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Model(MixtralForCausalLM(config), byte_tokenizer(), name=f"byte Mixtral ({experts} experts)")


def train(model: Model, text: str, steps: int, seed: int) -> Model:
    """Train for so many steps (`byte_models.train_checkpoints`) and return the model."""
    for _ in train_checkpoints(text, activation="silu", checkpoints=(steps,), seed=seed, model=model):
        pass
    return model


def without_balance(model: Model) -> Model:
    """Return a deep copy that returns no router logits, so that its experts can be replaced."""
    module = copy.deepcopy(model.module)
    module.config.output_router_logits = False  # type: ignore[union-attr]
    return Model(module, model.tokenizer, name=model.name)


def sums(documents: int, seed: int) -> list[str]:
    """Return pages of sums with their results, in columns."""
    rng = np.random.default_rng(seed)
    pages = []
    for _ in range(documents):
        rows = rng.integers(0, 1000, (60, 2))
        pages.append("\n".join(f"{a:>4} + {b:>4} = {a + b:>5}" for a, b in rows.tolist()))
    return pages


def domains(seed: int, *, documents: int = 160, names: Sequence[str] = DOMAINS) -> dict[str, Any]:
    """Return for each kind of text (documents to learn from, to calibrate on, to judge on)."""
    from actlas.data import corpus

    out = {}
    for name in names:
        if name == "sums":
            pages: list[str] = sums(documents, seed)
        else:
            pages = [d.text for d in corpus(name, seed=seed, limit=documents)]
        n = len(pages)
        out[name] = (pages[: n * 6 // 10], pages[n * 6 // 10 : n * 7 // 10], pages[n * 7 // 10 :])
    return out


def mixed(found: dict[str, Any]) -> str:
    """Return the pages to learn from, of all kinds in turn."""
    return "\n\n".join(p for pages in zip(*(f[0] for f in found.values()), strict=False) for p in pages)
