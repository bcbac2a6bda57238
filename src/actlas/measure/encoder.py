"""Whether a sentence encoder puts like sentences together, and how much of its space it uses.

    encoder_measures(model)              # all of them
    embedding_separation(model)          how often a paraphrase is nearer than a different sentence (AUC)
    embedding_similarity(model)          mean cosine of each kind of pair
    embedding_anisotropy(model)          mean cosine of two sentences drawn at random
    embedding_dimension(model)           (sum of variances)^2 / sum of squared variances

A sentence is the mean of its tokens' last hidden states (padding left out), divided by its length.

The pairs come from templates: a *paraphrase* says one fact twice in other words, a *hard* pair says
another fact in the same words, an *unrelated* pair says something else altogether. Hard pairs show
an encoder that only compares words. Give `pairs=` to use your own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.intervals import bootstrap_statistic
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.registry import mark_under, measure
from actlas.measure.samples import mean_measurement, missing
from actlas.measure.statistics import auc

if TYPE_CHECKING:
    from actlas.core.model import Model

Kind = Literal["paraphrase", "hard", "unrelated"]
KINDS: tuple[Kind, ...] = ("paraphrase", "hard", "unrelated")
BATCH = 32
PAIRS = 64

# Two ways to say one thing, and what to say it about.
_TEMPLATES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "The capital of {0} is {1}.",
        "{1} is the city from which {0} is governed.",
        (
            ("France", "Paris"),
            ("Japan", "Tokyo"),
            ("Kenya", "Nairobi"),
            ("Peru", "Lima"),
            ("Egypt", "Cairo"),
            ("Canada", "Ottawa"),
            ("Norway", "Oslo"),
            ("India", "New Delhi"),
        ),
    ),
    (
        "{0} gave {1} a book.",
        "{1} received a book from {0}.",
        (
            ("Mary", "John"),
            ("John", "Mary"),
            ("Anna", "Peter"),
            ("Peter", "Anna"),
            ("the teacher", "a student"),
            ("a student", "the teacher"),
        ),
    ),
    (
        "The film was {0} and the acting was {1}.",
        "What a {0} movie, with {1} performances!",
        (
            ("wonderful", "superb"),
            ("terrible", "wooden"),
            ("boring", "flat"),
            ("exciting", "brilliant"),
            ("sad", "moving"),
            ("silly", "lazy"),
        ),
    ),
    (
        "{0} is heavier than {1}.",
        "{1} weighs less than {0}.",
        (
            ("An elephant", "a horse"),
            ("A truck", "a bicycle"),
            ("Gold", "aluminium"),
            ("A stone", "a feather"),
            ("A whale", "a shark"),
            ("Lead", "wood"),
        ),
    ),
    (
        "You need {0} to {1}.",
        "Without {0} it is impossible to {1}.",
        (
            ("flour", "bake bread"),
            ("a password", "open this account"),
            ("a licence", "drive a car"),
            ("strings", "play the violin"),
            ("a compiler", "build the program"),
            ("patience", "teach a child"),
        ),
    ),
    (
        "The meeting was moved from {0} to {1}.",
        "We will meet on {1} instead of {0}.",
        (
            ("Monday", "Tuesday"),
            ("Tuesday", "Friday"),
            ("Friday", "Monday"),
            ("Wednesday", "Thursday"),
            ("Thursday", "Sunday"),
            ("Sunday", "Wednesday"),
        ),
    ),
)


@dataclass(frozen=True)
class TextPair:
    """Two sentences and what they are to each other."""

    left: str
    right: str
    kind: Kind


def text_pairs(n: int = PAIRS, *, seed: int = 0) -> list[TextPair]:
    """Return up to `n` pairs of each kind, made from the templates; the same for the same seed."""
    if n < 2:
        raise InputError(f"at least 2 pairs of each kind are needed, not {n}")
    said = [
        (t, one.format(*f), other.format(*f)) for t, (one, other, fill) in enumerate(_TEMPLATES) for f in fill
    ]
    said = [(t, a[0].upper() + a[1:], b[0].upper() + b[1:]) for t, a, b in said]
    draw = random.Random(f"text pairs {seed}")
    out = [TextPair(a, b, "paraphrase") for _, a, b in draw.sample(said, min(n, len(said)))]
    same = [(p[1], q[2]) for p in said for q in said if p[0] == q[0] and p is not q]
    other = [(p[1], q[2]) for p in said for q in said if p[0] != q[0]]
    out += [TextPair(a, b, "hard") for a, b in draw.sample(same, min(n, len(same)))]
    return out + [TextPair(a, b, "unrelated") for a, b in draw.sample(other, min(n, len(other)))]


def embed(model: Model, texts: Sequence[str], *, batch: int = BATCH) -> NDArray[np.float64]:
    """Return one unit vector a text: the normalised mean of its tokens' last hidden states, [n, d].

    Raises:
        ModelError: the model returns no hidden states.
        InputError: no texts, or an empty one.
        NonFiniteError: NaN or infinity in an embedding.
    """
    if not texts:
        raise InputError("there are no texts to embed; at least one is needed")
    empty = next((i for i, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise InputError(f"text {empty} is empty; an embedding needs at least one token")
    found = []
    with progress("embeddings", total=len(texts), unit="texts") as advance:
        for start in range(0, len(texts), batch):
            inputs = model.encode(list(texts[start : start + batch]), padding_side="right", truncate=True)
            states = _last_states(model, inputs)
            mask = inputs["attention_mask"].to(states.device)[..., None]
            mean = (states.double() * mask).sum(1) / mask.sum(1)
            found.append((mean / mean.norm(dim=-1, keepdim=True)).cpu())
            advance(len(mask))
    vectors: NDArray[np.float64] = torch.cat(found).numpy()
    if not np.isfinite(vectors).all():
        raise NonFiniteError(f"an embedding of {model.name} holds NaN or infinity, or is zero")
    return vectors


def _last_states(model: Model, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the last hidden states, `[batch, pos, d]`; a head's output is passed over."""
    states = getattr(model.forward(inputs), "last_hidden_state", None)
    if states is None:
        layers = getattr(model.forward(inputs, output_hidden_states=True), "hidden_states", None)
        if not layers:
            raise ModelError(f"{model.name} returns no hidden states, so it cannot embed a sentence")
        states = layers[-1]
    return torch.as_tensor(states)


