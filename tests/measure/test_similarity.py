"""Similarity of representations: definitions by brute force, invariances, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.measure.similarity import (
    AtomLabels,
    jaccard,
    layer_matching,
    representation_similarity,
    similarity_matrix,
)


def rows(n: int = 60, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(rows(d, d, seed))[0]


def labels(*numbers: int, seeds: tuple[int, ...] = (), data: str = "") -> AtomLabels:
    return AtomLabels(frozenset(("d", i) for i in numbers), frozenset(("d", i) for i in seeds), data)


def test_cka_is_the_normalised_hsic_of_centred_gram_matrices() -> None:
    x, y = rows(), rows(60, 7, 1)
    centre = np.eye(60) - 1 / 60
    k, m = (centre @ (z @ z.T).numpy() @ centre for z in (x, y))
    wanted = np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert math.isclose(representation_similarity(x, y, "cka"), wanted, rel_tol=1e-9)
    scaled = [z - z.mean(0) for z in (x, y)]
    scaled = [z / z.norm(dim=0) for z in scaled]
    assert math.isclose(
        representation_similarity(x * torch.arange(1, 6), y, "cka", unit_columns=True),
        representation_similarity(*scaled, "cka"),
        rel_tol=1e-9,
    )


def test_svcca_is_the_mean_canonical_correlation() -> None:
    x, y = rows(), rows(60, 4, 1)
    whitened = []
    for z in (x - x.mean(0), y - y.mean(0)):
        values, vectors = np.linalg.eigh((z.T @ z).numpy())
        top = np.argsort(values)[-3:]
        whitened.append(z.numpy() @ vectors[:, top] / np.sqrt(values[top]))
    wanted = np.linalg.svd(whitened[0].T @ whitened[1])[1].mean()
    assert math.isclose(representation_similarity(x, y, "svcca", components=3), wanted, rel_tol=1e-9)


def test_relative_representations_by_hand() -> None:
    x, y = rows(12), rows(12, 3, 1)
    at = torch.randperm(12, generator=torch.Generator().manual_seed(4))[:6]

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    each = []
    for i in range(12):
        one, other = (torch.tensor([cosine(z[i], z[j]) for j in at]) for z in (x, y))
        each.append(cosine(one, other))
    found = representation_similarity(x, y, "relative", anchors=6, seed=4)
    assert math.isclose(found, float(np.mean(each)), rel_tol=1e-6)


@pytest.mark.parametrize("kind", ["cka", "svcca", "relative", "linreg"])
def test_the_same_up_to_what_a_kind_ignores(kind: str) -> None:
    x = rows(200, 6)
    same = x @ rotation(6) * 3
    assert math.isclose(representation_similarity(x, same, kind), 1.0, abs_tol=1e-9)
    assert representation_similarity(x, rows(200, 6, 5), kind) < 0.5
    if kind in ("svcca", "linreg"):  # these ignore every invertible linear map
        assert math.isclose(representation_similarity(x, x @ rows(6, 6, 3), kind), 1.0, abs_tol=1e-6)


def test_regression_is_scored_on_rows_it_did_not_see() -> None:
    x, y = rows(40, 18), rows(40, 1, 2)
    assert representation_similarity(x, y, "linreg") < 0.2  # in-sample it would be near 1


def test_overlap_of_labels_with_and_without_seeds() -> None:
    a = labels(1, 2, 3, 4, seeds=(1, 2), data="x")
    b = labels(1, 2, 4, 5, 6, seeds=(1, 2), data="x")
    assert jaccard(a, b) == 1 / 4
    assert representation_similarity(a, b, "itda", exclude_seed=False) == 3 / 6
    assert jaccard(labels(1, seeds=(1,)), labels(1, seeds=(1,))) == 0.0
    with pytest.raises(InputError, match="different texts"):
        jaccard(a, labels(1, data="y"))
    assert jaccard(a, labels(1, 3)) == 1 / 2  # of unknown text: taken at its word


def test_layers_are_matched_in_both_directions() -> None:
    matrix = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.1, 0.2, 0.8]])
    found = layer_matching(matrix)
    assert found.value == 5 / 6 and found.n == 6 and found.details["chance"] == 1 / 3
    assert layer_matching(matrix, torch.eye(3)).value == 11 / 12
    same = {i: rows(80, 4, i) for i in range(3)}
    assert layer_matching(similarity_matrix(same, {i: x @ rotation(4) for i, x in same.items()})).value == 1.0
    with pytest.raises(ShapeError, match=r"\[L, L\]"):
        layer_matching(torch.zeros(2, 3))
    with pytest.raises(InputError, match="at least one"):
        layer_matching()


@pytest.mark.parametrize(
    ("a", "b", "kind", "error", "said"),
    [
        (rows(10), rows(10), "cosine", InputError, "must be one of"),
        (rows(10), rows(9), "cka", ShapeError, "10 rows and b has 9"),
        (rows(3), rows(3), "cka", InputError, "3 rows are too few"),
        (rows(10) * math.nan, rows(10), "cka", NonFiniteError, "a holds NaN or infinity in row 0"),
        ([1, 2], rows(10), "cka", ShapeError, "a must be rows"),
        (rows(10), rows(10), "itda", InputError, "no atom labels"),
        (labels(), labels(1), "itda", InputError, "no atom labels"),
    ],
)
def test_bad_input(a, b, kind, error, said) -> None:
    with pytest.raises(error, match=said):
        representation_similarity(a, b, kind)
    for options, kind_ in (({"components": 0}, "svcca"), ({"anchors": 0}, "relative")):
        with pytest.raises(InputError, match="at least 1"):
            representation_similarity(rows(10), rows(10), kind_, **options)
