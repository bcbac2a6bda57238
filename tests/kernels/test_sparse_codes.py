"""Sparse codes: native kernels, their PyTorch references and a float64 brute force agree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actlas.kernels import encode, sparse_codes
from actlas.kernels.encode import encode_topk, encode_topk_reference
from actlas.kernels.sparse_codes import (
    gather_dot,
    gather_dot_reference,
    scatter_outer,
    scatter_outer_reference,
    sparse_decode,
    sparse_decode_reference,
    topk,
    topk_reference,
)
from actlas.kernels.statistics import native_available

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")

LEVELS = ("baseline", "avx2", "avx512")
nan, inf = math.nan, math.inf


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(n: int, m: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices with repeats in a row, and values of which a quarter are 0."""
    g = generator(seed)
    values = torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) > 0.25)
    return torch.randint(0, m, (n, k), generator=g), values


def dense(indices: Tensor, values: Tensor, m: int) -> Tensor:
    return torch.zeros(len(indices), m, dtype=torch.float64).scatter_add_(1, indices, values.double())


# -- topk -----------------------------------------------------------------------------------------------


def brute_topk(x: Tensor, k: int, relu: bool) -> tuple[list[list[float]], list[list[int]]]:
    values, indices = [], []
    for row in x.double().tolist():
        order = sorted(range(len(row)), key=lambda i: (-(inf if math.isnan(row[i]) else row[i]), i))
        nans = [i for i in order if math.isnan(row[i])]
        order = (nans + [i for i in order if not math.isnan(row[i])])[:k]
        indices.append(order)
        values.append([0.0 if relu and row[i] < 0 else row[i] for i in order])
    return values, indices


@pytest.mark.parametrize("do", [topk, topk_reference])
@settings(max_examples=80, deadline=None)
@given(
    x=st.integers(1, 60).flatmap(
        lambda m: st.lists(
            st.lists(
                st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 2.5, inf, -inf, nan, 1e-40, -3.0, 7.0]),
                min_size=m,
                max_size=m,
            ),
            min_size=1,
            max_size=3,
        )
    ),
    share=st.floats(0, 1),
    relu=st.booleans(),
)
def test_topk_equals_a_sort_with_ties_and_nan(do, x, share, relu):
    rows = torch.tensor(x)
    k = 1 + int(share * (rows.shape[1] - 1))
    values, indices = do(rows, k, relu)
    expected_values, expected_indices = brute_topk(rows, k, relu)
    assert indices.tolist() == expected_indices
    torch.testing.assert_close(values, torch.tensor(expected_values), rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("m", "k"), [(4608, 32), (1000, 7), (577, 100), (64, 64), (40, 1), (3, 2)])
def test_topk_of_every_instruction_set_equals_the_reference(level, m, k):
    from actlas.kernels import _native

    x = torch.randn(20, m, generator=generator(m))
    x[1] = x[1].round()  # many ties
    x[2] = 0.25  # nothing but ties
    x[3, m // 2] = nan
    x[4, ::2] = -inf  # masked entries
    x[5, : m // 2] = inf
    x[6] = -x[6].abs()
    x[7] *= 1e-39
    expected = topk_reference(x, k)
    values, indices = torch.empty(20, k), torch.empty(20, k, dtype=torch.int64)
    _native.topk(x.numpy(), True, values.numpy(), indices.numpy(), 1, level)
    torch.testing.assert_close((values, indices), expected, rtol=0, atol=0, equal_nan=True)
    low = x.bfloat16()
    expected = topk_reference(low.float(), k, relu=False)
    _native.topk_bfloat16(low.view(torch.uint16).numpy(), False, values.numpy(), indices.numpy(), 1, level)
    torch.testing.assert_close((values, indices), expected, rtol=0, atol=0, equal_nan=True)


def test_topk_takes_views_dtypes_and_no_rows():
    x = torch.randn(8, 300, generator=generator(0))
    whole = topk_reference(x, 5)
    for view in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :300], x.double(), x.requires_grad_()):
        values, indices = topk(view, 5)
        assert torch.equal(indices, whole[1]) and torch.equal(values.float(), whole[0])
    half = topk(x.detach().half(), 5)
    assert half[0].dtype == torch.float16
    low = topk(x.detach().bfloat16(), 5)
    assert low[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(low, topk_reference(x.bfloat16(), 5), strict=True))
    values, indices = topk(torch.empty(0, 300), 5)
    assert values.shape == indices.shape == (0, 5) and indices.dtype == torch.int64