@mark_under
def encoder_measures(
    model: Model, pairs: Sequence[TextPair] | None = None, *, seed: int = 0, batch: int = BATCH
) -> list[Measurement]:
    """Measure separation, similarities, anisotropy and effective dimension from one pass."""
    found = _Embedded(model, _given(pairs, seed), batch)
    return [
        *found.separation(seed),
        *found.similarity(seed),
        found.anisotropy(seed),
        found.dimension(seed),
    ]


@measure(
    "embedding-separation",
    summary="how often a paraphrase is nearer than a sentence that means something else",
    unit="AUC",
    needs=("encoder",),
    data="pairs",
    together=encoder_measures,
)
def embedding_separation(
    model: Model, pairs: Sequence[TextPair] | None = None, *, seed: int = 0, batch: int = BATCH
) -> list[Measurement]:
    """Return the AUC of the cosine, paraphrases against hard and against unrelated pairs."""
    return _Embedded(model, _given(pairs, seed), batch).separation(seed)


@measure(
    "embedding-similarity",
    summary="mean cosine of paraphrases, of hard and of unrelated pairs",
    unit="cosine",
    needs=("encoder",),
    data="pairs",
    together=encoder_measures,
)
def embedding_similarity(
    model: Model, pairs: Sequence[TextPair] | None = None, *, seed: int = 0, batch: int = BATCH
) -> list[Measurement]:
    """Return the mean cosine of each kind of pair."""
    return _Embedded(model, _given(pairs, seed), batch).similarity(seed)


@measure(
    "embedding-anisotropy",
    summary="mean cosine of two sentences drawn at random; near 1 means one narrow cone",
    unit="cosine",
    needs=("encoder",),
    data="pairs",
    together=encoder_measures,
    source="Ethayarajh 2019, section 3.3",
)
def embedding_anisotropy(
    model: Model, pairs: Sequence[TextPair] | None = None, *, seed: int = 0, batch: int = BATCH
) -> Measurement:
    """Return the mean cosine over all pairs of different sentences."""
    return _Embedded(model, _given(pairs, seed), batch).anisotropy(seed)


@measure(
    "embedding-dimension",
    summary="how many directions carry the variance between sentences (participation ratio)",
    unit="dimensions",
    needs=("encoder",),
    data="pairs",
    together=encoder_measures,
)
def embedding_dimension(
    model: Model, pairs: Sequence[TextPair] | None = None, *, seed: int = 0, batch: int = BATCH
) -> Measurement:
    """Return the participation ratio of the embeddings' covariance; at most sentences - 1."""
    return _Embedded(model, _given(pairs, seed), batch).dimension(seed)


