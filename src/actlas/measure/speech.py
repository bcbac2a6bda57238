"""How well a speech recogniser hears: word error rate after one fixed normalisation of text.

    WER = (substitutions + deletions + insertions) / words of the reference

Text is lower-cased, hyphens become spaces, other punctuation goes, and small numbers are written out: nothing
more, so that two runs can be compared. Decoding is greedy, with as many tokens at most as `most`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

RATE = 16_000
FRAME = 320
"""Samples of one state of Whisper's encoder."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def normalise(text: str) -> list[str]:
    """Return the words that count."""
    plain = re.sub(r"[-–—]", " ", text.lower())
    words = re.sub(r"[^\w\s']", "", plain).replace("'", "").split()
    return [_NUMBERS[int(w)] if w.isdigit() and int(w) <= 10 else w for w in words]


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the least number of substitutions, deletions and insertions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            kept = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, before + (x != y))
            before = kept
    return row[-1]


def features(model: Model, samples: Sequence[NDArray[np.float32]]) -> Tensor:
    """Return log-mel features `[clips, mel, frames]`, padded to 30 seconds as Whisper wants them.

    Raises:
        ModelError: the model has no processor for sound.
    """
    extract = getattr(model.processor, "feature_extractor", model.processor)
    if model.kind != "speech" or extract is None:
        raise ModelError(f"{model.name} is a {model.kind}; a speech recogniser with a processor is needed")
    found: Tensor = extract(list(samples), sampling_rate=RATE, return_tensors="pt")["input_features"]
    return found


def transcribe(model: Model, mel: Tensor, *, most: int = 48, batch: int = 8) -> list[str]:
    """Return greedy transcripts of features `[clips, mel, frames]`."""
    module: Any = model.module
    tokenizer = getattr(model.processor, "tokenizer", None) or model.tokenizer
    texts: list[str] = []
    for start in range(0, len(mel), batch):
        with torch.no_grad():
            part = mel[start : start + batch]
            mask = torch.ones(len(part), part.shape[-1], dtype=torch.long)
            ids = module.generate(
                input_features=part, attention_mask=mask, max_new_tokens=most, do_sample=False, num_beams=1
            )
        texts += [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return texts


def word_error_rate(
    said: Sequence[str],
    references: Sequence[str],
    *,
    name: str = "word-error-rate",
    group: dict[str, str] | None = None,
    seed: int = 0,
) -> Measurement:
    """Return the word error rate over clips, drawn by clips.

    Raises:
        InputError: not as many transcripts as references, or a reference without words.
    """
    if len(said) != len(references) or not references:
        raise InputError(f"{len(said)} transcripts for {len(references)} references; give one for each")
    words = [normalise(r) for r in references]
    if not all(words):
        raise InputError(f"reference {[bool(w) for w in words].index(False)} has no words")
    rates = [edit_distance(normalise(s), w) / len(w) for s, w in zip(said, words, strict=True)]
    return mean_measurement(
        name, "share of words", rates, [len(w) for w in words], seed=seed, over="clips", group=group,
        better="lower",
    )  # fmt: skip
