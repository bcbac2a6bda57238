"""Feature coverage against a search over every feature and threshold, and against planted features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.core.codes import Codes
from actlas.core.errors import InputError, NonFiniteError
from actlas.measure import feature_coverage as module
from actlas.measure.feature_coverage import feature_coverage

N = 512


def made(seed=0, features=12):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(N, features, generator=g).relu()
    truths = {f"p{i}": torch.rand(N, generator=g) < 0.3 for i in range(3)}
    return z, truths


def best_by_hand(z, y):
    """F1 of the best `z_i > t`, t >= 0, over every feature and every threshold between values."""
    best = 0.0
    for i in range(z.shape[1]):
        for t in {0.0, *z[:, i].clamp(min=0).tolist()}:
            said = z[:, i] > t
            total = int(said.sum() + y.sum())
            if int(said.sum()) and total:
                best = max(best, 2 * int((said & y).sum()) / total)
    return best


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_search_finds_what_trying_everything_finds(seed, ties):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(60, 4, generator=g)
    z = (z * 2).round() / 2 if ties else z
    y = (torch.rand(60, 2, generator=g) < 0.4).bool()
    judging = torch.arange(60) >= 30
    found = module._search(z, y, judging, 0.95, 3)
    for p in range(2):
        truth = y[:30, p]
        assert found.chosen[p] == pytest.approx(best_by_hand(z[:30], truth), abs=1e-6)
        said = z[:30, found.feature[p]] > found.threshold[p]
        if found.chosen[p] > 0:
            assert 2 * int((said & truth).sum()) / int(said.sum() + truth.sum()) == pytest.approx(
                found.chosen[p]
            )
            assert torch.equal(found.fires[:, p], z[30:, found.feature[p]] > found.threshold[p])
        any_fires = torch.zeros(30, dtype=torch.bool)
        for i in range(4):
            loosest = None
            for t in sorted({0.0, *z[:30, i].clamp(min=0).tolist()}):
                said = z[:30, i] > t
                hits = int((said & truth).sum())
                if hits >= 3 and hits >= 0.95 * int(said.sum()):
                    loosest = t
                    break
            if loosest is not None:
                above = z[:30, i][z[:30, i] > loosest].min()
                halfway = loosest + (float(above) - loosest) / 2 if loosest else 0.0
                any_fires |= z[30:, i] > halfway
        assert torch.equal(found.any[:, p], any_fires)


def test_a_planted_feature_is_found_and_judged_elsewhere():
    z, truths = made()
    z[:, 7] = 0.2 * torch.rand(N, generator=torch.Generator().manual_seed(2)) + truths["p1"] * 1.0
    found = feature_coverage(z, truths)
    assert found.best["p1"].feature == 7 and found.best["p1"].f1 == 1.0
    assert found.best["p1"].precision == found.best["p1"].recall == 1.0
    assert found.best["p0"].f1 < 0.7
    coverage = found.coverage
    assert coverage.value == pytest.approx(np.mean([b.f1 for b in found.best.values()]))
    assert coverage.low < coverage.value < coverage.high and coverage.baseline.value < coverage.value
    assert found.reconstruction.details["properties"]["p1"] > 0.94  # it may be wrong once in twenty
    assert found.reconstruction.details["properties"]["p0"] == 0.0


def test_searching_many_random_features_is_not_rewarded():
    g = torch.Generator().manual_seed(1)
    truths = {"p": torch.rand(N, generator=g) < 0.3}
    z = torch.randn(N, 2000, generator=g).relu()
    found = feature_coverage(z, truths)
    assert found.best["p"].chosen_f1 > found.best["p"].f1 + 0.03
    assert found.coverage.value == pytest.approx(found.coverage.baseline.value, abs=0.1)


def test_codes_and_dense_features_are_the_same_and_seeds_repeat():
    z, truths = made()
    a, b, c = (feature_coverage(x, truths, seed=s) for x, s in ((z, 1), (Codes.from_dense(z), 1), (z, 2)))
    assert a.best == b.best and a.coverage == b.coverage
    assert a.coverage.value != c.coverage.value


def test_whole_documents_choose_or_judge():
    documents = np.repeat(np.arange(8), 64)
    units = module._units([f"d{d}" for d in documents], N)
    judging = module._split(units, 0.5, 3)
    for d in range(8):
        assert len(set(judging[documents == d].tolist())) == 1
    assert int(judging.sum()) == 256
    z, truths = made()
    assert feature_coverage(z, truths, documents=documents).coverage.n == 4


def test_bad_input():
    z, truths = made()
    with pytest.raises(InputError, match="no property"):
        feature_coverage(z, {})
    with pytest.raises(InputError, match=r"'p' has shape \[3\]; there are 512 tokens"):
        feature_coverage(z, {"p": [True, False, True]})
    with pytest.raises(InputError, match="'never' never holds"):
        feature_coverage(z, {"never": torch.zeros(N)})
    with pytest.raises(InputError, match="'always' always holds"):
        feature_coverage(z, {"always": torch.ones(N)})
    with pytest.raises(InputError, match="leaves none"):
        feature_coverage(z, truths, documents=[0] * N)
    with pytest.raises(InputError, match="document labels"):
        feature_coverage(z, truths, documents=[0, 1])
    with pytest.raises(InputError, match="at least one token"):
        feature_coverage(torch.zeros(0, 3), truths)
    z[3, 3] = torch.nan
    with pytest.raises(NonFiniteError):
        feature_coverage(z, truths)
