"""What an image classifier does with images: accuracy where labels fit, confidence, stability."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from actlas.core.measurement import Measurement
from actlas.report.content import DataUse, SectionResult, Table, Tile
from actlas.report.example import image_side
from actlas.report.plots import Row, dots
from actlas.report.registry import Context, section

if TYPE_CHECKING:
    from torch import Tensor

    from actlas.data import ImageSet

SHOWN = 8
"""Photographs whose first guesses are listed."""


@section("images", title="Results on images", order=30, needs=("image-classifier",), cost=2.0)
def images(context: Context) -> SectionResult:
    """Classify photographs, and digits if the classes fit, and again after small changes."""
    from actlas.data import images as load_images
    from actlas.measure.vision import class_logits, image_measures

    model = context.model
    sets = _sets(context, load_images)
    measurements: list[Measurement] = []
    tables: list[Table] = []
    data: list[DataUse] = []
    for pictures in sets:
        found = image_measures(model, pictures, seed=context.seed)
        measurements += [m.with_group(images=pictures.name) for m in found]
        digest = hashlib.sha256(np.ascontiguousarray(pictures.pixels.numpy()).tobytes()).hexdigest()
        data.append(
            DataUse(pictures.name, len(pictures), "images", digest, "scikit-learn and scikit-image samples")
        )
        if pictures.name == "photos":
            logits = class_logits(model, pictures.pixels[:SHOWN])
            tables.append(_guesses(context, logits, pictures.names))
    stability = [m for m in measurements if m.name == "perturbation-agreement"]
    accuracy = [m for m in measurements if m.name == "top1-accuracy" and math.isfinite(m.value)]
    figures = [
        dots(
            "Stability of the first guess",
            "Share of images whose first guess survives a small change of the image, with 95% intervals.",
            [Row.of(m, f"{m.group['images']}: {m.group['perturbation']}") for m in stability],
            axis="same first guess",
            domain=(0, 1),
            percent=True,
        )
    ]
    by_class = [m for m in accuracy if "class" in m.group]
    if by_class:
        figures.append(
            dots(
                "Accuracy by class",
                "Share of images whose first guess is their label, class by class, with 95% intervals.",
                [Row.of(m, m.group["class"]) for m in by_class],
                axis="accuracy",
                domain=(0, 1),
                percent=True,
            )
        )
    tiles = [
        Tile("Accuracy", m, remark=m.group["images"], rank=10) for m in accuracy if "class" not in m.group
    ]
    flips = [m for m in stability if m.group["perturbation"] == "noise"]
    tiles += [Tile("Stable under noise", m, remark=m.group["images"], rank=12) for m in flips[:1]]
    confident = [m for m in measurements if m.name == "confidence"]
    tiles += [Tile("Confidence", m, remark=m.group["images"], rank=14) for m in confident[:1]]
    intro = (
        "Pixels between 0 and 1 go through the model's own preprocessing. "
        + (
            ""
            if accuracy
            else "No labelled images with this model's classes are at hand, so accuracy is not measured. "
        )
        + "Confidence is the probability of the first guess; stability is whether a mirror image, noise or "
        "another "
        "brightness changes it."
    )
    return SectionResult(intro, measurements, figures, tables, (), tiles, data)


def _sets(context: Context, load_images: object) -> list[ImageSet]:
    assert callable(load_images)
    n = context.budget.images
    size = image_side(context.model)
    sets = [load_images("photos", n=n, size=size, seed=context.seed)]
    names = getattr(context.model.config, "id2label", None) or {}
    if {str(v) for v in names.values()} >= set("0123456789"):
        sets.insert(0, load_images("digits", n=n * 4, size=size, seed=context.seed))
    return sets


def _guesses(context: Context, logits: Tensor, names: Sequence[str]) -> Table:
    labels = getattr(context.model.config, "id2label", None) or {}
    p = logits.double().softmax(-1)
    top = p.topk(min(3, p.shape[-1]))
    rows = []
    for name, values, classes in zip(names, top.values.tolist(), top.indices.tolist(), strict=False):
        said = [
            f"{labels.get(c, labels.get(str(c), f'class {c}'))} ({v:.0%})"
            for v, c in zip(values, classes, strict=True)
        ]
        rows.append((name, "; ".join(said)))
    return Table("First guesses", ("Photograph", "Guesses (probability)"), tuple(rows))
