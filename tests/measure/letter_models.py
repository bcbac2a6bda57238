"""Tiny random language models with one token a letter, for tests that compare with brute force."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actlas.core.model import Model

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
TEXTS = [
    "the whale swam, and the ship went after it.",
    "a quick brown fox jumps over the lazy dog.",
    "call me what you like, but call me.",
    "one two three four five six seven.",
    "no man is an island entire of itself.",
    "rivers run to the sea, the sea is not full.",
]


def letters() -> PreTrainedTokenizerFast:
    """One token a letter."""
    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(LETTERS)} | {"?": len(LETTERS)}, unk_token="?"))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", pad_token="?")


def llama(
    seed: int = 0, dtype: torch.dtype = torch.float64, act: str = "silu", scale: float = 4.0, **sizes: int
) -> Model:
    """A Llama of three blocks; weights are scaled up so that its predictions depend on its MLPs."""
    torch.manual_seed(seed)
    given = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "vocab_size": len(LETTERS) + 1,
        "max_position_embeddings": 128,
        **sizes,
    }
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": len(LETTERS)}
    module = LlamaForCausalLM(LlamaConfig(**given, **ends, hidden_act=act)).to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "proj" in name:
                parameter.mul_(scale)
    return Model(module, letters(), name="tiny-llama")


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    """A GPT-2 of two blocks (ungated MLP with biases, Conv1D weights)."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        vocab_size=len(LETTERS) + 1,
        bos_token_id=0,
        eos_token_id=0,
    )
    module = GPT2LMHeadModel(config).to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name or "c_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Model(module, letters(), name="tiny-gpt2")


@cache
def trained(act: str = "silu", steps: int = 150) -> Model:
    """The Llama after it has learnt TEXTS by heart, so that damage shows in its loss; do not change it."""
    model = llama(act=act, scale=1.0)
    rows = model.encode(TEXTS)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimiser = torch.optim.Adam(model.module.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model.module(**rows, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model
