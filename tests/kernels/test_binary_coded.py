"""Binary-coded weights and products by look-up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.kernels.binary_coded import (
    BinaryCoded,
    Counts,
    lookup_product,
    lookup_product_reference,
    table_product,
)
from actlas.kernels.loading import native


def _random(
    bits: int, rows: int, columns: int, group: int, offset: bool = True, half: bool = False, seed: int = 0
) -> BinaryCoded:
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if half else torch.float32
    alpha = torch.randn(bits, rows, columns // group, generator=g).to(dtype)
    o = torch.randn(rows, columns // group, generator=g).to(dtype) if offset else None
    return BinaryCoded.of(torch.randn(bits, rows, columns, generator=g), alpha, o)


@pytest.mark.skipif(native() is None, reason="no native kernels")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 50), st.sampled_from([32, 64, 96]), st.integers(1, 3), st.integers(1, 3),
    st.booleans(), st.booleans(), st.sampled_from(["best", "avx2", "baseline"]), st.integers(0, 3),
)  # fmt: skip
def test_the_kernel_is_the_dense_product(
    bits: int,
    rows: int,
    group: int,
    groups: int,
    tokens: int,
    offset: bool,
    half: bool,
    level: str,
    seed: int,
) -> None:
    w = _random(bits, rows, group * groups, group, offset, half, seed)
    x = torch.randn(tokens, w.columns, generator=torch.Generator().manual_seed(seed))
    found, want = lookup_product(w, x, level=level), x.double() @ w.dequantised().double().T
    size = float((x.abs() @ w.dequantised().abs().T).max())
    assert torch.allclose(found.double(), want, rtol=0, atol=2e-6 * (size + 10 * bits))
    assert torch.allclose(lookup_product_reference(w, x).double(), want, rtol=0, atol=2e-6 * size + 1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_integers_become_signs_without_loss(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (96, 192), generator=g)
    scale = torch.rand(96, 3, generator=g)
    zero = torch.randint(0, 2**bits, (96, 3), generator=g).float()
    w = BinaryCoded.from_integers(codes, scale, zero, bits)
    want = (codes - zero.repeat_interleave(64, 1)) * scale.repeat_interleave(64, 1)
    assert float((w.dequantised() - want).abs().max()) < 5e-7 * 2**bits
    assert w.bits_per_weight == bits + 32 * (bits + 1) / 64
    with pytest.raises(ValueError, match="lie in 0 to"):
        BinaryCoded.from_integers(codes + 1, scale, zero, bits)


def test_keys_and_tables_agree_input_by_input() -> None:
    w = _random(2, 5, 64, 32)
    rows = torch.stack([table_product(w, x) for x in torch.eye(64)])
    assert torch.allclose(rows.T, w.dequantised().double(), atol=1e-6)
    for level in ("best", "avx2", "baseline"):
        assert torch.allclose(lookup_product(w, torch.eye(64), level=level).T, w.dequantised(), atol=1e-6)


def test_operations_are_those_of_the_formula() -> None:
    m, n, q, g = 24, 128, 3, 32
    w, counts = _random(q, m, n, g), Counts()
    table_product(w, torch.randn(n), counts)
    assert counts.lookups == m * q * n // 8
    assert counts.multiplies == m * q * n // g + m * n // g
    assert counts.adds == n // 8 * (8 + 255) + m * q * n // 8


def test_small_groups_take_the_reference_and_bad_input_is_named() -> None:
    w = _random(2, 6, 48, 8)
    x = torch.randn(2, 48)
    assert torch.equal(lookup_product(w, x), lookup_product_reference(w, x))
    with pytest.raises(ValueError, match="tokens, 48"):
        lookup_product(w, torch.ones(2, 40))
    with pytest.raises(ValueError, match="multiple of 8"):
        BinaryCoded.of(torch.ones(1, 2, 12), torch.ones(1, 2, 1))
    with pytest.raises(ValueError, match="alpha must be"):
        BinaryCoded.of(torch.ones(1, 2, 16), torch.ones(2, 2, 1))
    x[0, 0] = torch.nan
    for level in ("best", "baseline"):
        assert bool(
            lookup_product(_random(2, 6, 64, 32), torch.full((1, 64), torch.nan), level=level).isnan().all()
        )


def test_zero_counts_as_minus_one_and_never_as_zero() -> None:
    w = BinaryCoded.of(torch.zeros(1, 1, 8), torch.ones(1, 1, 1))
    assert w.dequantised().tolist() == [[-1.0] * 8]
