"""How well a language model predicts text, and how far edits move it.

    language_measures(model, corpus, tokens=4096)   # the four below from one pass, per group too
    perplexity(model, corpus)        exp(sum nll / sum tokens)
    loss_per_byte(model, corpus)     sum nll / (ln 2 * sum bytes), bits per byte
    next_token_accuracy(model, corpus)
    output_entropy(model, corpus)

    divergence_measures(model, corpus)   # the two below from one pass with and one without the edits
    kl_to_base(model, corpus)        mean over tokens of KL(base || edited)
    top1_agreement(model, corpus)    tokens at which base and edited have the same greatest logit

Documents are the independent items: an interval is a bootstrap over documents, each with all its
tokens. Loss per byte compares models with different tokenizers; perplexity does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.measurement import Better, Measurement
from actlas.measure.likelihood import Losses, nll
from actlas.measure.registry import mark_under, measure
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.core.model import Model

TOKENS = 16_384
QUICK = {"tokens": 4096}
_UNTOUCHED = "no edit is installed, so the model is its own base"


_Slice = tuple[dict[str, str], NDArray[np.int64]]


@dataclass(frozen=True)
class _Quantity:
    """How one measure reads `Losses`: a ratio of two sums over documents."""

    name: str
    unit: str
    top: str
    bottom: str = "tokens"
    scale: float = 1.0
    transform: str | None = None
    better: Better | None = None


_LANGUAGE = (
    _Quantity("perplexity", "perplexity", "nll", transform="exp", better="lower"),
    _Quantity("loss-per-byte", "bits/byte", "nll", "bytes", scale=1 / math.log(2), better="lower"),
    _Quantity("next-token-accuracy", "fraction", "hits", better="higher"),
    _Quantity("output-entropy", "nats/token", "entropy"),
)
_DIVERGENCE = (
    _Quantity("kl-to-base", "nats/token", "divergence", better="lower"),
    _Quantity("top1-agreement", "fraction", "agreement", better="higher"),
)


@mark_under
def language_measures(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = TOKENS,
    context: int = 512,
    stride: int | None = None,
    seed: int = 0,
    groups: bool = True,
) -> list[Measurement]:
    """Measure perplexity, loss per byte, next-token accuracy and output entropy in one pass.

    Args:
        model: a causal language model.
        corpus: documents or strings.
        tokens: about how many tokens to read; `None` reads everything.
        context, stride: window length and step, in tokens (see `likelihood.nll`).
        seed: of the bootstrap.
        groups: also give each measure for every value of every document label.

    Returns:
        The four measures over all documents, then the four for each group.

    Raises:
        InputError, ModelError, NonFiniteError: see `likelihood.nll`.
    """
    losses = nll(model, corpus, tokens=tokens, context=context, stride=stride)
    return _read(losses, _LANGUAGE, seed, groups)


@mark_under
def divergence_measures(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = TOKENS,
    context: int = 512,
    stride: int | None = None,
    seed: int = 0,
    groups: bool = True,
) -> list[Measurement]:
    """Measure how the installed edits change the predictions: KL to base and top-1 agreement.

    Each batch is run twice, with the edits and without them (`model.without_edits()`). Without any
    edit installed nothing is run: the divergence is 0 and the agreement 1 by definition.
    """
    if not model.installed:
        exact = (("kl-to-base", 0.0), ("top1-agreement", 1.0))
        units = {q.name: (q.unit, q.better) for q in _DIVERGENCE}
        return [
            Measurement(name, value, units[name][0], n=0, better=units[name][1], note=_UNTOUCHED)
            for name, value in exact
        ]
    losses = nll(model, corpus, tokens=tokens, context=context, stride=stride, against_base=True)
    return _read(losses, _DIVERGENCE, seed, groups)


@measure(
    "perplexity",
    summary="how many tokens the model hesitates between, on average, on real text",
    unit="perplexity",
    needs=("causal-lm",),
    data="corpus",
    quick=QUICK,
    together=language_measures,
)
def perplexity(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = TOKENS,
    context: int = 512,
    stride: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Return `exp` of the mean negative log-likelihood of a token; arguments as `language_measures`."""
    return _one("perplexity", nll(model, corpus, tokens=tokens, context=context, stride=stride), seed)


