"""A byte-level GPT-2, trained in a minute: LayerNorms with biases, for claims about shifts.

    model = trained_byte_gpt2(texts, steps=250, seed=0)

It is kept in the cache folder, found by a hash of its start, the text and the settings.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from actlas.core.model import Model
from actlas.papers.reproductions.byte_models import CONTEXT, byte_tokenizer, train_checkpoints


def byte_gpt2(seed: int = 0, *, width: int = 96, layers: int = 3) -> Model:
    """Return an untrained byte-level GPT-2 (its head is not tied to the embedding).

    Args:
        seed: seed of the weights.
        width: of the residual stream.
        layers: number of blocks.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=2 * CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Model(GPT2LMHeadModel(config).eval(), byte_tokenizer(), name="byte GPT-2")


def trained_byte_gpt2(texts: str, *, steps: int = 250, seed: int = 0, cache: bool = True) -> Model:
    """Return the model after some steps on a text, from the cache where it is there.

    Args:
        texts: the text.
        steps: of 2,048 bytes each.
        seed: of weights and windows.
        cache: whether to look and to keep.
    """
    from actlas.training.diffusion import kept_weights

    start = byte_gpt2(seed)

    def learn() -> dict[str, Tensor]:
        (_, made), *_ = train_checkpoints(
            texts, activation="gelu", checkpoints=(steps,), seed=seed, model=start
        )
        return made.module.state_dict()

    said = {"steps": steps, "seed": seed, "text": hashlib.sha256(texts.encode()).hexdigest()}
    module = kept_weights(byte_gpt2(seed).module, "byte-gpt2", said, learn, cache=cache)
    return Model(module, byte_tokenizer(), name="byte GPT-2")
