"""Quantise a speech recogniser: calibrated on speech, the decoder on the transcripts that it gives itself.

    edit = fit_recogniser(load("whisper-tiny"), method="gptq", format="int3-g64")

The first two convolutions, embeddings and the output head keep their numbers. Encoder and decoder differ in
what they see: cross-attention takes its queries from the decoder and its keys and values from the encoder, so
every layer has moments of its own. Seconds of silence that pad a clip to 30 seconds are left out.
Edge-ASR (2025), "Edge-ASR: Towards Low-Bit Quantization of Automatic Speech Recognition Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method as registered
from actlas.measure.speech import FRAME, features, transcribe, word_error_rate
from actlas.quantize.layer_by_layer import Method, Moments, fit_layers, input_moments

if TYPE_CHECKING:
    from actlas.core.model import Model


@registered(
    "recogniser",
    room="quantize",
    returns="Edit",
    data="none",
    summary="a speech recogniser's weights (and inputs) in few bits, calibrated on spoken sentences",
    example="actlas fit recogniser whisper-tiny --method gptq --format int3-g64 -o whisper3/",
    papers=("edge-asr",),
)
def fit_recogniser(
    model: Model,
    *,
    method: Method = "gptq",
    format: str = "int4-g64",
    act: str = "",
    clips: int = 4,
    evaluate: int = 8,
    ratios: int = 20,
    alpha: float = 0.5,
    most: int = 32,
    seed: int = 0,
) -> Edit:
    """Return the edit that quantises the linear layers of an encoder-decoder that transcribes speech.

    Args:
        model: a speech model with a processor, e.g. `whisper-tiny`.
        method: `rtn`, `smoothquant`, `awq` or `gptq`.
        format, act: of weights and inputs, by name (`"int8-token-sym"`; empty: inputs stay as they are).
        clips: spoken sentences (made by eSpeak NG) to calibrate on; evaluate: others to measure on.
        ratios: exponents that `awq` tries. alpha: of `smoothquant`.
        most: tokens of a transcript.
        seed: of the sentences.

    Raises:
        InputError: formats that do not fit; the voices are not installed. ModelError: no recogniser.
    """
    from actlas.data.speech import speech

    spoken = speech(clips + evaluate, seed=seed)
    moments = speech_moments(model, [c.samples for c in spoken[:clips]], most=most)
    edit = fit_layers(model, moments, method=method, format=format, act=act, ratios=ratios, alpha=alpha)
    if not evaluate:
        return edit
    test = spoken[clips:]
    mel = features(model, [c.samples for c in test])
    base = transcribe(model, mel, most=most)
    with model.edit(edit):
        said = transcribe(model, mel, most=most)
    texts = [c.text for c in test]
    return edit.with_measurements(
        [
            word_error_rate(base, texts, group={"variant": "as it is"}, seed=seed),
            word_error_rate(said, texts, group={"variant": "quantised"}, seed=seed),
            word_error_rate(said, base, name="self-error", group={"variant": "quantised"}, seed=seed),
        ]
    )


def speech_moments(
    model: Model, samples: Sequence[NDArray[np.float32]], *, most: int = 32
) -> dict[str, Moments]:
    """Return the moments of what the layers of both towers receive for some clips at 16 kHz."""
    mel = features(model, samples)
    batches = teacher_forced(model, mel, transcribe(model, mel, most=most))
    lengths = [len(s) // FRAME + 1 for s in samples]
    longest = int(model.config.max_target_positions)
    at = iter(range(len(batches)))
    heard = [0]

    def rows(path: str, x: Tensor) -> Tensor:
        """Leave out what pads a clip; what is no longer than a transcript is all speech."""
        return (x[:, : heard[0]] if x.shape[1] > longest else x).flatten(0, -2)

    def each() -> Any:
        for batch in batches:
            heard[0] = lengths[next(at)]
            yield batch

    paths = [n for n, m in model.module.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    return input_moments(model, each(), paths, rows=rows)


def teacher_forced(model: Model, mel: Tensor, transcripts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return one batch a clip: its features, and the transcript as the decoder's input.

    Raises:
        InputError: a clip in which the model hears nothing.
    """
    tokenizer = getattr(model.processor, "tokenizer", None) or model.tokenizer
    config: Any = model.module.generation_config
    out = []
    for i, text in enumerate(transcripts):
        ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"the model hears nothing in calibration clip {i}; take another seed")
        start = [config.decoder_start_token_id]
        if getattr(config, "no_timestamps_token_id", None) is not None:
            start.append(config.no_timestamps_token_id)
        out.append({"input_features": mel[i : i + 1], "decoder_input_ids": torch.tensor([start + ids])})
    return out
