"""Products that leave out columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.kernels.columns import column_product, column_product_reference, pack_columns
from actlas.kernels.loading import native
from actlas.kernels.packed import pack


@pytest.mark.skipif(native() is None, reason="no native kernels")
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["f32", "bf16", "q8", "q4"]), st.integers(1, 200), st.integers(1, 5), st.floats(0, 1),
    st.booleans(), st.sampled_from(["best", "avx2", "baseline"]), st.integers(0, 3),
)  # fmt: skip
def test_native_products_are_those_of_the_reference(
    format: str, rows: int, groups: int, skipped: float, two: bool, level: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = pack_columns(torch.randn(rows, 32 * groups, generator=generator), format)  # type: ignore[arg-type]
    x = torch.randn(32 * groups, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < skipped, 0.0, x)
    want = column_product_reference(w, x, two_bytes=two)
    found = column_product(w, x, two_bytes=two, level=level)
    assert torch.allclose(found, want, rtol=0, atol=(1e-4 if two else 2e-2) * float(want.abs().max()) + 1e-6)


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_columns_and_rows_stand_for_the_same_weight(format: str) -> None:
    weight = torch.randn(150, 96)
    assert torch.equal(
        pack_columns(weight, format).dequantised(),  # type: ignore[arg-type]
        pack(weight, format).dequantised(),  # type: ignore[arg-type]
    )


def test_float_columns_keep_the_weight() -> None:
    weight = torch.randn(10, 7)
    assert torch.equal(pack_columns(weight).dequantised(), weight)
    x = torch.randn(7)
    assert torch.allclose(column_product(pack_columns(weight), x), weight @ x, atol=1e-5)
    assert torch.equal(column_product(pack_columns(weight), torch.zeros(7)), torch.zeros(10))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_columns(torch.ones(4, 33), "q4")
    with pytest.raises(ValueError, match="'f32', 'bf16'"):
        pack_columns(torch.ones(4, 32), "q5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be \[32\]"):
        column_product(pack_columns(torch.ones(4, 32)), torch.ones(2, 32))
