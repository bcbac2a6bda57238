"""F1 of features against attribute values, held against counting row by row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from actlas.core.codes import Codes
from actlas.core.errors import InputError
from actlas.dictionaries.attribute_f1 import attribute_f1, best_union, f1_on


def random_codes(seed: int, n: int = 60, features: int = 9, density: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(n, features, generator=generator) < density
    return torch.randn(n, features, generator=generator) * on


def labels(seed: int, n: int = 60, values: int = 4) -> list[str]:
    drawn = torch.randint(0, values, (n,), generator=torch.Generator().manual_seed(seed + 99))
    return [f"v{int(v)}" for v in drawn]


@pytest.mark.parametrize("sign", ["positive", "any"])
def test_every_entry_equals_scikit_learn(sign: str) -> None:
    z, names = random_codes(0), labels(0)
    table = attribute_f1(Codes.from_dense(z), names, sign=sign)
    assert table.values == ("v0", "v1", "v2", "v3") and table.disjoint
    for j, (v, value) in itertools.product(range(9), enumerate(table.values)):
        on = (z[:, j] > 0 if sign == "positive" else z[:, j] != 0).numpy()
        truth = np.array([name == value for name in names])
        assert float(table.f1[j, v]) == pytest.approx(f1_score(truth, on), abs=1e-12)
        assert float(table.precision[j, v]) == pytest.approx((on & truth).sum() / on.sum())
        assert float(table.recall[j, v]) == pytest.approx((on & truth).sum() / truth.sum())


def test_masks_may_overlap_and_say_the_same_where_they_do_not() -> None:
    z, names = random_codes(1), labels(1)
    codes = Codes.from_dense(z)
    alone = attribute_f1(codes, names)
    masks = {v: torch.tensor([n == v for n in names]) for v in alone.values}
    assert torch.equal(attribute_f1(codes, masks).f1, alone.f1)
    both = masks | {"low": masks["v0"] | masks["v1"]}
    table = attribute_f1(codes, both)
    assert not table.disjoint
    truth = both["low"].numpy()
    assert float(table.f1[3, 4]) == pytest.approx(f1_score(truth, (z[:, 3] > 0).numpy()))
    with pytest.raises(InputError, match="at most one value"):
        best_union(table)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_unions_equal_a_brute_force(seed: int, most: int) -> None:
    z, names = random_codes(seed, n=40, features=5), labels(seed, n=40, values=5)
    table = attribute_f1(Codes.from_dense(z), names)
    for union in best_union(table, most=most):
        on = (z[:, union.feature] > 0).numpy()
        singles = {v: f1_score([n == v for n in names], on, zero_division=0) for v in table.values}
        ranked = sorted(table.values, key=lambda v: -singles[v])
        prefixes = [
            f1_score([n in ranked[:size] for n in names], on, zero_division=0)
            for size in range(1, min(most, len(ranked)) + 1)
        ]
        assert union.f1 == pytest.approx(max(prefixes), abs=1e-12)
        assert union.single == pytest.approx(singles[union.values[0]], abs=1e-12)
        assert union.f1 >= union.single - 1e-12 and len(union.values) <= most


def test_features_that_are_never_active_are_never_chosen() -> None:
    z = random_codes(2)
    z[:, 4] = 0
    z[:, 5] = -1
    table = attribute_f1(Codes.from_dense(z), labels(2))
    assert bool((table.f1[4] == -torch.inf).all()) and bool((table.f1[5] == -torch.inf).all())
    assert {4, 5}.isdisjoint(j for j, _ in table.best("v1", n=9))
    assert {4, 5}.isdisjoint(u.feature for u in best_union(table))
    assert not bool(table.interpretable(-1.0)[4])


def test_a_choice_is_measured_on_other_rows_with_an_interval() -> None:
    names = ["a"] * 30 + ["b"] * 30 + ["c"] * 30
    z = torch.zeros(90, 2)
    z[:60, 0] = 1.0
    found = f1_on(Codes.from_dense(z), names, 0, ["a", "b"])
    assert found.value == 1.0 and found.low == 1.0 and found.n == 90
    found = f1_on(Codes.from_dense(z), names, 0, ["a"])
    assert found.value == pytest.approx(2 / 3) and found.low < 2 / 3 < found.high
    assert f1_on(Codes.from_dense(z), names, 1, ["a"]).value == 0.0
    assert np.isnan(f1_on(Codes.from_dense(z), names, 1, ["absent"]).value)


def test_rows_without_a_label_belong_to_no_value() -> None:
    z = torch.ones(6, 1)
    table = attribute_f1(Codes.from_dense(z), ["a", "a", None, None, "b", "b"])
    assert table.values == ("a", "b") and table.support.tolist() == [2, 2] and table.active.tolist() == [6]
    assert float(table.f1[0, 0]) == pytest.approx(2 * 2 / (6 + 2))


def test_bad_input() -> None:
    codes = Codes.from_dense(random_codes(3))
    with pytest.raises(InputError, match="60 rows of codes but 2 labels"):
        attribute_f1(codes, ["a", "b"])
    with pytest.raises(InputError, match="mask of 'a'"):
        attribute_f1(codes, {"a": [True, False]})
    with pytest.raises(InputError, match="no value 'v9'"):
        attribute_f1(codes, labels(3)).best("v9")
    with pytest.raises(InputError, match="flatten"):
        attribute_f1(codes.reshape(6, 10), labels(3))
    with pytest.raises(InputError, match="sign is 'both'"):
        attribute_f1(codes, labels(3), sign="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not all within 0 to 8"):
        best_union(attribute_f1(codes, labels(3)), [9])
    with pytest.raises(InputError, match="most is 0"):
        best_union(attribute_f1(codes, labels(3)), most=0)
