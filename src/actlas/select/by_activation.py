"""MoNA: choose the samples whose sparse codes are nearest to those of a few target examples.

    z = mean over a sample's tokens of its codes          p = mean over the target examples of z
    J(z, p) = sum_i min(z_i, p_i) / sum_i max(z_i, p_i)                keep the best part of the pool

The features that a sample shares with the target are the explanation of its choice, which a similarity
of embeddings has not got. `lens=None` compares raw activations (the paper's ablation, and its earlier
version NAS). A choice is never reported alone: `selection.measurements` holds its mean similarity beside
that of random subsets of equal size.

Source: "Task-Specific Data Selection for Instruction Tuning via Monosemantic Neuronal Activations",
sections 2.2-2.4. A sum over max that is 0 (a sample without a token that counts) is similarity 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure.samples import mean_measurement
from actlas.select.duplicates import without_duplicates
from actlas.select.samples import Array, Pool, SampleCodes, batches_of, sample_codes, texts_of

if TYPE_CHECKING:
    from actlas.core.lens import Lens
    from actlas.core.model import Model

Similarity = Literal["jaccard", "cosine", "euclidean"]
_CHUNK = 65_536  # samples scored at a time
_RANDOM = 200  # random subsets that a choice is measured against


@dataclass(frozen=True)
class SharedLatent:
    """A feature that a chosen sample shares with the target.

    Attributes:
        latent: the feature's number (the channel, without a lens).
        sign: 1, or -1 for negative values of a signed code.
        share: its part of all that the two share, 0 to 1.
    """

    latent: int
    sign: int
    share: float


@dataclass(frozen=True, eq=False)
class Selection:
    """What was chosen.

    Attributes:
        indices: numbers of the chosen samples, the best first.
        scores: similarity of every sample of the pool, float64 `[n]`.
        top_shared_latents: for each chosen sample, the features that it shares most with the target.
        measurements: mean similarity of the choice, and of random subsets of equal size.
    """

    indices: list[int]
    scores: Array
    top_shared_latents: list[list[SharedLatent]]
    measurements: tuple[Measurement, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)


def by_activation(
    model: Model | None,
    lens: Lens | None,
    source: Sequence[Any] | SampleCodes,
    target: Sequence[Any] | SampleCodes,
    *,
    site: str = "penultimate",
    ratio: float = 0.05,
    similarity: Similarity = "jaccard",
    pool: Pool = "mean",
    shared: int = 5,
    duplicates: float | None = None,
    context: int | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> Selection:
    """Choose the part of a pool that is most like the target examples.

    Args:
        model: reads the texts; `None` if both are `SampleCodes`.
        lens: a dictionary or another lens with codes; `None` for raw activations.
        source: the pool: strings, documents, or what `sample_codes` made of them.
        target: a few examples of what is wanted, likewise.
        site: where to read without a lens (paper: the penultimate layer).
        ratio: part of the pool to keep (paper: 0.05); at least one sample.
        similarity: `"jaccard"` (paper), `"cosine"` or `"euclidean"` (its negative distance).
        pool: how a sample's tokens are put together.
        shared: how many shared features to report for each chosen sample.
        duplicates: skip a sample whose words overlap by more than this with a better one's (Jaccard of
            runs of five words); `None` keeps all. Needs texts.
        context, batch_tokens: of the reading.
        seed: of the random subsets.

    Raises:
        InputError: nothing to choose from, a ratio outside 0 to 1, codes that do not belong together,
            or negative codes with Jaccard.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"ratio is {ratio:g}; it must be above 0 and at most 1")
    if similarity not in get_args(Similarity):
        raise InputError(f"similarity is {similarity!r}; it must be one of {', '.join(get_args(Similarity))}")
    texts = None if isinstance(source, SampleCodes) else texts_of(source)
    if duplicates is not None and texts is None:
        raise InputError("duplicates are found in texts; give the pool as texts, not as codes")
    options: dict[str, Any] = {
        "site": site,
        "pool": pool,
        "absolute": similarity == "jaccard",
        "context": context,
        "batch_tokens": batch_tokens,
    }
    z, examples = (_encoded(model, lens, s, **options) for s in (source, target))
    if z.vectors.shape[1] != examples.vectors.shape[1] or z.site != examples.site or z.pool != examples.pool:
        raise InputError(
            f"pool and target do not belong together: {z.vectors.shape[1]} and {examples.vectors.shape[1]} "
            f"places at {z.site} and {examples.site}, {z.pool} and {examples.pool}"
        )
    p = np.asarray(examples.vectors[examples.tokens > 0].mean(0)).ravel()
    scores = scores_of(z.vectors, p, similarity)
    count = max(1, round(ratio * len(z)))
    order = [int(i) for i in np.argsort(-scores, kind="stable")]
    if duplicates is not None and texts is not None:
        order = without_duplicates(order, texts, duplicates, count)
    chosen = order[:count]
    return Selection(
        chosen,
        scores,
        [_shared(z, i, p, shared) for i in chosen],
        _against_random(scores, chosen, similarity, z.site, seed),
    )


