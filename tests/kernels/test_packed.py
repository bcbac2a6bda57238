"""Packed linear layers: the bytes, their products, and the PyTorch reference that holds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.kernels.loading import native
from actlas.kernels.packed import GROUP, Packed, pack, packed_product, packed_product_reference

LEVELS = ("best", "avx2", "baseline")
needs_native = pytest.mark.skipif(native() is None, reason="no native kernels")


def _weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["f32", "q8", "q4"]), st.integers(1, 50), st.integers(1, 5), st.integers(1, 11),
    st.booleans(), st.booleans(), st.sampled_from(LEVELS), st.integers(0, 3),
)  # fmt: skip
def test_native_products_are_those_of_the_reference(
    format: str, rows: int, groups: int, tokens: int, bias: bool, two: bool, level: str, seed: int
) -> None:
    w = pack(_weight(rows, groups * GROUP, seed), format, torch.randn(rows) if bias else None)  # type: ignore[arg-type]
    x = _weight(tokens, groups * GROUP, seed + 9) * 3
    want = packed_product_reference(w, x, two_bytes=two)
    found = packed_product(w, x, two_bytes=two, level=level)
    tolerance = 5e-5 if two else 2e-2  # a tie may round either way
    assert torch.allclose(found, want, rtol=0, atol=tolerance * float(want.abs().max()) + 1e-6)


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_packing_rounds_to_the_nearest_value_of_the_grid(format: str) -> None:
    weight = _weight(20, 64)
    w = pack(weight, format)  # type: ignore[arg-type]
    error = (w.dequantised() - weight).abs().view(20, 2, GROUP)
    groups = weight.view(20, 2, GROUP)
    step = groups.abs().amax(-1) / 127 if format == "q8" else (groups.amax(-1) - groups.amin(-1)) / 15
    assert bool((error <= step.unsqueeze(-1) * 0.51 + 2e-3 * groups.abs().amax(-1, keepdim=True)).all())
    assert w.bytes == 2 * 2 * (544 if format == "q8" else 320)


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_weights_on_the_grid_are_packed_without_loss(format: str) -> None:
    once = pack(_weight(32, 96), format).dequantised()  # type: ignore[arg-type]
    assert torch.equal(pack(once, format).dequantised(), once)  # type: ignore[arg-type]


def test_two_bytes_are_nearly_exact() -> None:
    w, x = pack(_weight(48, 128), "q4"), _weight(4, 128, 1)
    exact = x @ w.dequantised().T
    two, one = (packed_product(w, x, two_bytes=t) for t in (True, False))
    assert (
        float((two - exact).norm() / exact.norm()) < 1e-4 < float((one - exact).norm() / exact.norm()) < 2e-2
    )


def test_constant_and_zero_groups_are_kept() -> None:
    weight = torch.zeros(16, 64)
    weight[3] = 0.25
    for format in ("q8", "q4"):
        found = pack(weight, format).dequantised()  # type: ignore[arg-type]
        assert torch.allclose(found, weight, atol=1e-3)
    assert torch.equal(packed_product(pack(weight, "q4"), torch.zeros(2, 64)), torch.zeros(2, 16))


@pytest.mark.parametrize(
    ("weight", "format", "said"),
    [
        (torch.zeros(4, 33), "q4", "multiple of 32"),
        (torch.zeros(4, 32), "q5", "'f32', 'q8' or 'q4'"),
        (torch.zeros(4), "f32", "matrix"),
        (torch.full((4, 32), torch.nan), "q4", "NaN"),
        (torch.full((4, 32), torch.inf), "f32", "NaN or infinity"),
    ],
)
def test_bad_weights_are_named(weight: torch.Tensor, format: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack(weight, format)  # type: ignore[arg-type]


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens, 32"):
        packed_product(pack(torch.ones(4, 32)), torch.ones(2, 64))
    assert packed_product(pack(torch.ones(4, 32)), torch.ones(0, 32)).shape == (0, 4)


@needs_native
def test_data_of_another_size_never_reaches_the_loops() -> None:
    good = pack(torch.ones(16, 32))
    with pytest.raises(ValueError, match="size of its format"):
        Packed("q4", good.data[:-1].clone(), 16, 32).handle()
