"""Tiny randomly initialised models of many families, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "capital", "of", "france", "is", "paris"]


def gpt2() -> Any:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2))


def llama() -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**_TEXT, num_key_value_heads=1))


def bert() -> Any:
    return t.BertModel(t.BertConfig(**_TEXT))


def bert_masked() -> Any:
    return t.BertForMaskedLM(t.BertConfig(**_TEXT))


def bert_classifier() -> Any:
    return t.BertForSequenceClassification(t.BertConfig(**_TEXT))


def t5() -> Any:
    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )


def vit() -> Any:
    return t.ViTForImageClassification(t.ViTConfig(**_VISION, num_labels=3))


def vit_base() -> Any:
    return t.ViTModel(t.ViTConfig(**_VISION))


def clip() -> Any:
    return t.CLIPModel(t.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=8))


def whisper() -> Any:
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=11, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4,
            max_source_positions=8, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
    )  # fmt: skip


_TEXT = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
_VISION = {
    "image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


def save(folder: Path, build: Callable[[], Any], *, tokenizer: bool = False) -> Any:
    """Save a tiny model with fixed random weights; return it, in evaluation mode."""
    torch.manual_seed(0)
    module = build().eval()
    module.save_pretrained(folder)
    if tokenizer:
        word_tokenizer().save_pretrained(folder)
    return module


def word_tokenizer() -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    )
