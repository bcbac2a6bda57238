"""How well a model bears low-precision numbers: round-to-nearest, without any calibration or repair.

    quantizability(model, corpus, *, schemes=("w8a8", "w4-channel", "w4-g64", "a4"), tokens=4096) -> list
    output_fidelity(model, inputs, *, schemes=...) -> list[Measurement]       encoders, image classifiers
    signal_to_noise(model, inputs, scheme, *, rows=128) -> {layer name: dB}

The naive rounding is the point: it tells how far a model's own weights and activations are from being easy to
quantize, and every quantization method is to be read beside it. For a language model the number is the ratio
of perplexities, paired over documents; for other models how near the outputs stay (cosine similarity) and how
often the first choice survives. Beside it, for each layer, the signal-to-quantization-noise ratio of its
output for its *dense* input,

    SQNR = 10 log10( ||y||^2 / ||y - y_q||^2 )  dB, for each token, then averaged over tokens,

and the layers in which it is worst. Formats are described in `rounding`. A model whose weights lie on a 4-bit
grid already (GGUF files often do, in groups of 32) is not damaged by rounding to that grid: that says nothing
about it, so groups of 64 and whole channels are used here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.likelihood import nll, select
from actlas.measure.paired import perplexity_ratio
from actlas.measure.registry import measure
from actlas.measure.rounding import (
    CONVOLUTIONS,
    SCHEMES,
    Scheme,
    as_rows,
    from_rows,
    quantize_input,
    rounded,
    scheme,
    weighted_modules,
)
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

__all__ = ["SCHEMES", "Scheme", "output_fidelity", "quantizability", "rounded", "signal_to_noise"]

DEFAULT = ("w8a8", "w4-channel", "w4-g64", "a4")
_WORST = 5
_ROWS = 128  # tokens for which a layer's signal-to-noise ratio is computed
_BATCH = 16


@measure(
    "quantizability",
    summary="perplexity ratio when weights or activations are rounded to 8 or 4 bits",
    unit="ratio",
    needs=("causal-lm",),
    quick={"tokens": 1024},
)
def quantizability(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    schemes: Sequence[str | Scheme] = DEFAULT,
    tokens: int = 4096,
    context: int = 512,
    per_document: int | None = None,
    noise: bool = True,
) -> list[Measurement]:
    """Measure the perplexity ratio of each number format to the model as it is.

    Args:
        model: a causal language model; installed edits stay on in both runs.
        corpus: documents or strings.
        seed: of the bootstrap.
        schemes: formats, by name or made by hand.
        tokens, context, per_document: see `likelihood.nll`.
        noise: also compute each layer's signal-to-noise ratio on a few tokens.

    Returns:
        one `quantizability` for each scheme, `group={"format": name}`; `details` hold `sqnr` (mean over
        layers, dB), `by_layer` and the `worst` layers.

    Raises:
        InputError: an unknown format, or a model without linear layers.
    """
    chosen = [scheme(s) for s in schemes]
    _some_layers(model)
    corpus = list(corpus)
    options: dict[str, Any] = {"tokens": tokens, "context": context, "per_document": per_document}
    base = nll(model, corpus, **options)
    few = _few_tokens(model, corpus, options) if noise else None
    out = []
    for s in chosen:
        with rounded(model.module, s):
            losses = nll(model, corpus, **options)
        details = {} if few is None else _noise_details(signal_to_noise(model, few, s))
        out.append(
            perplexity_ratio(
                base,
                losses,
                name="quantizability",
                seed=seed,
                group={"format": s.name},
                note=s.describe(),
                details=details,
            )
        )
    return out


def _few_tokens(model: Model, corpus: list[Any], options: Mapping[str, Any]) -> dict[str, Tensor]:
    windows = select(model, corpus, **options).windows
    ids = max((w.ids for w in windows[:8]), key=len)[:_ROWS]
    return {"input_ids": torch.tensor([ids], device=model.device)}


def _some_layers(model: Model) -> None:
    if not weighted_modules(model.module):
        raise InputError(f"{model.name} has no linear or convolutional layers to round")


# Models without a perplexity ----------------------------------------------------------------------


def output_fidelity(
    model: Model,
    inputs: Any,
    *,
    seed: int = 0,
    schemes: Sequence[str | Scheme] = DEFAULT,
    noise: bool = True,
) -> list[Measurement]:
    """Measure how near a model's outputs stay in each number format.

    Args:
        model: an encoder, an image classifier or any module.
        inputs: texts, images `[n, 3, h, w]`, or a tensor whose first axis counts items; at least one.
        seed: of the bootstrap over items.
        schemes, noise: as in `quantizability`.

    Returns:
        for each scheme `quantized-output-cosine` (cosine similarity of an item's outputs: logits, or the
        mean of its token states) and, where the outputs are class logits, `quantized-agreement` (same first
        choice); grouped by `format`.

    Raises:
        InputError: no inputs, an unknown format, or a model without linear or convolutional layers.
    """
    chosen = [scheme(s) for s in schemes]
    _some_layers(model)
    if not len(inputs):
        raise InputError("no inputs: output fidelity needs at least one item")
    dense = item_outputs(model, inputs)
    out = []
    with progress("quantizability", len(chosen)) as advance:
        for s in chosen:
            with rounded(model.module, s):
                found = item_outputs(model, inputs)
            details = {}
            if noise:
                details = _noise_details(signal_to_noise(model, inputs[:_BATCH], s))
            cosine = torch.cosine_similarity(dense.double(), found.double(), dim=1).cpu().numpy()
            out.append(
                mean_measurement(
                    "quantized-output-cosine",
                    "cosine",
                    cosine,
                    seed=seed,
                    over="items",
                    group={"format": s.name},
                    better="higher",
                    note=s.describe(),
                    details=details,
                )
            )
            if model.kind == "image-classifier":
                same = (dense.argmax(1) == found.argmax(1)).cpu().numpy()
                out.append(
                    mean_measurement(
                        "quantized-agreement",
                        "fraction",
                        same.astype(float),
                        seed=seed,
                        over="items",
                        group={"format": s.name},
                        better="higher",
                        note=s.describe(),
                    )
                )
            advance()
    return out


@measure(
    "quantized-output-cosine",
    summary="cosine similarity of sentence embeddings when numbers are rounded to 8 or 4 bits",
    unit="cosine",
    needs=("encoder",),
    quick={"items": 48},
)
def encoder_quantizability(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    schemes: Sequence[str | Scheme] = DEFAULT,
    items: int = 256,
    characters: int = 400,
) -> list[Measurement]:
    """Measure `output_fidelity` of a text encoder on the beginnings of documents.

    Args:
        model, seed, schemes: as in `output_fidelity`.
        corpus: documents or strings.
        items: how many documents; characters: how much of each.
    """
    texts = []
    for document in corpus:
        texts.append((document if isinstance(document, str) else document.text)[:characters])
        if len(texts) == items:
            break
    return output_fidelity(model, texts, seed=seed, schemes=schemes)


@measure(
    "quantized-agreement",
    summary="how often a classifier keeps its first choice when numbers are rounded to 8 or 4 bits",
    unit="fraction",
    needs=("image-classifier",),
    data="images",
    quick={"items": 48},
)
def classifier_quantizability(
    model: Model,
    images: Any,
    *,
    seed: int = 0,
    schemes: Sequence[str | Scheme] = DEFAULT,
    items: int = 256,
) -> list[Measurement]:
    """Measure `output_fidelity` of an image classifier.

    Args:
        model, seed, schemes: as in `output_fidelity`.
        images: an ImageSet, or pixels `[n, 3, h, w]` from 0 to 1.
        items: how many of them.
    """
    pixels = getattr(images, "pixels", images)
    return output_fidelity(model, pixels[:items], seed=seed, schemes=schemes)


def _encode(model: Model, batch: Any) -> dict[str, Any]:
    """Encode items: images go through the processor one by one, other tensors as they are."""
    raw = isinstance(batch, Tensor) and not model.kind.startswith("image")
    return model.encode(batch if raw else list(batch))


def item_outputs(model: Model, inputs: Any) -> Tensor:
    """Return one vector an item: class logits, or the mean over real tokens of the last states."""
    parts = []
    for start in range(0, len(inputs), _BATCH):
        batch = inputs[start : start + _BATCH]
        encoded = _encode(model, batch)
        output = model.forward(encoded)
        value = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if value is None:
            value = getattr(output, "last_hidden_state", None)
        if not isinstance(value, Tensor):
            raise InputError(f"{model.name} returns {type(output).__name__} without logits or hidden states")
        if value.ndim == 3:
            mask = encoded.get("attention_mask")
            mask = torch.ones(value.shape[:2], device=value.device) if mask is None else mask
            weight = mask.to(value).unsqueeze(-1)
            value = (value * weight).sum(1) / weight.sum(1)
        parts.append(value.flatten(1).float())
    return torch.cat(parts)


# Signal to noise ----------------------------------------------------------------------------------


def signal_to_noise(
    model: Model, inputs: Any, chosen: str | Scheme, *, rows: int = _ROWS
) -> dict[str, float]:
    """Return the signal-to-quantization-noise ratio of each layer's output, in dB.

    Each layer is judged alone: its dense input, its output in full precision against its output with rounded
    weight and input. Tokens are averaged in dB, so that a massive token counts as one.

    Args:
        model: the model.
        inputs: anything that it encodes.
        chosen: the number format.
        rows: at most so many tokens (or images) are used in each layer.
    """
    chosen = scheme(chosen)
    found: dict[str, float] = {}
    handles = []

    def hook(name: str) -> Any:
        def judge(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in found or not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return
            found[name] = _layer_noise(part, args[0], output, chosen, rows)

        return judge

    try:
        for name, part in weighted_modules(model.module).items():
            handles.append(part.register_forward_hook(hook(name)))
        model.forward(inputs if isinstance(inputs, Mapping) else _encode(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layer_noise(part: nn.Module, x: Tensor, output: Tensor, chosen: Scheme, rows: int) -> float:
    weight = part.weight
    assert isinstance(weight, Tensor)
    if isinstance(part, CONVOLUTIONS):
        few = max(1, rows // 32)
        x, y = x[:few], output[:few]
    else:
        x, y = x.flatten(0, -2)[:rows], output.flatten(0, -2)[:rows]
    dense = weight.data
    try:
        weight.data = from_rows(part, chosen.weight(as_rows(part, dense)))
        again = part.forward(quantize_input(part, x, chosen))
    finally:
        weight.data = dense
    signal = y.flatten(1).double().square().sum(1).clamp_min(1e-300)
    noise = (again - y).flatten(1).double().square().sum(1).clamp_min(1e-30 * signal)
    return float((10 * torch.log10(signal / noise)).mean())


def _noise_details(by_layer: Mapping[str, float]) -> dict[str, Any]:
    values = np.array(list(by_layer.values()))
    worst = sorted(by_layer, key=lambda name: by_layer[name])[:_WORST]
    return {
        "sqnr": float(values.mean()) if len(values) else None,
        "worst": [[name, round(by_layer[name], 2)] for name in worst],
        "by_layer": {name: round(v, 3) for name, v in by_layer.items()},
    }
