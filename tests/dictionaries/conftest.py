"""A small language model with a tokenizer, and rows made of known features."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from actlas.core.model import Model
from tests.core.families import BY_NAME

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="session")
def toy() -> Model:
    """A Llama of 3 blocks and 32 channels over 60 words; do not change its weights."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{w: i + 3 for i, w in enumerate(WORDS)}, "<unk>": 63}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    return Model(BY_NAME["llama"].model().module, tokenizer, name="toy")


@pytest.fixture(scope="session")
def text() -> list[str]:
    """Forty documents of 30 words."""
    return [" ".join(WORDS[(7 * i + 11 * j * j + j) % 60] for i in range(30)) for j in range(40)]


def sparse_rows(n: int, d: int, features: int, active: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows `[n, d]` that are sums of `active` of `features` unit directions, and the directions."""
    g = torch.Generator().manual_seed(10_000 + seed)  # not the generator that first weights come from
    directions = torch.randn(features, d, generator=g)
    directions /= directions.norm(dim=1, keepdim=True)
    chosen = torch.stack([torch.randperm(features, generator=g)[:active] for _ in range(n)])
    strength = 0.5 + torch.rand(n, active, generator=g)
    return (directions[chosen] * strength.unsqueeze(-1)).sum(1), directions