class _Embedded:
    """Embeddings of every sentence of the pairs; each different sentence is embedded once."""

    def __init__(self, model: Model, pairs: Sequence[TextPair], batch: int) -> None:
        texts = list(dict.fromkeys(text for pair in pairs for text in (pair.left, pair.right)))
        place = {text: i for i, text in enumerate(texts)}
        self.vectors = embed(model, texts, batch=batch)
        self.cosines = self.vectors @ self.vectors.T
        self.by_kind: dict[Kind, NDArray[np.float64]] = {}
        for kind in KINDS:
            chosen = [(place[p.left], place[p.right]) for p in pairs if p.kind == kind]
            self.by_kind[kind] = np.array([self.cosines[i, j] for i, j in chosen])

    def separation(self, seed: int) -> list[Measurement]:
        """AUC; the samples are, for each paraphrase, the share of other pairs that are less alike."""
        out = []
        positive = self.by_kind["paraphrase"]
        for kind in KINDS[1:]:
            negative = self.by_kind[kind]
            group = {"against": kind}
            if not len(positive) or not len(negative):
                out.append(missing("embedding-separation", "AUC", f"no {kind} pairs", group=group))
                continue
            labels = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
            found = auc(labels, np.r_[positive, negative], seed=seed)
            above = positive[:, None] - negative[None, :]
            out.append(
                Measurement(
                    "embedding-separation",
                    found.value,
                    "AUC",
                    n=found.n,
                    low=None if math.isnan(found.low) else found.low,
                    high=None if math.isnan(found.high) else found.high,
                    interval="bootstrap over pairs within each kind",
                    seed=seed,
                    group=group,
                    better="higher",
                    note=found.note,
                    details={"chance": 0.5},
                    samples=((above > 0) + 0.5 * (above == 0)).mean(1),
                )
            )
        return out

    def similarity(self, seed: int) -> list[Measurement]:
        return [
            mean_measurement(
                "embedding-similarity", "cosine", values, seed=seed, over="pairs", group={"pairs": kind}
            )
            for kind, values in self.by_kind.items()
        ]

    def anisotropy(self, seed: int) -> Measurement:
        """Mean off-diagonal cosine; in a draw, a sentence is never paired with its own copies."""
        diagonal = np.diag(self.cosines)

        def mean(counts: NDArray[np.float64]) -> NDArray[np.float64]:
            total = ((counts @ self.cosines) * counts).sum(1) - counts**2 @ diagonal
            return np.asarray(total / (counts.sum(1) ** 2 - (counts**2).sum(1)))

        n = len(self.vectors)
        value = float(mean(np.ones((1, n)))[0])
        low, high = bootstrap_statistic(mean, n, seed=seed)
        return Measurement(
            "embedding-anisotropy",
            value,
            "cosine",
            n=n,
            low=low,
            high=high,
            interval="bootstrap over sentences",
            seed=seed,
            better="lower",
        )

    def dimension(self, seed: int) -> Measurement:
        """Participation ratio with a jackknife interval (copies in a bootstrap draw would lower it)."""
        n = len(self.vectors)
        value = _participation(self.vectors)
        left_out = np.array([_participation(np.delete(self.vectors, i, axis=0)) for i in range(n)])
        error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
        return Measurement(
            "embedding-dimension",
            value,
            "dimensions",
            n=n,
            low=max(1.0, value - 1.96 * error),
            high=value + 1.96 * error,
            interval="jackknife over sentences",
            better="higher",
            note=f"at most {min(n - 1, self.vectors.shape[1])} with {n} sentences",
            details={"width": self.vectors.shape[1]},
        )


def _participation(vectors: NDArray[np.float64]) -> float:
    """`(tr C)^2 / tr(C^2)` of the covariance C, from the Gram matrix of the centred rows."""
    centred = vectors - vectors.mean(0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    squares = float((gram**2).sum())
    return float(np.trace(gram) ** 2 / squares) if squares > 0 else 1.0


def _given(pairs: Sequence[TextPair] | None, seed: int) -> Sequence[TextPair]:
    if pairs is None:
        return text_pairs(seed=seed)
    if not pairs:
        raise InputError("there are no pairs of sentences; at least one is needed")
    wrong = next((p for p in pairs if p.kind not in KINDS), None)
    if wrong is not None:
        raise InputError(f"a pair of kind {wrong.kind!r}: one of {', '.join(KINDS)}")
    return pairs
