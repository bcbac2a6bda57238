"""Small random models that read text: every character is a token."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from actlas.core.model import Model
from tests.core.families import BY_NAME

_CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + " .,;!?-'\n"


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character, ids 0 to 66."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {t: i for i, t in enumerate([*special, *_CHARACTERS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny(family: str = "llama") -> Model:
    """Return a random model of a family that reads text; the same weights every time."""
    model = BY_NAME[family].model()
    return Model(model.module, tokenizer(), name=f"tiny-{family}")


TEXTS = [
    "The committee met on Tuesday to discuss the new bridge.",
    "Nobody agreed!",
    "It was raining; the river had risen, and the papers were full of it.",
    "We will come back to this when the weather is better, he said.",
    "Why",
    "A second paragraph about nothing in particular, only somewhat longer than the first one was.",
]
