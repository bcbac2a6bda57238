"""Rows out of arrays, memory maps and tensors: native and reference agree, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.kernels import gather
from actlas.kernels.gather import gather_rows, gather_rows_reference
from actlas.kernels.statistics import native_available
from tests.kernels.test_sparse_codes import LEVELS, generator

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 70), count=st.integers(0, 60), scaled=st.booleans())
def test_rows_equal_plain_indexing(dtype, n, d, count, scaled):
    g = generator(n * 100 + d)
    source = (torch.randn(n, d, generator=g) * 30).to(dtype)
    at = torch.randint(0, n, (count,), generator=g)
    scales = torch.rand(n, 1, generator=g) if scaled else None
    expected = source[at].float() * (scales[at] if scales is not None else 1)
    for do in (gather_rows, gather_rows_reference):
        assert torch.equal(do(source, at, scales=scales), expected)
        out = torch.full((count, d), float("nan"))
        assert do(source, at, out, scales=scales) is out and torch.equal(out, expected)


def test_every_half_is_widened_exactly():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).reshape(64, 1024)
    at = torch.arange(64)
    for dtype in (torch.float16, torch.bfloat16):
        source = bits.view(dtype)
        got, expected = gather_rows(source, at), source.float()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(
            got.nan_to_num(0.0, torch.inf, -torch.inf), expected.nan_to_num(0.0, torch.inf, -torch.inf)
        )


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_and_number_of_threads_agree(level, dtype):
    from actlas.kernels import _native

    source = (torch.randn(3000, 99, generator=generator(1)) * 30).to(dtype)
    at = torch.randperm(3000, generator=generator(2))
    array = source.view(torch.int16).numpy() if dtype == torch.bfloat16 else source.numpy()
    for threads in (1, 2, 5):
        out = torch.empty(3000, 99)
        _native.gather_rows(array, str(dtype)[6:], None, at.numpy(), out.numpy(), threads, level)
        assert torch.equal(out, source[at].float())


def test_memory_maps_bits_of_bfloat16_and_wider_matrices(tmp_path):
    values = torch.randn(50, 24, generator=generator(3))
    at = np.array([49, 0, 7, 7], dtype=np.int32)
    np.save(tmp_path / "half.npy", values.half().numpy())
    mapped = np.load(tmp_path / "half.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert torch.equal(gather_rows(mapped, at), values.half()[[49, 0, 7, 7]].float())
    assert torch.equal(gather_rows(mapped[10:, 3:20], at[1:]), values.half()[10:, 3:20][[0, 7, 7]].float())
    bits = values.bfloat16().view(torch.uint16).numpy()
    assert torch.equal(gather_rows(bits, at), values.bfloat16()[[49, 0, 7, 7]].float())


@pytest.mark.parametrize(
    "source",
    [
        torch.randn(9, 8, dtype=torch.float64),
        np.arange(72, dtype=np.int32).reshape(9, 8),
        torch.randn(9, 16)[:, ::2],
        np.arange(72, dtype=">f4").reshape(9, 8).astype("<f4")[::-1],
    ],
    ids=["float64", "int32", "every other column", "reversed"],
)
def test_what_the_kernel_does_not_take_goes_another_way(source):
    at = torch.tensor([8, 0, 3])
    expected = torch.as_tensor(np.ascontiguousarray(source))[at].float()
    assert torch.equal(gather_rows(source, at), expected)


@needs_native
def test_native_is_what_a_map_takes(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the reference was used")

    monkeypatch.setattr(gather, "gather_rows_reference", fail)
    np.save(tmp_path / "rows.npy", np.ones((5, 3), dtype=np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert gather_rows(mapped, torch.tensor([4])).tolist() == [[1.0, 1.0, 1.0]]
    for dtype in DTYPES:
        gather_rows(torch.ones(3, 4).to(dtype), torch.tensor([0]), scales=torch.ones(3))


def test_without_the_native_module_the_reference_is_used(monkeypatch):
    monkeypatch.setattr(gather, "_native", lambda: None)
    assert gather_rows(
        torch.eye(3, dtype=torch.int8), torch.tensor([2]), scales=torch.full((3,), 0.5)
    ).tolist() == [[0.0, 0.0, 0.5]]


@pytest.mark.parametrize("do", [gather_rows, gather_rows_reference])
def test_what_does_not_fit_is_refused(do):
    source = torch.ones(3, 4)
    with pytest.raises(ValueError, match="0 ... 2, not 1 ... 3"):
        do(source, torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="not -1"):
        do(source, torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"indices must be int64 \[rows\]"):
        do(source, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="indices must be int64"):
        do(source, torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"source must be \[n, d\]"):
        do(torch.ones(3), torch.tensor([1]))
    with pytest.raises(ValueError, match="out must be contiguous float32"):
        do(source, torch.tensor([1]), torch.ones(1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scales must be \[3\]"):
        do(source, torch.tensor([1]), scales=torch.ones(2))
