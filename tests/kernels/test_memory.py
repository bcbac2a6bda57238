"""Weights side by side and in large pages are the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actlas.kernels.memory import in_large_pages, together
from actlas.kernels.packed import pack, packed_product


def test_nothing_changes_but_the_place() -> None:
    large = torch.randint(0, 255, (6 << 20,), dtype=torch.uint8)
    before = large.clone()
    assert in_large_pages(large) is large
    assert torch.equal(large, before)
    kinds = [torch.randn(3, 5), torch.arange(7), torch.zeros(0), torch.ones(2, 2, dtype=torch.float16), large]
    moved = together(kinds)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kinds, moved, strict=True))
    assert all(t.data_ptr() % 64 == 0 for t in moved if t.numel())
    assert len({t.untyped_storage().data_ptr() for t in moved}) == 1
    assert together([]) == []


def test_products_of_moved_weights() -> None:
    weights = [pack(torch.randn(40, 64), format) for format in ("q4", "q3", "bf16")]  # type: ignore[arg-type]
    x = torch.randn(2, 64)
    for w, data in zip(weights, together([w.data for w in weights]), strict=True):
        assert torch.equal(packed_product(replace(w, data=data), x), packed_product(w, x))


def test_other_devices_are_named() -> None:
    with pytest.raises(ValueError, match="meta"):
        together([torch.empty(3, device="meta")])
