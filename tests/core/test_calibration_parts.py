"""The accumulators alone: mergeable in any order, exact where they count, against brute force."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actlas.core.calibration.accumulators import (
    ChannelSketch,
    ChannelSums,
    Gram,
    Reservoir,
    Sketch,
    TokenKurtosis,
    row_excess_kurtosis,
)
from actlas.core.calibration.massive import MassiveRows, massive_rows
from actlas.core.calibration.origin import Origin
from actlas.core.calibration.statistics import make_parts, memory_needed

D = 5
STATS = ("moments", "quantiles", "channel_quantiles", "kurtosis", "hessian", "rows")


def origin(n: int, start: int = 0, seed: int = 0, document: str = "d") -> Origin:
    place = torch.arange(start, start + n)
    return Origin([document], torch.zeros(n, dtype=torch.int64), place, place, place + 100, seed)


def parts_of(rows: Tensor, start: int = 0, size: int = 12):
    parts = make_parts(D, STATS, size)
    for part in parts.values():
        part.update(rows, origin(len(rows), start))
    return parts


def assert_same(a, b) -> None:
    for name, part in a.items():
        for field, tensor in part.tensors().items():
            other = b[name].tensors()[field]
            if tensor.dtype == torch.int64 or field in ("absmax", "rows"):
                assert torch.equal(tensor, other), (name, field)
            else:
                torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-12)
        if isinstance(part, Reservoir):
            assert part.documents == b[name].documents


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_merging_in_any_order_and_grouping_gives_the_same(sizes: list[int], seed: int, data) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/64: every sum is exact in float64 and X^T X exact in float32.
    rows = torch.randint(-500, 500, (sum(sizes), D), generator=generator) / 64
    starts = np.cumsum([0, *sizes]).tolist()
    made = [parts_of(rows[a:b], a) for a, b in pairwise(starts)]
    while len(made) > 1:
        i = data.draw(st.integers(0, len(made) - 1))
        first = made.pop(i)
        j = data.draw(st.integers(0, len(made) - 1))
        second = made.pop(j)
        made.append({name: first[name].merge(second[name]) for name in first})
    assert_same(made[0], parts_of(rows))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 60), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_sums_equal_brute_force(seed: int, n: int, scale: float) -> None:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * scale
    wide = x.double()
    sums = ChannelSums.empty(D, kurtosis=True)
    gram = Gram.empty(D)
    tokens = TokenKurtosis()
    for part in (sums, gram, tokens):
        part.update(x, origin(n))
    torch.testing.assert_close(sums.sums, wide.sum(0), rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(sums.squares, wide.square().sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(sums.absmax, wide.abs().amax(0), rtol=0, atol=0)
    centred = wide - wide.mean(0)
    exact = centred.pow(4).mean(0) / centred.square().mean(0).square() - 3
    # Central moments of power sums cancel where the mean is large beside the spread.
    lost = 1e-13 * wide.pow(4).mean(0) / centred.square().mean(0).square()
    assert ((sums.excess_kurtosis(n) - exact).abs() <= 1e-9 + lost).all()
    bound = 1e-6 * sums.squares.sqrt()
    assert ((gram.matrix - wide.T @ wide).abs() <= torch.outer(bound, sums.squares.sqrt())).all()
    assert int(tokens.rows) == n
    torch.testing.assert_close(
        tokens.total, row_excess_kurtosis(wide).sum(0, keepdim=True), rtol=1e-12, atol=1e-12
    )


def test_float64_rows_keep_their_precision() -> None:
    x = torch.randn(50, D, dtype=torch.float64)
    gram, kept = Gram.empty(D), Reservoir.empty(D, 4)
    for part in (gram, kept):
        part.update(x, origin(50))
    torch.testing.assert_close(gram.matrix, x.T @ x, rtol=1e-14, atol=1e-14)
    assert kept.rows.dtype == torch.float64 and torch.equal(kept.rows, x[kept.position])


def test_constant_channels_and_rows_have_no_kurtosis() -> None:
    x = torch.tensor([[3.0, 1.0], [3.0, 2.0], [3.0, 5.0]])
    sums = ChannelSums.empty(2, kurtosis=True)
    sums.update(x, origin(3))
    assert sums.excess_kurtosis(3).isnan().tolist() == [True, False]
    tokens = TokenKurtosis()
    tokens.update(torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 1.0]]), origin(2))
    assert int(tokens.rows) == 1 and float(tokens.total) == pytest.approx(-1.5)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200),
    q=st.floats(0, 1),
)
def test_sketch_quantiles_stay_within_the_stated_error(values: list[float], q: float) -> None:
    sketch = Sketch()
    x = torch.tensor(values)
    sketch.update(x.unsqueeze(1), origin(len(x)))
    for magnitude in (False, True):
        ordered = (x.abs() if magnitude else x).double().sort().values
        exact = float(ordered[math.floor(q * (len(x) - 1))])
        found = float(sketch.quantile(torch.tensor(q, dtype=torch.float64), magnitude))
        assert abs(found - exact) <= max(1.0001 * Sketch.ERROR * abs(exact), Sketch.SMALLEST)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 300), q=st.floats(0, 1))
def test_channel_sketch_quantiles_stay_within_the_stated_error(seed: int, n: int, q: float) -> None:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [0.0, 1e-3, 1, 50, 1e4]
    )
    sketch = ChannelSketch.empty(D)
    sketch.update(x, origin(n))
    exact = x.abs().double().sort(0).values[math.floor(q * (n - 1))]
    error = (sketch.quantile(q) - exact).abs()
    assert (error <= 1.001 * ChannelSketch.ERROR * exact + ChannelSketch.SMALLEST).all()
    assert sketch.counts.sum(1).tolist() == [n] * D


def test_the_reservoir_is_a_uniform_sample_of_the_smallest_priorities() -> None:
    x = torch.arange(4000).float().unsqueeze(1).expand(-1, D)
    where = origin(4000)
    whole, pieces = Reservoir.empty(D, 500), Reservoir.empty(D, 500)
    whole.update(x, where)
    for block in torch.randperm(4000).split(37):
        pieces.update(x[block], where.select(block))
    assert torch.equal(whole.rows, pieces.rows)
    assert sorted(whole.rows[:, 0].tolist()) == sorted(where.priority.argsort()[:500].tolist())
    assert abs(float(whole.rows[:, 0].mean()) - 2000) < 4 * 4000 / math.sqrt(12 * 500)
    assert not torch.equal(where.priority, origin(4000, seed=1).priority)
    assert not torch.equal(where.priority, origin(4000, document="e").priority)
    assert (where.priority >= 0).all() and len(where.priority.unique()) == 4000


def test_memory_is_what_is_stated() -> None:
    for stats in (("moments",), ("quantiles",), ("channel_quantiles",), ("hessian",), ("moments", "rows")):
        parts = make_parts(64, stats, 30)
        held = sum(t.numel() * t.element_size() for p in parts.values() for t in p.tensors().values())
        full = held + (30 * (4 * 64 + 24) if "rows" in stats else 0)
        assert full <= memory_needed(64, stats, 30) <= 1.4 * full + 2000


# -- massive rows -----------------------------------------------------------------------------------


def test_massive_rows_are_judged_alone() -> None:
    ordinary = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    rows = ordinary.clone()
    rows[1, 7] = 22_000.0  # a sink
    rows[2, 9] = -600.0  # beyond 100 and 100 times the median of about 0.67
    rows[3, 9] = 60.0  # large, but below 100
    rows[4] = 500 * ordinary[4]  # a long row without one dominant channel
    rows[5] = 30 * ordinary[5]
    rows[5, 3] = 1500.0  # beyond 1000 and 50 times the median of about 20
    found = massive_rows(rows)
    assert found.tolist() == [False, True, True, False, False, True]
    assert massive_rows(rows.flip(0)).tolist() == found.tolist()[::-1]
    assert [bool(massive_rows(row.unsqueeze(0))) for row in rows] == found.tolist()
    assert massive_rows(torch.zeros(3, 4)).tolist() == [False] * 3


def test_massive_reports_merge_in_any_order_and_survive_json() -> None:
    rows = torch.zeros(150, 8)
    rows[torch.arange(150), torch.arange(150) % 3] = torch.arange(150) * 10.0 + 200
    whole = MassiveRows.of(rows, origin(150))
    pieces = [MassiveRows.of(rows[i : i + 30], origin(30, i)) for i in (90, 0, 120, 60, 30)]
    merged = MassiveRows()
    for piece in pieces:
        merged = merged.merge(piece)
    assert merged == MassiveRows().merge(whole)
    assert merged.count == 150 and merged.first == 1 and merged.largest == 1690
    assert merged.channels == {0: 50, 1: 50, 2: 50} and len(merged.examples) == 64
    assert merged.documents == ["d"]
    assert MassiveRows.from_json(merged.to_json()) == merged
    assert "150 massive rows left out" in merged.describe()
    assert MassiveRows().describe() == "no massive activations"
