"""Products that leave out columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.kernels.columns import (
    column_product,
    column_product_reference,
    column_products,
    column_products_reference,
    pack_column_codes,
    pack_columns,
)
from actlas.kernels.loading import native
from actlas.kernels.packed import pack


@pytest.mark.skipif(native() is None, reason="no native kernels")
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["f32", "bf16", "q8", "q4", "q2"]), st.integers(1, 300), st.integers(1, 5), st.floats(0, 1),
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


@pytest.mark.skipif(native() is None, reason="no native kernels")
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["f32", "bf16", "q8", "q4", "q2"]), st.sampled_from([32, 64, 128]), st.integers(1, 150),
    st.integers(1, 3), st.integers(2, 11), st.floats(0, 1), st.sampled_from(["best", "avx2", "baseline"]),
    st.integers(0, 3),
)  # fmt: skip
def test_several_tokens_and_groups(
    format: str, group: int, rows: int, groups: int, tokens: int, skipped: float, level: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = pack_columns(torch.randn(rows, group * groups, generator=generator), format, group=group)  # type: ignore[arg-type]
    x = torch.randn(tokens, group * groups, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < skipped, 0.0, x)
    want = column_products_reference(w, x)
    found = column_products(w, x, level=level)
    assert torch.allclose(found, want, rtol=0, atol=1e-4 * float(want.abs().max()) + 1e-6)
    exact = x @ w.dequantised().T
    assert torch.allclose(want, exact, rtol=0, atol=2e-3 * float(exact.abs().max()) + 1e-6)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("format", ["q8", "q4", "q2"])
def test_columns_and_rows_stand_for_the_same_weight(format: str, group: int) -> None:
    weight = torch.randn(150, 256)
    assert torch.equal(
        pack_columns(weight, format, group=group).dequantised(),  # type: ignore[arg-type]
        pack(weight, format, group=group).dequantised(),  # type: ignore[arg-type]
    )


def test_chosen_codes_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (70, 64), generator=generator)
    scale, minimum = torch.rand(2, 70, 2, generator=generator).half().float()
    w = pack_column_codes(codes, scale, minimum)
    assert torch.equal(w.codes(), codes.to(torch.uint8))
    torch.testing.assert_close(
        w.dequantised(), codes * scale.repeat_interleave(32, 1) + minimum.repeat_interleave(32, 1)
    )
    with pytest.raises(ValueError, match="lie in 0 to 15"):
        pack_column_codes(codes + 1, scale, minimum)


def test_skipped_columns_are_never_read() -> None:
    for format in ("f32", "bf16"):
        w = pack_columns(torch.randn(20, 64), format)  # type: ignore[arg-type]
        x = torch.zeros(64)
        x[5] = 2.0
        want = 2 * w.dequantised()[:, 5]
        lines = w.data.view(64, -1)
        keep = lines[5].clone()
        lines.fill_(255)  # NaN everywhere else
        lines[5] = keep
        assert torch.equal(column_product(w, x), want)
    for format in ("f32", "q8", "q4", "q2"):
        w = pack_columns(torch.randn(20, 64), format)  # type: ignore[arg-type]
        assert torch.equal(column_product(w, torch.zeros(64)), torch.zeros(20))
        assert column_products(w, torch.zeros(0, 64)).shape == (0, 20)
    x = torch.zeros(64)
    x[3] = torch.nan
    for format in ("f32", "bf16", "q8", "q4"):
        for level in ("best", "baseline"):
            w = pack_columns(torch.ones(4, 64), format)  # type: ignore[arg-type]
            assert bool(column_product(w, x, level=level).isnan().all())


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
