"""Tiny byte-level language models that train in minutes, for claims about training.

    tokenizer = byte_tokenizer()
    for step, model in train_checkpoints(texts, activation="relu", checkpoints=(50, 100, 200), seed=0): ...

A Llama of about 0.4 million parameters with a gated MLP whose activation function is chosen. The yielded
Model is the one in training: measure it before the next step is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.model import Model
from actlas.core.progress import progress

CONTEXT, BATCH = 128, 16
STEP_BYTES = CONTEXT * BATCH


@functools.cache
def byte_tokenizer() -> Any:
    """Return a transformers tokenizer whose 256 tokens are the bytes of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_model(activation: str, seed: int, *, width: int = 96, layers: int = 3) -> Model:
    """Return an untrained byte-level Llama.

    Args:
        activation: of the gate, by its transformers name: `"relu"`, `"silu"`, ...
        seed: seed of the weights.
        width: of the residual stream; the MLP is four times as wide.
        layers: number of blocks.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_act=activation,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Model(LlamaForCausalLM(config), byte_tokenizer(), name=f"byte Llama ({activation})")


def train_checkpoints(
    texts: str,
    *,
    activation: str,
    checkpoints: Sequence[int],
    seed: int = 0,
    model: Model | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    **sizes: int,
) -> Iterator[tuple[int, Model]]:
    """Train on random windows of a text; yield (steps done, model) at each checkpoint.

    Adam with a rate of 2e-3 after 20 steps of warm-up and no decay, so that every checkpoint is comparable.

    Args:
        texts: the text; read as UTF-8 bytes.
        activation: see `byte_model`.
        checkpoints: rising numbers of steps, each of `STEP_BYTES` bytes.
        seed: seed of weights and windows.
        model: a byte-level model to train on instead of a fresh `byte_model`.
        penalty: what is added to the loss after each forward pass, from the module.
        sizes: `width`, `layers`.
    """
    model = model or byte_model(activation, seed, **sizes)
    data = torch.tensor(byte_tokenizer()(texts, verbose=False)["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    module = model.module
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 20))
    done = 0
    for stop in checkpoints:
        module.train()
        with progress(f"training a byte model ({activation})", stop - done, "steps") as advance:
            while done < stop:
                starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator)
                batch = torch.stack([data[s : s + CONTEXT] for s in starts.tolist()])
                optimiser.zero_grad()
                loss = module(input_ids=batch, labels=batch).loss
                (loss if penalty is None else loss + penalty(module)).backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimiser.step()
                warm.step()
                done += 1
                advance()
        module.eval()
        yield done, model
