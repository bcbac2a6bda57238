"""What an image classifier says: accuracy, confidence, entropy, and how much small changes matter.

    image_measures(model, images)        # all of them, from one pass plus one per perturbation
    top1_accuracy, top5_accuracy         need labels of the model's own classes
    confidence                           mean probability of the chosen class
    class_entropy                        mean entropy of the class distribution
    perturbation_agreement               same choice after a mirror flip, noise, or a brightness change

Images are the independent items; crops of one photograph count as one. Images whose labels are not
classes of the model (digits for an ImageNet classifier) have no accuracy, and the measurement says
so; confidence, entropy and agreement need no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError, ModelError, NonFiniteError, ShapeError
from actlas.core.intervals import wilson
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.registry import mark_under, measure
from actlas.measure.samples import mean_measurement, missing, rate_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.data.pictures import ImageSet

BATCH = 16
NOISE = 0.05  # standard deviation, of a range of 0 to 1
BRIGHTNESS = 1.25  # factor

Perturbation = Callable[[Tensor, torch.Generator], Tensor]


def _noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float32)
    return (pixels + NOISE * noise.to(pixels)).clamp(0, 1)


PERTURBATIONS: dict[str, Perturbation] = {
    "flip": lambda pixels, _: pixels.flip(-1),
    "noise": _noise,
    "brighter": lambda pixels, _: (pixels * BRIGHTNESS).clamp(0, 1),
    "darker": lambda pixels, _: pixels / BRIGHTNESS,
}


def class_logits(model: Model, pixels: Tensor, *, batch: int = BATCH, what: str = "images") -> Tensor:
    """Return the class logits of images.

    Args:
        model: an image classifier.
        pixels: float between 0 and 1, shape [n, 3, height, width].
        batch: images in one forward pass.
        what: for the progress line.

    Returns:
        float32 on the CPU, shape [n, classes].

    Raises:
        ModelError: not an image classifier.
        InputError, ShapeError: no images, or pixels of another shape.
        NonFiniteError: NaN or infinity in the logits.
    """
    if model.kind != "image-classifier":
        raise ModelError(f"{model.name} is a model of kind {model.kind}; an image-classifier is needed")
    if pixels.dim() != 4:
        raise ShapeError(f"images must be of shape [n, 3, height, width], not {list(pixels.shape)}")
    if not len(pixels):
        raise InputError("there are no images; at least one is needed")
    found = []
    with progress(what, total=len(pixels), unit="images") as advance:
        for some in torch.split(pixels, batch):
            logits = model.logits(list(some)).float().cpu()
            if not bool(torch.isfinite(logits).all()):
                raise NonFiniteError(f"the logits of {model.name} hold NaN or infinity")
            found.append(logits)
            advance(len(some))
    return torch.cat(found)


@mark_under
def image_measures(
    model: Model, images: ImageSet, *, seed: int = 0, groups: bool = True, batch: int = BATCH
) -> list[Measurement]:
    """Measure accuracy, confidence, entropy and the agreement under each perturbation.

    Args:
        model: an image classifier.
        images: pixels between 0 and 1 [n, 3, height, width], with labels or without.
        seed: of the bootstrap and of the noise.
        groups: also give the top-1 accuracy of each class that has images.
        batch: images in one forward pass.
    """
    logits = class_logits(model, images.pixels, batch=batch)
    out = [_top_k(model, logits, images, k, seed) for k in (1, 5)]
    if groups:
        out += _by_class(model, logits, images, seed)
    out += [_confidence(logits, images, seed), _entropy(logits, images, seed)]
    return out + _agreement(model, images, logits, PERTURBATIONS, seed, batch)


@measure(
    "top1-accuracy",
    summary="share of images whose first guess is their label",
    unit="fraction",
    needs=("image-classifier",),
    data="images",
    together=image_measures,
)
def top1_accuracy(model: Model, images: ImageSet, *, seed: int = 0, batch: int = BATCH) -> Measurement:
    """Return the top-1 accuracy, or `nan` if the labels are not classes of this model."""
    return _top_k(model, class_logits(model, images.pixels, batch=batch), images, 1, seed)


@measure(
    "top5-accuracy",
    summary="share of images whose label is among the first five guesses",
    unit="fraction",
    needs=("image-classifier",),
    data="images",
    together=image_measures,
)
def top5_accuracy(model: Model, images: ImageSet, *, seed: int = 0, batch: int = BATCH) -> Measurement:
    """Return the top-5 accuracy, or `nan` if the labels are not classes of this model."""
    return _top_k(model, class_logits(model, images.pixels, batch=batch), images, 5, seed)


@measure(
    "confidence",
    summary="mean probability of the class that was chosen",
    unit="fraction",
    needs=("image-classifier",),
    data="images",
    together=image_measures,
)
def confidence(model: Model, images: ImageSet, *, seed: int = 0, batch: int = BATCH) -> Measurement:
    """Return the mean of the greatest class probability."""
    return _confidence(class_logits(model, images.pixels, batch=batch), images, seed)


@measure(
    "class-entropy",
    summary="how undecided the class distribution is",
    unit="nats/image",
    needs=("image-classifier",),
    data="images",
    together=image_measures,
)
def class_entropy(model: Model, images: ImageSet, *, seed: int = 0, batch: int = BATCH) -> Measurement:
    """Return the mean entropy of the class distribution."""
    return _entropy(class_logits(model, images.pixels, batch=batch), images, seed)


@measure(
    "perturbation-agreement",
    summary="share of images whose first guess survives a small change of the image",
    unit="fraction",
    needs=("image-classifier",),
    data="images",
    together=image_measures,
)
def perturbation_agreement(
    model: Model,
    images: ImageSet,
    *,
    perturbations: Iterable[str] = tuple(PERTURBATIONS),
    seed: int = 0,
    batch: int = BATCH,
) -> list[Measurement]:
    """Return, for each perturbation, how often the first guess stays the same.

    Args:
        model: an image classifier.
        images: pixels between 0 and 1.
        perturbations: names of `PERTURBATIONS`.
        seed: of the noise.
        batch: images in one forward pass.
    """
    chosen = {}
    for name in perturbations:
        if name not in PERTURBATIONS:
            raise InputError(f"unknown perturbation {name!r}: one of {', '.join(PERTURBATIONS)}")
        chosen[name] = PERTURBATIONS[name]
    logits = class_logits(model, images.pixels, batch=batch)
    return _agreement(model, images, logits, chosen, seed, batch)


def _agreement(
    model: Model,
    images: ImageSet,
    logits: Tensor,
    chosen: dict[str, Perturbation],
    seed: int,
    batch: int,
) -> list[Measurement]:
    out = []
    for name, perturb in chosen.items():
        changed = perturb(images.pixels, torch.Generator().manual_seed(seed))
        again = class_logits(model, changed, batch=batch, what=f"images ({name})")
        same = (again.argmax(-1) == logits.argmax(-1)).numpy()
        out.append(_share("perturbation-agreement", same, images, seed, group={"perturbation": name}))
    return out


def _confidence(logits: Tensor, images: ImageSet, seed: int) -> Measurement:
    top = logits.double().softmax(-1).amax(-1).numpy()
    return _mean("confidence", "fraction", top, images, seed)


def _entropy(logits: Tensor, images: ImageSet, seed: int) -> Measurement:
    log_p = logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).numpy()
    return _mean("class-entropy", "nats/image", entropy, images, seed)


def _top_k(model: Model, logits: Tensor, images: ImageSet, k: int, seed: int) -> Measurement:
    name = f"top{k}-accuracy"
    labels, note = _labels(model, images, logits.shape[-1])
    if labels is None:
        return missing(name, "fraction", note)
    if logits.shape[-1] <= k:
        return missing(name, "fraction", f"the model has only {logits.shape[-1]} classes")
    top = logits.topk(k).indices.numpy()
    hits = (top == labels[:, None]).any(-1)
    return _share(name, hits, images, seed, details={"chance": k / logits.shape[-1]})


def _mean(
    name: str, unit: str, values: NDArray[np.float64], images: ImageSet, seed: int, **more: Any
) -> Measurement:
    """Return the mean over images; crops of one photograph are one independent item."""
    sources = [str(n).split(", crop ")[0] for n in images.names]
    if len(set(sources)) == len(sources) or len(sources) != len(values):
        return mean_measurement(name, unit, values, seed=seed, over="images", **more)
    note = f"{len(sources)} crops of {len(set(sources))} photographs, which are the independent items"
    return mean_measurement(
        name, unit, values, seed=seed, over="photographs", clusters=sources, note=note, **more
    )


def _share(name: str, hits: NDArray[np.bool_], images: ImageSet, seed: int, **more: Any) -> Measurement:
    """Return the share of images that are hits: Wilson's interval, or a bootstrap over photographs."""
    found = _mean(name, "fraction", hits.astype(np.float64), images, seed, better="higher", **more)
    if "clusters" not in found.details:
        return rate_measurement(name, hits, seed=seed, better="higher", **more)
    if found.value in (0.0, 1.0):  # no draw can differ; so few photographs prove little
        low, high = wilson(found.value * found.n, found.n)
        return replace(found, low=low, high=high, interval="wilson over photographs")
    return found