# -- decoder and gradients ------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(0, 40), st.integers(1, 50), st.integers(1, 70), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000), strided=st.booleans())
def test_decode_dot_and_outer_equal_dense_products_in_float64(shape, seed, strided):
    n, m, d, k = shape
    indices, values = random_codes(n, m, k, seed)
    weight, rows = (torch.randn(rows, d, generator=generator(seed + 1)) for rows in (m, n))
    if strided:  # rows of wider matrices
        weight, rows = (torch.cat([t, t], 1)[:, :d] for t in (weight, rows))
    z, w, r = dense(indices, values, m), weight.double(), rows.double()
    start = torch.randn(m, d, generator=generator(seed + 2))
    for decode in (sparse_decode, sparse_decode_reference):
        torch.testing.assert_close(decode(indices, values, weight).double(), z @ w, rtol=1e-4, atol=1e-4)
    for dot in (gather_dot, gather_dot_reference):
        expected = (r @ w.T).gather(1, indices)
        torch.testing.assert_close(dot(indices, rows, weight).double(), expected, rtol=1e-4, atol=1e-4)
    for outer in (scatter_outer, scatter_outer_reference):
        expected = z.T @ r
        got = outer(indices, values, rows, m)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        out = start.clone()
        assert outer(indices, values, rows, m, out) is out
        torch.testing.assert_close(out.double(), start.double() + expected, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("d", [1, 5, 64, 577])
def test_every_instruction_set_decodes_and_scatters(level, d):
    from actlas.kernels import _native

    n, m, k = 30, 50, 6
    indices, values = random_codes(n, m, k, d)
    weight, rows = torch.randn(m, d, generator=generator(d)), torch.randn(n, d, generator=generator(d + 1))
    y, g, dot = torch.empty(n, d), torch.empty(m, d), torch.empty(n, k)
    i, v, w, r = (t.numpy() for t in (indices, values, weight, rows))
    _native.sparse_decode(i, v, w, y.numpy(), 1, level)
    _native.gather_dot(i, r, w, dot.numpy(), 1, level)
    _native.scatter_outer(i, v, r, g.numpy(), False, 1, level)
    z = dense(indices, values, m)
    torch.testing.assert_close(y.double(), z @ weight.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(g.double(), z.T @ rows.double(), rtol=1e-4, atol=1e-4)
    expected = (rows.double() @ weight.double().T).gather(1, indices)
    torch.testing.assert_close(dot.double(), expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_threads_change_no_bit():
    from actlas.kernels import _native

    n, m, d, k = 600, 700, 65, 16
    x = torch.randn(n, m, generator=generator(3))
    weight, rows = torch.randn(m, d, generator=generator(4)), torch.randn(n, d, generator=generator(5))
    results = []
    for threads in (1, 2, 5):
        values, indices = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
        y, g, dot = torch.empty(n, d), torch.empty(m, d), torch.empty(n, k)
        i, v = indices.numpy(), values.numpy()
        _native.topk(x.numpy(), True, v, i, threads)
        _native.sparse_decode(i, v, weight.numpy(), y.numpy(), threads)
        _native.gather_dot(i, rows.numpy(), weight.numpy(), dot.numpy(), threads)
        _native.scatter_outer(i, v, rows.numpy(), g.numpy(), False, threads)
        results.append((values, indices, y, dot, g))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_nan_stays_where_it_belongs():
    indices = torch.tensor([[0, 1], [1, 2]])
    values = torch.tensor([[1.0, nan], [2.0, 3.0]])
    weight = torch.eye(3)
    assert sparse_decode(indices, values, weight).isnan().any(1).tolist() == [True, False]
    assert scatter_outer(indices, values, torch.ones(2, 4), 3).isnan().any(1).tolist() == [False, True, False]


@needs_native
def test_native_is_what_float32_takes(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("the reference was used")

    for name in ("topk", "sparse_decode", "gather_dot", "scatter_outer"):
        monkeypatch.setattr(sparse_codes, f"{name}_reference", fail)
    values, indices = topk(torch.randn(4, 30), 3)
    weight, rows = torch.randn(30, 8), torch.randn(4, 8)
    sparse_decode(indices, values, weight)
    gather_dot(indices, rows, weight)
    scatter_outer(indices, values, rows, 30)


def test_without_the_native_module_the_references_are_used(monkeypatch):
    monkeypatch.setattr(sparse_codes, "_native", lambda: None)
    x = torch.randn(5, 40, generator=generator(6))
    values, indices = topk(x, 4)
    assert torch.equal(indices, topk_reference(x, 4)[1])
    weight = torch.randn(40, 6, generator=generator(7))
    expected = dense(indices, values, 40) @ weight.double()
    torch.testing.assert_close(
        sparse_decode(indices, values, weight).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_other_dtypes_take_the_reference_and_keep_their_dtype():
    indices, values = random_codes(6, 20, 3, 8)
    weight, rows = torch.randn(20, 5).double(), torch.randn(6, 5).double()
    assert sparse_decode(indices, values.double(), weight).dtype == torch.float64
    assert gather_dot(indices, rows, weight).dtype == torch.float64
    assert scatter_outer(indices, values, rows, 20).dtype == torch.float64


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda: topk(torch.zeros(2, 3), 4), "k must be between 1 and the width 3, not 4"),
        (lambda: topk(torch.zeros(2, 3), 0), "not 0"),
        (lambda: topk(torch.zeros(3), 1), r"float \[n, m\]"),
        (lambda: topk(torch.zeros(2, 3, dtype=torch.int64), 1), "int64"),
        (lambda: sparse_decode(torch.tensor([[3]]), torch.ones(1, 1), torch.zeros(3, 2)), "0 ... 2, not 3"),
        (lambda: sparse_decode(torch.tensor([[-1]]), torch.ones(1, 1), torch.zeros(3, 2)), "not -1"),
        (lambda: sparse_decode(torch.tensor([[0]]), torch.ones(1, 2), torch.zeros(3, 2)), "values must be"),
        (lambda: sparse_decode(torch.tensor([[0.0]]), torch.ones(1, 1), torch.zeros(3, 2)), "int64"),
        (lambda: gather_dot(torch.tensor([[0]]), torch.ones(2, 2), torch.zeros(3, 2)), r"\[2, k\]"),
        (lambda: gather_dot(torch.tensor([[0]]), torch.ones(1, 3), torch.zeros(3, 2)), r"\[m, 3\]"),
        (lambda: gather_dot(torch.tensor([[9]]), torch.ones(1, 2), torch.zeros(3, 2)), "not 9"),
        (lambda: scatter_outer(torch.tensor([[5]]), torch.ones(1, 1), torch.ones(1, 2), 3), "not 5"),
        (lambda: scatter_outer(torch.tensor([[0]]), torch.ones(1, 1), torch.ones(2, 2), 3), r"\[1, d\]"),
        (
            lambda: scatter_outer(
                torch.tensor([[0]]), torch.ones(1, 1), torch.ones(1, 2), 3, torch.ones(3, 1)
            ),
            r"out must be float \[3, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(do, words):
    with pytest.raises(ValueError, match=words):
        do()


# -- encode_topk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_encode_topk_chooses_as_the_whole_product_does(precision, relu, scaled, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK", 7 * 400)  # several chunks, the last one short
    g = generator(9)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((40, 24), (400, 24), (400,)))
    x[3] = 0  # everything hangs on the bias
    bias[5:9] = bias.max() + 1  # ties at x = 0
    scale = 0.5 + torch.rand(400, generator=g) if scaled else None
    values, indices = encode_topk(x, weight, bias, 11, scale=scale, relu=relu, precision=precision)
    double = None if scale is None else scale.double()
    expected = encode_topk_reference(x.double(), weight.double(), bias.double(), 11, scale=double, relu=relu)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values.double(), expected[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_falls_back_where_candidates_lie_close():
    # All rows of the weight are nearly the same: bfloat16 cannot tell them apart, float32 can.
    g = generator(10)
    weight = torch.ones(300, 16) + 1e-4 * torch.randn(300, 16, generator=g)
    x = torch.rand(10, 16, generator=g)
    values, indices = encode_topk(x, weight, None, 4, precision="bfloat16")
    expected = encode_topk_reference(x.double(), weight.double(), None, 4)
    torch.testing.assert_close(values.double(), expected[0], rtol=1e-6, atol=1e-6)
    assert (indices == expected[1]).float().mean() > 0.9  # float32 itself may swap two that are close


def test_encode_topk_shows_nan_and_takes_no_rows():
    x = torch.ones(2, 4)
    x[1, 2] = nan
    for precision in ("float32", "bfloat16"):
        values, _ = encode_topk(x, torch.ones(90, 4), None, 3, precision=precision)
        assert values.isnan().all(1).tolist() == [False, True]
        values, indices = encode_topk(torch.empty(0, 4), torch.ones(90, 4), None, 3, precision=precision)
        assert values.shape == indices.shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(2, 3), torch.ones(5, 4), None, 1), r"weight must be torch.float32 \[m, 3\]"),
        ((torch.ones(2, 3), torch.ones(5, 3), torch.ones(4), 1), r"bias must be torch.float32 \[5\]"),
        ((torch.ones(2, 3), torch.ones(5, 3), None, 6), "between 1 and the width 5, not 6"),
        ((torch.ones(3), torch.ones(5, 3), None, 1), "x must be"),
    ],
)
def test_encode_topk_refuses_what_does_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        encode_topk(*arguments)
    with pytest.raises(ValueError, match="precision must be"):
        encode_topk(torch.ones(1, 2), torch.ones(3, 2), None, 1, precision="int8")  # type: ignore[arg-type]
