"""Image measures against direct computation; labels are only used where they are the model's classes."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from actlas.core.errors import InputError, ModelError, NonFiniteError, ShapeError
from actlas.data.pictures import ImageSet, images
from actlas.measure import vision
from actlas.measure.statistics import wilson
from actlas.measure.vision import (
    PERTURBATIONS,
    class_entropy,
    class_logits,
    confidence,
    image_measures,
    perturbation_agreement,
    top1_accuracy,
    top5_accuracy,
)

from .small_models import llama, vit


def digits(n: int = 30) -> ImageSet:
    return images("digits", n=n, size=32)


def logits_of(pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vit().module(pixel_values=pixels).logits.double()


def test_values_equal_direct_computation() -> None:
    model, data = vit(), digits()
    z = logits_of(data.pixels)
    found = {
        m.name: m for m in image_measures(model, data, groups=False) if m.name != "perturbation-agreement"
    }
    top = z.topk(5).indices
    assert found["top1-accuracy"].value == pytest.approx(float((z.argmax(-1) == data.labels).double().mean()))
    assert found["top5-accuracy"].value == pytest.approx(
        float((top == data.labels[:, None]).any(-1).double().mean())
    )
    p = z.softmax(-1)
    assert found["confidence"].value == pytest.approx(float(p.amax(-1).mean()), rel=1e-5)
    assert found["class-entropy"].value == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-4)
    assert all(m.n == 30 and m.low is not None and m.low <= m.value <= m.high for m in found.values())
    singles = (top1_accuracy, top5_accuracy, confidence, class_entropy)
    assert [f(model, data) for f in singles] == list(found.values())


def test_the_batch_does_not_matter() -> None:
    data = digits(7)
    one, many = class_logits(vit(), data.pixels, batch=1), class_logits(vit(), data.pixels, batch=7)
    assert torch.allclose(one, many, atol=1e-5) and one.shape == (7, 10)


def test_classes_partition_the_images() -> None:
    found = [m for m in image_measures(vit(), digits(60)) if m.name == "top1-accuracy"]
    whole, *parts = found
    assert len(parts) == 10 and sum(p.n for p in parts) == whole.n
    assert sum(p.value * p.n for p in parts) / 60 == pytest.approx(whole.value)
    assert {p.group["class"] for p in parts} == set("0123456789")


def test_agreement_by_perturbation() -> None:
    model, data = vit(), digits(40)
    found = {m.group["perturbation"]: m for m in perturbation_agreement(model, data)}
    assert set(found) == set(PERTURBATIONS)
    z = logits_of(data.pixels)
    flipped = logits_of(data.pixels.flip(-1))
    assert found["flip"].value == pytest.approx(float((z.argmax(-1) == flipped.argmax(-1)).double().mean()))
    assert found["flip"].value < 1
    again = {m.group["perturbation"]: m for m in perturbation_agreement(model, data)}
    assert found == again
    symmetric = replace(data, pixels=(data.pixels + data.pixels.flip(-1)) / 2)
    assert perturbation_agreement(model, symmetric, perturbations=["flip"])[0].value == 1


def test_perturbed_pixels_stay_pixels() -> None:
    pixels = digits(5).pixels
    for perturb in PERTURBATIONS.values():
        changed = perturb(pixels, torch.Generator().manual_seed(0))
        assert changed.shape == pixels.shape and not torch.equal(changed, pixels)
        assert 0 <= changed.min() and changed.max() <= 1


def test_labels_that_are_no_classes_of_the_model_give_no_accuracy() -> None:
    photos = replace(digits(5), labels=None)
    found = top1_accuracy(vit(), photos)
    assert math.isnan(found.value) and "no labels" in found.note
    animals = replace(digits(5), classes=("cat", "dog"))
    assert "not among the 12 classes" in top1_accuracy(vit(12), animals).note
    assert (
        "only 4 classes"
        in top5_accuracy(vit(4), replace(digits(5), labels=torch.arange(5) % 4, classes=tuple("0123"))).note
    )


def test_labels_are_matched_by_class_name() -> None:
    model, data = vit(), digits(40)
    order = tuple("9876543210")
    renamed = replace(data, labels=9 - data.labels, classes=order)
    assert top1_accuracy(model, renamed).value == top1_accuracy(model, data).value


def test_crops_of_one_photograph_are_one_item() -> None:
    data = digits(12)
    crops = replace(data, labels=None, names=tuple(f"{'ab'[i % 2]}, crop {i}" for i in range(12)))
    found = confidence(vit(), crops)
    assert found.n == 2 and found.interval == "bootstrap over photographs"
    assert "12 crops of 2 photographs" in found.note
    p = logits_of(data.pixels).softmax(-1).amax(-1)
    sources = sorted([float(p[::2].mean()), float(p[1::2].mean())])
    assert (found.low, found.high) == pytest.approx(sources, rel=1e-3)
    flat = replace(crops, pixels=(crops.pixels + crops.pixels.flip(-1)) / 2)
    agreement = perturbation_agreement(vit(), flat, perturbations=["flip"])[0]
    assert (agreement.low, agreement.high) == wilson(2, 2) and agreement.value == 1


def test_bad_images_and_models_are_said() -> None:
    data = digits(4)
    with pytest.raises(ModelError, match="image-classifier is needed"):
        confidence(llama(), data)
    with pytest.raises(ShapeError, match=r"not \[3, 32, 32\]"):
        confidence(vit(), replace(data, pixels=data.pixels[0]))
    with pytest.raises(InputError, match="no images"):
        confidence(vit(), replace(data, pixels=data.pixels[:0]))
    with pytest.raises(InputError, match="unknown perturbation 'blur'"):
        perturbation_agreement(vit(), data, perturbations=["blur"])
    with pytest.raises(InputError, match="4 images but 3 labels"):
        top1_accuracy(vit(), replace(data, labels=data.labels[:3]))
    model = vit()
    with torch.no_grad():
        model.module.classifier.bias[0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        confidence(model, data)


def test_images_are_encoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor takes a list of images, not a batch that looks ready for the module."""
    seen = []
    model = SimpleNamespace(
        kind="image-classifier", name="m", logits=lambda x: seen.append(type(x)) or torch.zeros(len(x), 3)
    )
    vision.class_logits(model, torch.zeros(3, 3, 8, 8), batch=2)
    assert seen == [list, list]
