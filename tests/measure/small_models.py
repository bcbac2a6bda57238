"""Small random models with a real tokenizer, made here in well under a second."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from actlas.core.model import Model
from actlas.data import task

WORDS = "the cat sat on a mat and the dog ran after it because they were friends since spring"
TASKS = ("ioi", "capitals", "agreement", "sentiment")


@cache
def tokenizer(begin: bool = False) -> Any:
    """Return a byte-level BPE tokenizer; with `begin`, one that puts `<s>` before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    texts = [t for name in TASKS for item in task(name, n=150, seed=1) for t in (item.text, *item.wrong)]
    made.train_from_iterator([*texts, WORDS], trainer)
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def llama(begin: bool = False, seed: int = 0, context: int = 128) -> Model:
    """Return a random Llama-like language model of two blocks."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return Model(LlamaForCausalLM(config), tokenizer(begin), name="small llama")


def gpt2(seed: int = 0) -> Model:
    """Return a random GPT-2 (absolute positions) of two blocks."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer()),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return Model(GPT2LMHeadModel(config), tokenizer(), name="small gpt2")


def bert(seed: int = 0) -> Model:
    """Return a random BERT encoder of two blocks."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return Model(BertModel(config), tokenizer(), name="small bert")


def vit(classes: int = 10, seed: int = 0) -> Model:
    """Return a random image classifier for 32 x 32 pixels whose classes are the digits."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_labels=classes,
        id2label={i: str(i) for i in range(classes)},
        initializer_range=0.5,
    )
    return Model(ViTForImageClassification(config), name="small vit")
