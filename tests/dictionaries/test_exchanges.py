"""Editing by exchanging features, held against brute force in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries import exchanges as room
from actlas.dictionaries.exchanges import exchange_agnostic, exchange_by_score, exchange_random, weights


@dataclass(kw_only=True, eq=False)
class Threshold(Dictionary):
    """A dictionary for tests: codes are projections above 0.4."""

    rows: Tensor
    shift: Tensor

    @property
    def channels(self) -> int:
        return self.rows.shape[1]

    @property
    def features(self) -> int:
        return self.rows.shape[0]

    @property
    def atoms(self) -> Tensor:
        return self.rows

    @property
    def offset(self) -> Tensor:
        return self.shift

    def encode_rows(self, x: Tensor) -> Codes:
        z = (x.to(self.rows) - self.shift) @ self.rows.T
        return Codes.from_dense(z * (z > 0.4))


@pytest.fixture
def made() -> tuple[Threshold, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    rows, shift = torch.randn(7, 5, generator=g).double(), torch.randn(5, generator=g).double()
    x, x_cf = (torch.randn(12, 5, generator=g).double() for _ in range(2))
    return Threshold(site="blocks.0.resid_post", rows=rows, shift=shift), x, x_cf


def test_weights_add_up_to_one_and_equal_the_formula(made: tuple[Threshold, Tensor, Tensor]) -> None:
    d, x, _ = made
    codes = d.encode(x)
    found = weights(d, codes)
    z, hat = codes.dense(), d.decode(codes) - d.shift
    for i, j in itertools.product(range(12), range(7)):
        expected = z[i, j] * (d.rows[j] @ hat[i]) / (hat[i] @ hat[i]) if bool(z[i].any()) else 0.0
        assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-12)
    active = codes.l0 > 0
    assert torch.allclose(found.sum(1)[active], torch.ones(int(active.sum())).double())


def test_the_greedy_choice_equals_trying_every_feature(made: tuple[Threshold, Tensor, Tensor]) -> None:
    d, x, x_cf = made
    found = exchange_agnostic(d, x, x_cf, (1, 2, 4, 7))
    z, z_cf, w = d.encode(x).dense(), d.encode(x_cf).dense(), weights(d, d.encode(x))
    for i in range(12):
        edited, left, weight, count = x[i].clone(), set(range(7)), 0.0, 0
        for step in range(1, 8):
            tried = {j: edited + (z_cf[i, j] - z[i, j]) * d.rows[j] for j in left}
            j = min(tried, key=lambda j: float((x_cf[i] - tried[j]).norm()))
            if float((x_cf[i] - tried[j]).norm()) < float((x_cf[i] - edited).norm()) - 1e-12:
                edited, weight, count = tried[j], weight + float(w[i, j]), count + 1
                left.remove(j)
            if step in found:
                assert torch.allclose(found[step].x[i], edited, atol=1e-10), (i, step)
                assert float(found[step].weight[i]) == pytest.approx(weight, abs=1e-10)
                assert int(found[step].count[i]) == count <= step


def test_by_score_removes_and_adds_the_best_active_ones(made: tuple[Threshold, Tensor, Tensor]) -> None:
    d, x, x_cf = made
    g = torch.Generator().manual_seed(1)
    old, new = torch.rand(12, 7, generator=g), torch.rand(12, 7, generator=g)
    old[:, 2] = -torch.inf
    z, z_cf, w = d.encode(x).dense(), d.encode(x_cf).dense(), weights(d, d.encode(x))
    for m, found in exchange_by_score(d, x, x_cf, old, new, (1, 3)).items():
        for i in range(12):
            out = sorted((j for j in range(7) if z[i, j] != 0 and j != 2), key=lambda j: -float(old[i, j]))[
                :m
            ]
            into = sorted((j for j in range(7) if z_cf[i, j] != 0), key=lambda j: -float(new[i, j]))[:m]
            expected = (
                x[i] - sum(z[i, j] * d.rows[j] for j in out) + sum(z_cf[i, j] * d.rows[j] for j in into)
            )
            assert torch.allclose(found.x[i], expected, atol=1e-10)
            assert float(found.weight[i]) == pytest.approx(float(sum(w[i, j] for j in out)), abs=1e-10)
            assert int(found.count[i]) == max(len(out), len(into))


def test_exchanging_every_feature_leaves_only_the_errors_apart(
    made: tuple[Threshold, Tensor, Tensor],
) -> None:
    d, x, x_cf = made
    whole = d.reconstruct(x_cf) + x - d.reconstruct(x)
    assert torch.allclose(exchange_random(d, x, x_cf, (7,))[7].x, whole)
    same = torch.ones(12, 7)
    assert torch.allclose(exchange_by_score(d, x, x_cf, same, same, (7,))[7].x, whole)


def test_random_exchanges_are_random_ones_of_those_that_differ(
    made: tuple[Threshold, Tensor, Tensor],
) -> None:
    d, x, x_cf = made
    differ = (d.encode(x).dense() != d.encode(x_cf).dense()).sum(1)
    one, again = exchange_random(d, x, x_cf, (2,), seed=3)[2], exchange_random(d, x, x_cf, (2,), seed=3)[2]
    assert torch.equal(one.x, again.x) and torch.equal(one.count, differ.clamp(max=2))
    assert not torch.equal(one.x, exchange_random(d, x, x_cf, (2,), seed=4)[2].x)


def test_an_activation_that_is_there_already_is_left_alone(made: tuple[Threshold, Tensor, Tensor]) -> None:
    d, x, _ = made
    found = exchange_agnostic(d, x, x, (3,))[3]
    assert torch.equal(found.x, x) and not bool(found.count.any()) and not bool(found.weight.any())


def test_blocks_of_rows_give_the_same(
    made: tuple[Threshold, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    d, x, x_cf = made
    whole = exchange_agnostic(d, x, x_cf, (2,))[2].x
    monkeypatch.setattr(room, "_NUMBERS", 21)  # three rows at a time
    assert torch.allclose(exchange_agnostic(d, x, x_cf, (2,))[2].x, whole)


def test_bad_input(made: tuple[Threshold, Tensor, Tensor]) -> None:
    d, x, x_cf = made
    with pytest.raises(InputError, match="exchanges are"):
        exchange_agnostic(d, x, x_cf, (0,))
    with pytest.raises(ShapeError, match="both be"):
        exchange_agnostic(d, x, x_cf[:3], (1,))
    with pytest.raises(ShapeError, match=r"scores must be \[12, 7\]"):
        exchange_by_score(d, x, x_cf, torch.ones(12, 3), torch.ones(12, 7), (1,))
