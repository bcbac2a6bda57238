"""What the reproductions of quantization-aware training share: a small byte-level model, kept in the cache.

    model = trained_bytes(layers=2, width=128, steps=600, seed=0)

Trained once on two thirds of the bundled prose and kept as safetensors under the Actlas cache folder, found
by its settings; the rest of the text is for training and judging quantised copies.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from actlas.core.intervals import percentiles
from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.measure.likelihood import Losses
from actlas.papers.reproductions.sparse_training import CONTEXT, Text, text, train

_VERSION = 1


def prose(seed: int = 0) -> Text:
    """Return the documents to learn from and to judge on (seed 0's cut, whatever the run's seed)."""
    return text("prose", seed)


def trained_bytes(*, layers: int, width: int, steps: int, seed: int = 0) -> Model:
    """Return a byte-level Llama that was trained on the learning part of the prose.

    Args:
        layers, width: of `byte_models.byte_model` (SiLU).
        steps: of training, each 8 windows of 64 bytes.
        seed: of weights and windows.
    """
    from safetensors.torch import load_file, save_file

    from actlas.models.cache import cache_folder
    from actlas.papers.reproductions.byte_models import byte_model

    said = json.dumps([_VERSION, layers, width, steps, seed, CONTEXT])
    model = byte_model("silu", seed, layers=layers, width=width)
    file = cache_folder() / "byte-models" / f"{hashlib.sha256(said.encode()).hexdigest()[:24]}.safetensors"
    if file.is_file():
        model.module.load_state_dict(load_file(file), strict=False)
        model.module.tie_weights()  # type: ignore[operator]
    else:
        train(model, prose().learn, steps, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        work = file.with_suffix(f".{hashlib.sha256(str(id(model)).encode()).hexdigest()[:8]}.part")
        save_file({n: p.detach().contiguous() for n, p in model.module.named_parameters()}, work)
        work.replace(file)
    model.module.eval()
    return model


def copied(model: Model) -> Model:
    """Return a model with weights of its own."""
    return Model(copy.deepcopy(model.module), model.tokenizer, name=model.name)


def mean_loss(losses: Losses) -> float:
    """Return nats per byte."""
    return float(losses.nll.sum() / losses.tokens.sum())


def gap_over_seeds(
    name: str, first: Sequence[Losses], second: Sequence[Losses], *, seed: int = 0, **group: str
) -> Measurement:
    """Return how much more the first runs lose than the second, in nats per byte.

    The runs of a seed are paired and score the same documents. The interval draws documents for all runs
    together and, where there are several, seeds too.
    """
    a, b = (np.stack([r.nll for r in runs]) for runs in (first, second))
    tokens = first[0].tokens
    generator = np.random.default_rng(seed)
    seeds, documents = a.shape
    rows = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=2000)
    columns = generator.multinomial(documents, np.full(documents, 1 / documents), size=2000)
    difference = a - b
    drawn = np.einsum("rs,sd,rd->r", rows, difference, columns) / seeds / (columns @ tokens)
    low, high = percentiles(drawn, documents)
    by_seed = (difference.sum(1) / tokens.sum()).tolist()
    return Measurement(
        name,
        float(difference.mean(0).sum() / tokens.sum()),
        "nats/byte",
        documents,
        low,
        high,
        "paired bootstrap over documents and seeds" if seeds > 1 else "paired bootstrap over documents",
        seed,
        group=group,
        better="lower",
        details={"by_seed": [round(x, 5) for x in by_seed]},
    )


def loss_over_seeds(name: str, runs: Sequence[Losses], **group: str) -> Measurement:
    """Return the mean loss of runs of several seeds, nats per byte, with its spread over seeds in the
    details."""
    from actlas.measure.statistics import mean_measurement

    tokens = runs[0].tokens
    mean = np.mean([r.nll for r in runs], axis=0) / tokens
    found = mean_measurement(name, "nats/byte", mean, tokens, group=group, better="lower")
    details: dict[str, Any] = {"by_seed": [round(mean_loss(r), 5) for r in runs]}
    assert math.isfinite(found.value)
    from dataclasses import replace

    return replace(found, details=details, samples=None, weights=None)
