"""What a choice by activations is held against: BM25, embeddings, chance; duplicates; precision on labels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from actlas.core.errors import InputError
from actlas.core.methods import find_method
from actlas.select.baselines import bm25, random_scores
from actlas.select.duplicates import runs, without_duplicates
from actlas.select.precision import selection_precision
from tests.core.tiny import TEXTS, tiny


def test_bm25_by_hand() -> None:
    source = ["the cat sat", "the dog", "a dog and a dog and a bird"]
    lengths = [3, 2, 8]
    mean = sum(lengths) / 3

    def term(times: int, length: int, holders: int) -> float:
        rarity = math.log(1 + (3 - holders + 0.5) / (holders + 0.5))
        return rarity * times * 2.5 / (times + 1.5 * (0.25 + 0.75 * length / mean))

    wanted = [0.0, term(1, 2, 2), term(2, 8, 2) + term(1, 8, 1)]
    np.testing.assert_allclose(bm25(source, ["dog bird"]), wanted)
    np.testing.assert_allclose(bm25(source, ["dog bird", "unheard"]), np.array(wanted) / 2)
    with pytest.raises(InputError, match="both sides"):
        bm25(source, [])


def test_chance_is_the_same_for_the_same_seed() -> None:
    assert np.array_equal(random_scores(9, 1), random_scores(9, 1))
    assert not np.array_equal(random_scores(9, 1), random_scores(9, 2))


def test_near_copies_are_left_out_in_the_order_of_the_ranking() -> None:
    words = " ".join(f"w{i}" for i in range(20))
    texts = [
        words,
        words + " more",
        "something else entirely that has six words",
        "short",
        "short",
        words.upper(),
    ]
    assert without_duplicates([1, 0, 2, 3, 4, 5], texts, 0.8) == [1, 2, 3]
    assert without_duplicates([5, 4, 1], texts, 0.8, most=2) == [5, 4]
    assert without_duplicates([0, 1], texts, 0.95) == [0, 1]  # 16 of 17 runs in common
    assert len(runs(words)) == 16 and runs("A b") == {("a", "b")}
    with pytest.raises(InputError, match="between 0 and 1"):
        without_duplicates([0], texts, 1.5)


def test_precision_of_a_choice_on_labelled_texts() -> None:
    wanted = [f"{a} {b} {a}" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)]
    data = [(t.replace(" ", "."), 1) for t in wanted] + [(t + " the river had risen", 0) for t in TEXTS * 2]
    found = {m.group["by"]: m for m in selection_precision(tiny(), data, seed=1)}
    assert list(found) == ["raw activations, jaccard", "raw activations, cosine", "BM25", "random"]
    assert all(m.n == 6 and m.low is not None for m in found.values())
    assert found["raw activations, cosine"].value >= 5 / 6 > found["random"].value
    assert find_method("selection-precision").data == "labelled"
    with pytest.raises(InputError, match="at least 4 and 1"):
        selection_precision(tiny(), data[:3])
    with pytest.raises(InputError, match="no other labels"):
        selection_precision(tiny(), [*data, ("x", 0.5)])
