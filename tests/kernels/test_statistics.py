"""The native statistics kernels and their PyTorch references agree, with each other and with float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actlas.kernels import statistics
from actlas.kernels.statistics import (
    accumulate,
    accumulate_reference,
    bucket_edges,
    bucket_value,
    log_histogram,
    log_histogram_reference,
    native_available,
)

NAMES = ("sums", "squares", "absmax", "fourths", "thirds")
GAMMA, SMALLEST, HALF = 1.02, 1e-6, 1200

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")


def new_state(d: int) -> dict[str, Tensor]:
    return {name: torch.zeros(d, dtype=torch.float64) for name in NAMES}


def new_counts(half: int = HALF) -> Tensor:
    return torch.zeros(2 * half + 1, dtype=torch.int64)


def brute_force(rows: Tensor) -> dict[str, Tensor]:
    x = rows.detach().to(torch.float64).numpy()
    d = rows.shape[1]
    return {
        "sums": torch.tensor([math.fsum(x[:, c]) for c in range(d)], dtype=torch.float64),
        "squares": torch.tensor([math.fsum(x[:, c] ** 2) for c in range(d)], dtype=torch.float64),
        "absmax": torch.tensor([max(np.abs(x[:, c]), default=0.0) for c in range(d)], dtype=torch.float64),
        "fourths": torch.tensor([math.fsum(x[:, c] ** 4) for c in range(d)], dtype=torch.float64),
        "thirds": torch.tensor([math.fsum(x[:, c] ** 3) for c in range(d)], dtype=torch.float64),
    }


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor], rows: Tensor) -> None:
    largest = rows.detach().to(torch.float64).abs().amax().item() if rows.numel() else 1.0
    power = {"sums": 1, "squares": 2, "absmax": 1, "fourths": 4, "thirds": 3}
    for name in state:
        scale = max(largest, 1e-30) ** power[name] * max(len(rows), 1)
        torch.testing.assert_close(
            state[name],
            expected[name],
            rtol=1e-12,
            atol=1e-14 * scale,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def random_rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(4 * torch.randn(d, generator=generator))  # channels of very different size
    return (torch.randn(n, d, generator=generator) * spread).to(dtype)


# -- accumulate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("do", [accumulate, accumulate_reference])
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 200),
    d=st.integers(1, 70),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    transposed=st.booleans(),
)
def test_accumulate_equals_float64_brute_force(do, n, d, seed, dtype, transposed):
    rows = random_rows(d, n, seed, dtype).T if transposed else random_rows(n, d, seed, dtype)
    rows = rows.nan_to_num(posinf=1.0, neginf=-1.0)  # float16 overflows here; infinities have their own test
    before = rows.clone()
    state = new_state(d)
    do(rows, **state)
    assert_same(state, brute_force(rows), rows)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("do", [accumulate, accumulate_reference])
def test_adding_in_parts_equals_adding_at_once(do):
    rows = random_rows(1000, 33, seed=1)
    whole, parts = new_state(33), new_state(33)
    do(rows, **whole)
    for part in rows.split([1, 499, 0, 300, 200]):
        do(part, **parts)
    assert_same(parts, whole, rows)


@pytest.mark.parametrize("do", [accumulate, accumulate_reference])
def test_higher_powers_are_optional(do):
    rows = random_rows(50, 20, seed=2)
    state, few = new_state(20), new_state(20)
    do(rows, **state)
    do(rows, few["sums"], few["squares"], few["absmax"])
    assert torch.equal(few["absmax"], state["absmax"])
    torch.testing.assert_close(few["squares"], state["squares"], rtol=1e-14, atol=0)
    only_fourths = new_state(20)
    do(rows, only_fourths["sums"], only_fourths["squares"], only_fourths["absmax"], only_fourths["fourths"])
    assert torch.equal(only_fourths["fourths"], state["fourths"])
    assert not only_fourths["thirds"].any()


@pytest.mark.parametrize("do", [accumulate, accumulate_reference])
@pytest.mark.parametrize("d", [1, 8, 21])
def test_nan_spoils_its_channel_and_no_other(do, d):
    rows = random_rows(130, d, seed=3)
    rows[70, d - 1] = math.nan
    state = new_state(d)
    do(rows, **state)
    do(random_rows(5, d, seed=4), **state)
    for name, values in state.items():
        assert values[-1].isnan(), name
        assert not values[:-1].isnan().any(), name


@pytest.mark.parametrize("do", [accumulate, accumulate_reference])
def test_infinities_give_an_infinite_maximum_and_no_nan_there(do):
    rows = torch.zeros(3, 9)
    rows[0, 0], rows[1, 0], rows[2, 8] = math.inf, -math.inf, -math.inf
    state = new_state(9)
    do(rows, **state)
    assert state["absmax"][0] == math.inf and state["absmax"][8] == math.inf
    assert state["sums"][0].isnan() and state["sums"][8] == -math.inf
    assert state["squares"][0] == math.inf
    assert not state["absmax"][1:8].any()


@pytest.mark.parametrize("do", [accumulate, accumulate_reference])
def test_large_offsets_keep_float64_accuracy(do):
    rows = torch.full((100_000, 3), 16_777_215.0)  # 2^24 - 1: a float32 sum loses it at once
    state = new_state(3)
    do(rows, **state)
    assert state["sums"].tolist() == [16_777_215.0 * 100_000] * 3


def test_rows_that_need_a_gradient_are_read():
    rows = random_rows(10, 4, seed=5).requires_grad_()
    state = new_state(4)
    accumulate(rows, **state)
    assert_same(state, brute_force(rows), rows)


@pytest.mark.parametrize(
    ("rows", "d", "words"),
    [
        (torch.zeros(3), 3, "real \\[n, d\\]"),
        (torch.zeros(3, 4), 5, "sums must be float64 \\[4\\]"),
        (torch.zeros(3, 4, dtype=torch.complex64), 4, "complex64"),
    ],
)
def test_accumulate_refuses_what_does_not_fit(rows, d, words):
    with pytest.raises(ValueError, match=words):
        accumulate(rows, **new_state(d))


def test_accumulate_refuses_a_float32_state():
    state = new_state(4)
    state["fourths"] = torch.zeros(4)
    with pytest.raises(ValueError, match="fourths must be float64"):
        accumulate(torch.zeros(2, 4), **state)


@needs_native
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("shape", [(1, 1), (65, 7), (200, 64), (129, 577)])
def test_every_instruction_set_agrees(level, shape):
    # A level that this processor lacks falls back to the best one it has.
    from actlas.kernels import _native

    rows = random_rows(*shape, seed=6)
    state = new_state(shape[1])
    arrays = [state[name].numpy() for name in ("sums", "squares", "absmax", "thirds", "fourths")]
    _native.accumulate(rows.numpy(), *arrays, 1, level)
    assert_same(state, brute_force(rows), rows)


@needs_native
def test_threads_change_no_bit():
    from actlas.kernels import _native

    rows = random_rows(3000, 203, seed=7)
    results = []
    for threads in (1, 2, 5):
        state = new_state(203)
        _native.accumulate(
            rows.numpy(),
            *[state[name].numpy() for name in ("sums", "squares", "absmax", "thirds", "fourths")],
            threads,
        )
        results.append(state)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in NAMES)


@needs_native
def test_native_is_what_float32_rows_take(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("the reference was used")

    monkeypatch.setattr(statistics, "accumulate_reference", fail)
    monkeypatch.setattr(statistics, "log_histogram_reference", fail)
    state, counts = new_state(4), new_counts()
    accumulate(torch.ones(3, 4), **state)
    log_histogram(torch.ones(3, 4, dtype=torch.bfloat16), counts, GAMMA, SMALLEST)
    assert state["sums"].tolist() == [3.0] * 4 and counts.sum() == 12


def test_without_the_native_module_the_reference_is_used(monkeypatch):
    monkeypatch.setattr(statistics, "_native", lambda: None)
    assert not native_available()
    rows = random_rows(20, 6, seed=8)
    state, counts = new_state(6), new_counts()
    accumulate(rows, **state)
    log_histogram(rows, counts, GAMMA, SMALLEST)
    assert_same(state, brute_force(rows), rows)
    assert counts.sum() == rows.numel()


# -- log_histogram --------------------------------------------------------------------------------------


def brute_histogram(values: Tensor, half: int, gamma: float, smallest: float) -> list[int]:
    edges = bucket_edges(half, gamma, smallest)
    counts = [0] * (2 * half + 1)
    for x in values.to(torch.float32).reshape(-1).numpy():
        if np.isnan(x):
            continue
        k = next((i for i, edge in enumerate(edges) if abs(x) <= edge), half)
        counts[half - k if x < 0 else half + k] += 1
    return counts


@pytest.mark.parametrize("do", [log_histogram, log_histogram_reference])
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=60),
    half=st.integers(1, 40),
    gamma=st.sampled_from([1.001, 1.02, 1.5, 2.0, 7.0]),
    smallest=st.sampled_from([1.2e-38, 1e-6, 0.5]),
)
def test_histogram_equals_brute_force(do, values, half, gamma, smallest):
    x = torch.tensor(values, dtype=torch.float32)
    counts = new_counts(half)
    do(x, counts, gamma, smallest)
    assert counts.tolist() == brute_histogram(x, half, gamma, smallest)


@pytest.mark.parametrize("do", [log_histogram, log_histogram_reference])
def test_histogram_is_exact_on_the_edges_and_their_neighbours(do):
    edges = torch.tensor(bucket_edges(HALF, GAMMA, SMALLEST))
    up = torch.nextafter(edges, torch.tensor(math.inf))
    counts = new_counts()
    do(torch.cat([edges, -edges]), counts, GAMMA, SMALLEST)
    assert counts.tolist() == [1] * HALF + [2] + [1] * HALF  # an edge belongs to the bucket under it
    counts.zero_()
    do(torch.cat([up, -up]), counts, GAMMA, SMALLEST)
    assert counts.tolist() == [2] + [1] * (HALF - 1) + [0] + [1] * (HALF - 1) + [2]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 12), max_size=3),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32]),
    strided=st.booleans(),
)
def test_native_and_reference_count_the_same(shape, seed, dtype, strided):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator).exp() * torch.randn(shape, generator=generator)).to(
        dtype
    )
    if strided and values.ndim > 1:
        values = values.transpose(0, -1)[..., ::2]
    one, two = new_counts(), new_counts()
    log_histogram(values, one, GAMMA, SMALLEST)
    log_histogram_reference(values, two, GAMMA, SMALLEST)
    assert torch.equal(one, two)
    assert one.sum() == values.numel()


def test_histograms_merge_exactly_in_any_order():
    values = random_rows(900, 11, seed=9)
    whole = new_counts()
    log_histogram(values, whole, GAMMA, SMALLEST)
    parts = [new_counts() for _ in range(3)]
    for part, rows in zip(parts, values.split(300), strict=True):
        log_histogram(rows, part, GAMMA, SMALLEST)
    assert torch.equal(parts[2] + parts[0] + parts[1], whole)


@needs_native
def test_histogram_threads_change_no_count():
    values = random_rows(4000, 100, seed=10).reshape(-1)
    buckets = statistics._native_buckets(HALF, GAMMA, SMALLEST)
    one, many = new_counts(), new_counts()
    buckets.add(values.numpy(), one.numpy(), 1)
    buckets.add(values.numpy(), many.numpy(), 5)
    assert torch.equal(one, many) and one.sum() == values.numel()


@settings(max_examples=50, deadline=None)
@given(x=st.floats(2.0**-16, 2.0**13, width=32), negative=st.booleans())
def test_bucket_value_is_within_the_promised_error(x, negative):
    value = torch.tensor(-x if negative else x)
    counts = new_counts()
    log_histogram(value, counts, GAMMA, SMALLEST)
    k = int(counts.argmax()) - HALF
    stands_for = bucket_value(k, GAMMA, SMALLEST)
    promised = (GAMMA - 1) / (GAMMA + 1)
    assert abs(stands_for - value.item()) <= abs(value.item()) * (promised + 1e-6)
    assert bucket_value(torch.tensor([k, 0]), GAMMA, SMALLEST).tolist() == pytest.approx([stands_for, 0.0])


def test_quantiles_from_counts_are_close_to_the_exact_ones():
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(11))
    counts = new_counts()
    log_histogram(values, counts, GAMMA, SMALLEST)
    cumulative = counts.cumsum(0)
    for q in (0.01, 0.25, 0.6, 0.99):
        position = int(torch.searchsorted(cumulative, torch.tensor(q * values.numel())))
        assert bucket_value(position - HALF, GAMMA, SMALLEST) == pytest.approx(
            values.quantile(q).item(), rel=0.011
        )


@pytest.mark.parametrize(
    ("counts", "gamma", "smallest", "words"),
    [
        (torch.zeros(4, dtype=torch.int64), 1.02, 1e-6, "2B \\+ 1"),
        (torch.zeros(5), 1.02, 1e-6, "int64"),
        (torch.zeros(5, dtype=torch.int64), 1.0, 1e-6, "gamma must be > 1"),
        (torch.zeros(5, dtype=torch.int64), 1.02, 0.0, "smallest"),
        (torch.zeros(2001, dtype=torch.int64), 2.0, 1e-6, "do not fit float32"),
        (torch.zeros(2001, dtype=torch.int64), 1.0 + 1e-9, 1e-6, "do not fit float32"),
    ],
)
@pytest.mark.parametrize("do", [log_histogram, log_histogram_reference])
def test_histogram_refuses_what_does_not_fit(do, counts, gamma, smallest, words):
    with pytest.raises(ValueError, match=words):
        do(torch.ones(3), counts, gamma, smallest)