def _by_class(model: Model, logits: Tensor, images: ImageSet, seed: int) -> list[Measurement]:
    labels, _ = _labels(model, images, logits.shape[-1])
    if labels is None or len(np.unique(labels)) < 2:
        return []
    hits = logits.argmax(-1).numpy() == labels
    names = _class_names(model)
    return [
        rate_measurement(
            "top1-accuracy",
            hits[labels == c],
            seed=seed,
            better="higher",
            group={"class": names.get(int(c), str(c))},
        )
        for c in np.unique(labels)
    ]


def _labels(model: Model, images: ImageSet, classes: int) -> tuple[NDArray[np.int64] | None, str]:
    """Return labels as numbers of the model's classes, or `None` and the reason."""
    if images.labels is None:
        return None, "the images have no labels"
    labels = np.asarray(images.labels).astype(np.int64)
    if len(labels) != len(images.pixels):
        raise InputError(f"there are {len(images.pixels)} images but {len(labels)} labels")
    theirs = [str(name) for name in getattr(images, "classes", ()) or ()]
    ours = {name.casefold(): number for number, name in _class_names(model).items()}
    if theirs and all(name.casefold() in ours for name in theirs) and labels.max() < len(theirs):
        table = np.array([ours[name.casefold()] for name in theirs])
        return table[labels], ""
    if labels.min() >= 0 and labels.max() < classes and (len(theirs) == classes or not theirs):
        return labels, ""
    return None, f"the labels are not among the {classes} classes of this model"


def _class_names(model: Model) -> dict[int, str]:
    table: Any = getattr(model.config, "id2label", None) or {}
    return {int(number): str(name) for number, name in table.items()}