@measure(
    "loss-per-byte",
    summary="bits that the model needs for a byte of text; comparable between tokenizers",
    unit="bits/byte",
    needs=("causal-lm",),
    data="corpus",
    quick=QUICK,
    together=language_measures,
)
def loss_per_byte(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = TOKENS,
    context: int = 512,
    stride: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Return the negative log-likelihood per UTF-8 byte, in bits; arguments as `language_measures`."""
    return _one("loss-per-byte", nll(model, corpus, tokens=tokens, context=context, stride=stride), seed)


@measure(
    "next-token-accuracy",
    summary="share of tokens that were the model's first guess",
    unit="fraction",
    needs=("causal-lm",),
    data="corpus",
    quick=QUICK,
    together=language_measures,
)
def next_token_accuracy(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = TOKENS,
    context: int = 512,
    stride: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Return the share of tokens with the greatest logit; arguments as `language_measures`."""
    losses = nll(model, corpus, tokens=tokens, context=context, stride=stride)
    return _one("next-token-accuracy", losses, seed)


@measure(
    "output-entropy",
    summary="how undecided the model's next-token distribution is",
    unit="nats/token",
    needs=("causal-lm",),
    data="corpus",
    quick=QUICK,
    together=language_measures,
)
def output_entropy(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = TOKENS,
    context: int = 512,
    stride: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Return the mean entropy of the predicted distributions; arguments as `language_measures`."""
    return _one("output-entropy", nll(model, corpus, tokens=tokens, context=context, stride=stride), seed)


@measure(
    "kl-to-base",
    summary="how far the installed edits move the model's predictions",
    unit="nats/token",
    needs=("causal-lm",),
    data="corpus",
    quick=QUICK,
    together=divergence_measures,
)
def kl_to_base(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = TOKENS,
    context: int = 512,
    stride: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Return the mean `KL(base || edited)` of a token; arguments as `divergence_measures`."""
    return divergence_measures(
        model, corpus, tokens=tokens, context=context, stride=stride, seed=seed, groups=False
    )[0]


@measure(
    "top1-agreement",
    summary="share of tokens at which the edited and the base model guess the same",
    unit="fraction",
    needs=("causal-lm",),
    data="corpus",
    quick=QUICK,
    together=divergence_measures,
)
def top1_agreement(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = TOKENS,
    context: int = 512,
    stride: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Return how often base and edited have the same first guess; arguments as `divergence_measures`."""
    return divergence_measures(
        model, corpus, tokens=tokens, context=context, stride=stride, seed=seed, groups=False
    )[1]


def _one(name: str, losses: Losses, seed: int) -> Measurement:
    return _read(losses, [q for q in _LANGUAGE if q.name == name], seed, groups=False)[0]


def _read(losses: Losses, quantities: Iterable[_Quantity], seed: int, groups: bool) -> list[Measurement]:
    slices: list[_Slice] = [({}, np.arange(len(losses.ids)))] + (
        list(_slices(losses.groups)) if groups else []
    )
    return [_quantity(losses, q, rows, group, seed) for group, rows in slices for q in quantities]


def _quantity(
    losses: Losses, q: _Quantity, rows: NDArray[np.int64], group: Mapping[str, str], seed: int
) -> Measurement:
    top, bottom = getattr(losses, q.top)[rows], getattr(losses, q.bottom)[rows]
    if not np.isfinite(bottom).all():
        note = "this tokenizer does not say which characters a token stands for (no offsets)"
        return missing(q.name, q.unit, note, group=group)
    return mean_measurement(
        q.name,
        q.unit,
        np.divide(top * q.scale, bottom, out=np.zeros(len(rows)), where=bottom > 0),
        bottom,
        seed=seed,
        transform=q.transform,
        better=q.better,
        group=group,
        note=losses.note if not group else f"{int(losses.tokens[rows].sum()):,} tokens",
        details={"tokens": int(losses.tokens[rows].sum()), "context": losses.context},
    )


def _slices(groups: tuple[Mapping[str, str], ...]) -> Iterator[_Slice]:
    """Yield each label and value with the documents that carry it."""
    for key in sorted({k for g in groups for k in g}):
        for value in sorted({g[key] for g in groups if key in g}):
            yield {key: value}, np.array([i for i, g in enumerate(groups) if g.get(key) == value])
