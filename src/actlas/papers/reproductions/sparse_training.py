"""What the reproductions of trained sparsity share: byte-level models, text, and one way to score them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.measure.likelihood import Losses
from actlas.measure.paired import loss_rise
from actlas.measure.statistics import paired_difference

LR, BATCH, CONTEXT = 2e-3, 8, 64


class Text(NamedTuple):
    """Documents to learn from and to judge on."""

    learn: list[Any]
    test: list[Any]


class Score(NamedTuple):
    """Losses on held-out text and the share of MLP activations that are exactly zero."""

    losses: Losses
    zeros: float
    by_layer: list[float]


def text(name: str, seed: int) -> Text:
    """Return a bundled corpus in two parts."""
    from actlas.data import corpus

    learn, test = corpus(name, seed=seed).split(0.85, seed=seed)
    return Text(list(learn), list(test))


def train(
    model: Model,
    documents: Sequence[Any],
    steps: int,
    seed: int,
    *,
    penalties: Sequence[Any] = (),
    parameters: Sequence[Any] | None = None,
    lr: float = LR,
    rate: Any = None,
) -> list[float]:
    """Train a byte model in place on random windows."""
    from actlas.training.language_loop import corpus_tokens, train_language, windows

    drawn = windows(
        corpus_tokens(model, documents, CONTEXT), steps=steps, batch=BATCH, context=CONTEXT, seed=seed
    )
    chosen = list(model.module.parameters()) if parameters is None else list(parameters)
    return train_language(
        model,
        drawn,
        chosen,
        steps=steps,
        lr=lr,
        rate=rate,
        penalties=penalties,
        what=f"training {model.name}",
    )


def clone(model: Model) -> Model:
    """Return a copy with weights of its own."""
    return Model(copy.deepcopy(model.module), model.tokenizer, name=model.name)


def score(model: Model, documents: Sequence[Any], tokens: int) -> Score:
    """Score held-out text as the model is, with its installed edits."""
    from actlas.measure.cett import mlp_sites
    from actlas.measure.likelihood import nll
    from actlas.measure.sparse_edits import count_active

    with count_active(model, mlp_sites(model)) as active:
        losses = nll(model, documents, tokens=tokens, context=CONTEXT)
    return Score(losses, 1 - active.ratio, [1 - r for r in active.per_site.values()])


def loss(found: Score, name: str = "loss", **group: str) -> Measurement:
    """Return nats per byte with its interval over documents."""
    from actlas.measure.statistics import mean_measurement

    losses = found.losses
    return mean_measurement(
        name, "nats/byte", losses.nll / losses.tokens, losses.tokens, group=group, better="lower"
    )


def zeros(found: Score, **group: str) -> Measurement:
    """Return the share of exact zeros, mean over layers; the layers are in the details."""
    return Measurement(
        "zero rate",
        found.zeros,
        "fraction",
        int(found.losses.tokens.sum()),
        group=group,
        better="higher",
        details={"by_layer": [round(z, 4) for z in found.by_layer]},
    )


def rise(base: Score, other: Score, name: str, **group: str) -> Measurement:
    """Return the rise of the loss from one run to another, paired over documents."""
    value, _ = loss_rise(base.losses, other.losses)
    drawn = paired_difference(
        base.losses.nll / base.losses.tokens, other.losses.nll / other.losses.tokens, base.losses.tokens
    )
    return Measurement(
        name,
        value,
        "nats/byte",
        len(base.losses.tokens),
        drawn.low,
        drawn.high,
        "paired bootstrap over documents",
        0,
        group=group,
        better="lower",
    )
