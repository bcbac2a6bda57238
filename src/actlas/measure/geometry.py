"""The activation atlas: what every layer's activations look like, from one streamed pass over text.

    atlas(model, corpus, *, tokens=4096, context=256, per_document=128, parts=PARTS) -> list[Measurement]

| part | measurements, each with `group["layer"]` | file |
| --- | --- | --- |
| norms | activation-norm, activation-norm-p95 (`group["site"]`) | residual |
| tails | token-kurtosis, channel-kurtosis, outlier-channels (`group["site"]`) | residual |
| massive | massive-activations | residual |
| rank | effective-rank, participation-ratio | spectrum |
| lens | logit-lens-agreement | here |
| attention | attention-entropy, attention-sink-mass | attention |

Tokens with massive activations are reported by `massive` and left out of every other part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.logit_lens import LogitLens
from actlas.core.measurement import Measurement
from actlas.measure.attention import AttentionObserver
from actlas.measure.family import Member, register_family
from actlas.measure.observing import Batch, Observer, observe, residual_sites
from actlas.measure.residual import MassiveObserver, NormObserver, TailObserver
from actlas.measure.samples import mean_measurement
from actlas.measure.spectrum import RankObserver

if TYPE_CHECKING:
    from actlas.core.model import Model

PARTS = ("norms", "tails", "massive", "rank", "lens", "attention")
_EVERY = 16  # one token in so many is put through the output head of every layer


class LensObserver(Observer):
    """How often the logit lens at a layer already has the model's own first choice.

    The output head is much of a small model's work, so only every 16th token is looked at.
    """

    def __init__(self, every: int = _EVERY) -> None:
        self.every = every
        self._seen = 0
        self._hits: dict[str, list[NDArray[np.bool_]]] = {}
        self._documents: list[NDArray[np.int64]] = []
        self._sites: list[str] = []

    def update(self, batch: Batch) -> None:
        lens = LogitLens(model=batch.model)
        self._sites = [s.name for s in residual_sites(batch.model)]
        n = len(batch.document)
        numbers = np.arange(self._seen, self._seen + n)
        self._seen += n
        chosen = torch.from_numpy((numbers % self.every == 0) & batch.ordinary)
        if not bool(chosen.any()):
            return
        self._documents.append(batch.document[chosen.numpy()])
        final: Tensor | None = None
        with torch.no_grad():
            for site in reversed(self._sites):
                guess = lens.logits(batch.rows(site)[chosen]).argmax(-1)
                final = guess if final is None else final
                self._hits.setdefault(site, []).append((guess == final).cpu().numpy())

    def results(self, seed: int) -> list[Measurement]:
        if not self._documents:
            return []
        documents = np.concatenate(self._documents)
        return [
            mean_measurement(
                "logit-lens-agreement",
                "fraction",
                np.concatenate(self._hits[site]).astype(float),
                clusters=documents,
                seed=seed,
                group={"layer": str(layer)},
                note=f"first choice of the layer is the model's own, at {len(documents):,} tokens",
            )
            for layer, site in enumerate(self._sites)
        ]


def observers(model: Model, parts: Sequence[str] = PARTS) -> list[Observer]:
    """Return the observers of the parts that make sense for a model.

    Raises:
        InputError: an unknown part.
    """
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise InputError(f"the atlas has no part {unknown[0]!r}; its parts are {', '.join(PARTS)}")
    made: list[Observer] = []
    for part in parts:
        if part == "norms":
            made.append(NormObserver())
        elif part == "tails":
            made.append(TailObserver())
        elif part == "massive":
            made.append(MassiveObserver())
        elif part == "rank":
            made.append(RankObserver())
        elif part == "attention":
            made.append(AttentionObserver())
        elif model.kind == "causal-lm" and model.unembed_module is not None:
            made.append(LensObserver())
    return made


def atlas(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    tokens: int = 4096,
    context: int = 256,
    per_document: int | None = 128,
    parts: Sequence[str] = PARTS,
) -> list[Measurement]:
    """Measure the activation atlas in one pass; see the table in the module's text.

    Args:
        model: a model with a layout and a tokenizer; installed edits apply.
        corpus: documents or strings.
        seed: of the bootstraps over documents.
        tokens: about how many tokens to read in all.
        context: length of a window; attention depends on it.
        per_document: tokens read of one document at most, about; so that there are many documents.
        parts: which parts to measure.

    Raises:
        InputError: an unknown part.
        ModelError: no layout or no tokenizer.
        NonFiniteError: NaN or infinity in the residual stream.
    """
    chosen = observers(model, parts)
    return observe(
        model, corpus, chosen, tokens=tokens, context=context, per_document=per_document, seed=seed
    )


register_family(
    atlas,
    [
        Member(
            "activation-norm",
            "median norm of activations, by layer and site",
            "L2 norm",
            {"parts": ("norms",)},
        ),
        Member("activation-norm-p95", "0.95 quantile of activation norms", "L2 norm", {"parts": ("norms",)}),
        Member(
            "token-kurtosis",
            "excess kurtosis of a token's channels",
            "excess kurtosis",
            {"parts": ("tails",)},
        ),
        Member("channel-kurtosis", "excess kurtosis of a channel", "excess kurtosis", {"parts": ("tails",)}),
        Member("outlier-channels", "channels far above the others", "channels", {"parts": ("tails",)}),
        Member("massive-activations", "tokens with massive activations", "fraction", {"parts": ("massive",)}),
        Member("effective-rank", "directions in use, by entropy", "dimensions", {"parts": ("rank",)}),
        Member("participation-ratio", "directions in use, by energy", "dimensions", {"parts": ("rank",)}),
        Member(
            "logit-lens-agreement",
            "how often a layer already has the model's first choice",
            "fraction",
            {"parts": ("lens",)},
            ("causal-lm",),
        ),
        Member("attention-entropy", "how spread attention is", "nats", {"parts": ("attention",)}),
        Member("attention-sink-mass", "attention to the first token", "fraction", {"parts": ("attention",)}),
    ],
    needs=("causal-lm", "encoder"),
    quick={"tokens": 2048},
)
