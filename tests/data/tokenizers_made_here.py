"""Small real tokenizers of the kinds that differ in how they treat spaces and numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actlas.data import task, tasks

KINDS = ("bytes", "bytes-digits", "sentencepiece", "wordpiece")


@cache
def tokenizer(kind: str) -> Any:
    """Train a tokenizer on the tasks' own texts, so that their words become tokens."""
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=6000, special_tokens=["[UNK]"], show_progress=False
        )
    elif kind == "sentencepiece":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=6000, special_tokens=["<unk>"], show_progress=False)
    else:
        made = Tokenizer(models.BPE())
        levels = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if kind == "bytes-digits":
            levels.insert(0, pre_tokenizers.Digits(individual_digits=True))
        made.pre_tokenizer = pre_tokenizers.Sequence(levels)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=6000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    texts = [
        text for name in tasks() for item in task(name, n=150, seed=1) for text in (item.text, *item.wrong)
    ]
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)
