"""How well a choice by activations finds more of what you have: precision on labelled texts.

Half of the texts with label 1 become the target examples; the others are hidden among the texts with
label 0. As many samples are chosen as were hidden, and the share of hidden ones among them is the
precision. Chance, BM25 and raw activations with cosine are measured beside it.

Source: the MoNA paper's selection (`actlas.select.by_activation`); the measure is ours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.errors import InputError
from actlas.core.lens import Lens
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.measure.samples import rate_measurement
from actlas.select.baselines import bm25, random_scores
from actlas.select.by_activation import Similarity, by_activation, top
from actlas.select.samples import Array, Pool

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "selection-precision",
    room="select",
    returns="Measurement",
    data="labelled",
    summary="how well choosing by activations finds hidden texts like your examples, beside BM25 and chance",
    example="actlas fit selection-precision smollm2 labelled.jsonl --option lens=itda/",
    papers=("mona-data-selection",),
)
def selection_precision(
    model: Model,
    data: Sequence[Any],
    *,
    lens: Lens | str | None = None,
    site: str = "penultimate",
    similarity: Similarity = "jaccard",
    pool: Pool = "mean",
    seed: int = 0,
) -> list[Measurement]:
    """Measure the precision of a choice, and of its controls.

    Args:
        model: reads the texts.
        data: `(text, label)`; label 1 for what is wanted, 0 for the rest of the pool.
        lens: a dictionary, or the folder of a saved one; `None` for raw activations.
        site, similarity, pool: see `by_activation`.
        seed: of the split.

    Raises:
        InputError: fewer than 4 wanted texts, or none that is not wanted.
    """
    wanted = [t for t, label in data if label == 1]
    others = [t for t, label in data if label == 0]
    if len(wanted) < 4 or not others or len(wanted) + len(others) != len(data):
        raise InputError(
            f"there are {len(wanted)} texts of label 1 and {len(others)} of label 0 among {len(data)}; give "
            "at least 4 and 1, and no other labels"
        )
    lens = Lens.load(lens, model) if isinstance(lens, str) else lens
    draw = random.Random(seed)
    draw.shuffle(wanted)
    target, hidden = wanted[: len(wanted) // 2], wanted[len(wanted) // 2 :]
    source = hidden + others
    raw = by_activation(model, None, source, target, similarity="cosine", site=site, seed=seed).scores
    scores: dict[str, Array] = {
        f"{'raw activations' if lens is None else type(lens).__name__}, {similarity}": by_activation(
            model, lens, source, target, site=site, similarity=similarity, pool=pool, seed=seed
        ).scores,
        "raw activations, cosine": raw,
        "BM25": bm25(source, target),
        "random": random_scores(len(source), seed),
    }
    ratio = len(hidden) / len(source)
    return [
        rate_measurement(
            "precision of the choice",
            np.array(top(s, ratio)) < len(hidden),
            seed=seed,
            better="higher",
            group={"by": name},
            note=f"{len(hidden)} hidden among {len(source)}; {len(target)} examples",
        )
        for name, s in scores.items()
    ]