def scores_of(vectors: Any, p: Array, similarity: Similarity) -> Array:
    """Return the similarity of every row of a CSR matrix `[n, m]` with a prototype `[m]`, in chunks.

    Raises:
        InputError: negative values with Jaccard.
    """
    out = np.zeros(vectors.shape[0])
    for at in batches_of(len(out), _CHUNK):
        z = vectors[at]
        total = np.asarray(z.sum(1)).ravel()
        if similarity == "jaccard":
            if (z.data < 0).any() or (p < 0).any():
                raise InputError(
                    "Jaccard similarity needs codes that are not negative; use cosine, or a lens"
                )
            both = z.copy()
            both.data = np.minimum(z.data, p[z.indices])
            common = np.asarray(both.sum(1)).ravel()
            union = total + p.sum() - common
            out[at] = np.divide(common, union, out=np.zeros_like(union), where=union > 0)
            continue
        squares = np.asarray(z.multiply(z).sum(1)).ravel()
        dot = z @ p
        if similarity == "cosine":
            size = np.sqrt(squares) * np.linalg.norm(p)
            out[at] = np.divide(dot, size, out=np.zeros_like(size), where=size > 0)
        else:
            out[at] = -np.sqrt(np.maximum(squares + p @ p - 2 * dot, 0))
    return out


def _encoded(model: Model | None, lens: Lens | None, samples: Any, **options: Any) -> SampleCodes:
    if isinstance(samples, SampleCodes):
        found = samples
    elif model is None:
        raise InputError("texts need a model to read them; give one, or SampleCodes")
    else:
        found = sample_codes(model, lens, samples, **options)
    if not (found.tokens > 0).any():
        raise InputError("no sample has a token that counts; give texts with more than special tokens")
    return found


def _shared(z: SampleCodes, row: int, p: Array, most: int) -> list[SharedLatent]:
    own = z.vectors[row]
    common = np.minimum(np.abs(own.data), np.abs(p[own.indices])) * (own.data * p[own.indices] > 0)
    total = common.sum()
    best = [i for i in np.argsort(-common, kind="stable")[:most] if common[i] > 0]
    places = [int(own.indices[i]) for i in best]
    return [
        SharedLatent(*z.latent(place), float(common[i] / total))
        for i, place in zip(best, places, strict=True)
    ]


def _against_random(
    scores: Array, chosen: list[int], similarity: str, site: str, seed: int
) -> tuple[Measurement, ...]:
    """Return the mean similarity of the choice, and of random subsets of equal size."""
    draw = np.random.default_rng(seed)
    random = np.array([scores[draw.choice(len(scores), len(chosen), False)].mean() for _ in range(_RANDOM)])
    name, group = f"{similarity} similarity to the target", {"site": site}
    low, high = np.quantile(random, [0.025, 0.975])
    control = Measurement(
        name,
        float(random.mean()),
        "",
        _RANDOM,
        float(low),
        float(high),
        "95% of random subsets",
        seed,
        group={**group, "choice": "random"},
        note=f"control: {_RANDOM} random subsets of {len(chosen)} samples",
    )
    made = mean_measurement(
        name,
        "",
        scores[chosen],
        seed=seed,
        over="chosen samples",
        group={**group, "choice": "best"},
        better="higher",
    )
    return made, control


def top(scores: NDArray[np.float64], ratio: float) -> list[int]:
    """Return the numbers of the best part of some scores, the best first; of equal ones, the first."""
    return [int(i) for i in np.argsort(-scores, kind="stable")[: max(1, round(ratio * len(scores)))]]
