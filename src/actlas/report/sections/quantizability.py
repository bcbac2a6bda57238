"""How a model bears low-precision numbers, rounded to the nearest without calibration or repair."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actlas.core.measurement import Measurement
from actlas.report.content import DataUse, Figure, SectionResult, Table, Tile, plain, show_number
from actlas.report.example import image_side
from actlas.report.plots import Row, dots, lines
from actlas.report.predictions import data_hash
from actlas.report.registry import Context, section

FORMATS = {
    "w8a8": "8-bit weights and activations",
    "w4-channel": "4-bit weights, one scale a channel",
    "w4-g64": "4-bit weights, one scale for 64",
    "a4": "4-bit activations",
}
"""Formats on the card, from mild to harsh, and what they are called there."""


@section(
    "quantizability",
    title="Quantizability",
    order=60,
    needs=("causal-lm", "encoder", "image-classifier"),
    cost=2.2,
)
def quantizability(context: Context) -> SectionResult:
    """Round weights or activations and measure the damage beside the model as it is."""
    found, data, what = _measure(context)
    headline = [m for m in found if m.name in ("quantizability", "quantized-output-cosine")]
    kept = [m for m in found if m.name == "quantized-agreement"]
    language = context.model.kind == "causal-lm"
    rows = [Row.of(m, FORMATS[m.group["format"]], reference=1.0) for m in headline]
    figures = [
        dots(
            "Damage by format",
            f"{what[0].upper()}{what[1:]} in each format, with 95% intervals; the tick at 1 is no damage.",
            rows,
            axis=what,
            reference="no damage",
            log=language,
            wide=True,
        )
    ]
    if kept:
        figures.append(
            dots(
                "Same first choice",
                "Share of images whose first guess stays the same in each format, with 95% intervals.",
                [Row.of(m, FORMATS[m.group["format"]]) for m in kept],
                axis="same first guess",
                domain=(0, 1),
                percent=True,
            )
        )
    figures += [f for f in [_noise(headline)] if f]
    by_format = {m.group["format"]: m for m in headline}
    mild, harsh = by_format["w8a8"], by_format["w4-channel"]
    intro = (
        "Every linear and convolutional layer is rounded to the nearest number of a format, without "
        "calibration or repair. Methods that calibrate do better; this says how far the model itself "
        f"is from being easy to round. At 8 bits the {what} is {show_number(mild.value)}, with 4-bit "
        f"weights {show_number(harsh.value)}."
    )
    notes = []
    if "gguf" in context.model.source.lower() or "smollm2" in context.model.source.lower():
        notes.append(
            "These weights were unpacked from a 4-bit file (groups of 32), so rounding them to 4 bits "
            "in other groups damages them less than it would the original weights."
        )
    tile = Tile("8-bit rounding" if language else "8-bit fidelity", mild, remark=what, rank=34)
    tiles = [tile, Tile("4-bit weights", harsh, remark=f"{what}, one scale a channel", rank=36)]
    shown = [_without_layers(m) for m in found]
    tables = [t for t in [_worst(headline)] if t]
    return SectionResult(intro, shown, figures, tables, notes, tiles, data)


def _measure(context: Context) -> tuple[list[Measurement], list[DataUse], str]:
    """Return the measurements, the data, and what the headline number is."""
    from actlas.measure.quantizability import output_fidelity
    from actlas.measure.quantizability import quantizability as measure_quantizability

    model, budget, seed = context.model, context.budget, context.seed
    schemes = tuple(FORMATS)
    if model.kind == "image-classifier":
        from actlas.data import images

        pictures = images("photos", n=min(16, budget.images), size=image_side(model), seed=seed)
        found = output_fidelity(model, pictures.pixels, seed=seed, schemes=schemes)
        used = DataUse(
            pictures.name, len(pictures), "images", data_hash([pictures.pixels.numpy().tobytes().hex()])
        )
        return found, [used], "cosine of the class scores"
    from actlas.data import corpus

    text = corpus("mixed", seed=seed)
    if model.kind == "encoder":
        some = text.take(min(budget.pairs, len(text)))
        length = min(400, (model.context_length or 800) // 2)  # characters; a token is seldom less than one
        found = output_fidelity(model, [d.text[:length] for d in some], seed=seed, schemes=schemes)
        return (
            found,
            [DataUse("mixed", len(some), "documents", some.hash, text.source)],
            "cosine of the embeddings",
        )
    found = measure_quantizability(
        model,
        text,
        seed=seed,
        schemes=schemes,
        tokens=budget.quantize_tokens,
        per_document=64 if budget.quick else None,
    )
    some = text.take(max(1, min(found[0].n, len(text))))
    return found, [DataUse("mixed", len(some), "documents", some.hash, text.source)], "perplexity ratio"


def _noise(found: Sequence[Measurement]) -> Figure | None:
    """Signal-to-noise ratio of layer outputs, the layers of one block taken together."""
    series: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for m in found:
        by_block: dict[int, list[float]] = {}
        layers: Mapping[str, float] = m.details.get("by_layer", {})
        for name, ratio in layers.items():
            number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
            if number and math.isfinite(ratio):
                by_block.setdefault(int(number.group(1)), []).append(ratio)
        points: list[tuple[float, float, float | None, float | None]] = [
            (block, sum(r) / len(r), min(r), max(r)) for block, r in sorted(by_block.items())
        ]
        if len(points) > 1:
            series[FORMATS[m.group["format"]]] = points
    if not series:
        return None
    text = (
        "How much louder each block's layers are than their rounding error: 20 dB is an error of a "
        "tenth. The line is the mean of a block's layers, the band goes from its worst to its best "
        "layer."
    )
    return lines("Rounding noise by block", text, series, x="block", y="signal to noise, dB", wide=True)


def _worst(found: Sequence[Measurement]) -> Table | None:
    rows = []
    for m in found:
        worst: Sequence[Any] = m.details.get("worst", ())
        if worst and m.details.get("sqnr") is not None:
            said = "; ".join(f"`{plain(name)}` {ratio:.1f} dB" for name, ratio in worst[:3])
            rows.append((FORMATS[m.group["format"]], f"{m.details['sqnr']:.1f} dB", said))
    return Table("Layers that suffer most", ("Format", "Mean", "Worst layers"), tuple(rows)) if rows else None


def _without_layers(m: Measurement) -> Measurement:
    """The plot holds the layers; a copy in every number would only make card.json large."""
    return replace(m, details={k: v for k, v in m.details.items() if k != "by_layer"})
