"""Packed linear layers: the bytes, their products, and the PyTorch reference that holds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.kernels.loading import native
from actlas.kernels.packed import (
    GROUP,
    Packed,
    pack,
    pack_codes,
    packed_product,
    packed_product_reference,
)

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
        (torch.zeros(4, 32), "q5", "'q8', 'q4', 'q3', 'q2'"),
        (torch.zeros(4, 96), "q4-g64", "groups of 32 fit"),
        (torch.zeros(4), "f32", "matrix"),
        (torch.full((4, 32), torch.nan), "q4", "NaN"),
        (torch.full((4, 32), torch.inf), "f32", "NaN or infinity"),
    ],
)
def test_bad_weights_are_named(weight: torch.Tensor, format: str, said: str) -> None:
    name, _, group = format.partition("-g")
    with pytest.raises(ValueError, match=said):
        pack(weight, name, group=int(group or 0) or None)  # type: ignore[arg-type]


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens, 32"):
        packed_product(pack(torch.ones(4, 32)), torch.ones(2, 64))
    assert packed_product(pack(torch.ones(4, 32)), torch.ones(0, 32)).shape == (0, 4)


@needs_native
def test_data_of_another_size_never_reaches_the_loops() -> None:
    good = pack(torch.ones(16, 32))
    with pytest.raises(ValueError, match="size of its format"):
        Packed("q4", good.data[:-1].clone(), 16, 32).handle()


OFFSETS = [(f, o) for f in ("q8", "q4", "q3", "q2") for o in ("none", "minimum", "integer")]


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*OFFSETS, ("f4", None), ("bf16", None), ("e4m3", None), ("e5m2", None)]),
    st.sampled_from([32, 64, 128]), st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.booleans(),
    st.booleans(), st.sampled_from(LEVELS), st.integers(0, 3),
)  # fmt: skip
def test_every_format_group_and_offset(
    kind: tuple[str, str | None], group: int, rows: int, groups: int, tokens: int, bias: bool, two: bool,
    level: str, seed: int,
) -> None:  # fmt: skip
    format, offset = kind
    w = pack(
        _weight(rows, groups * group, seed), format, torch.randn(rows) if bias else None,  # type: ignore[arg-type]
        group=group, offset=offset,  # type: ignore[arg-type]
    )  # fmt: skip
    x = _weight(tokens, groups * group, seed + 9)
    want = packed_product_reference(w, x, two_bytes=two)
    found = packed_product(w, x, two_bytes=two, level=level)
    exact = x.double() @ w.dequantised().double().T + (0 if w.bias is None else w.bias)
    tolerance = 5e-5 if two else 2e-2
    size = float((x.abs() @ w.dequantised().abs().T).max())
    assert torch.allclose(found, want, rtol=0, atol=tolerance * size)
    assert torch.allclose(want.double(), exact, rtol=0, atol=(2e-4 if two else 2e-2) * size)


@pytest.mark.parametrize(("format", "offset"), OFFSETS)
@pytest.mark.parametrize("group", [32, 128])
def test_chosen_codes_are_kept(format: str, offset: str, group: int) -> None:
    generator = torch.Generator().manual_seed(1)
    bits = int(format[1])
    codes = torch.randint(0, 2**bits, (21, 256), generator=generator)
    scale = torch.rand(21, 256 // group, generator=generator).half().float()
    values = None if offset == "none" else torch.randint(0, 2**bits, scale.shape, generator=generator).float()
    w = pack_codes(codes, scale, values, format, offset=offset)  # type: ignore[arg-type]
    step = scale.repeat_interleave(group, 1)
    zero = 2 ** (bits - 1) if values is None else values.repeat_interleave(group, 1)
    want = codes * step + zero if offset == "minimum" else (codes - zero) * step
    torch.testing.assert_close(w.dequantised(), want)
    assert w.bytes == 32 * 256 * bits // 8 + 32 * (256 // group) * (2 if values is None else 4)
    with pytest.raises(ValueError, match="lie in 0 to"):
        pack_codes(codes + 1, scale, values, format, offset=offset)  # type: ignore[arg-type]


@pytest.mark.parametrize(("format", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
@pytest.mark.parametrize("level", LEVELS)
def test_every_finite_value_of_an_8_bit_float_is_read_as_torch_reads_it(
    format: str, dtype: torch.dtype, level: str
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).float()
    finite = values.isfinite()
    values = torch.where(finite, values, 0.0)
    codes = torch.where(finite, codes, 0).to(torch.uint8)
    data = torch.cat([codes, torch.ones(1).view(torch.uint8)])
    w = Packed(format, data, 1, 256, None, 256)  # type: ignore[arg-type]
    assert torch.equal(w.dequantised()[0], values)
    found = torch.cat([packed_product(w, row.unsqueeze(0), level=level) for row in torch.eye(256)])
    assert torch.equal(found.flatten(), values)


def test_4_bit_floats_are_the_nearest() -> None:
    from actlas.kernels.packed_layout import FLOAT4, nearest_float4

    table = torch.tensor(FLOAT4, dtype=torch.float32)
    x = torch.linspace(-13, 13, 5000)
    best = (x.unsqueeze(-1) - table).abs().amin(-1)
    assert torch.equal((x - table[nearest_float4(x).long()]).abs(), best)
    assert torch.equal(table[nearest_float4(table).long()], table)
    assert nearest_float4(torch.tensor([2.5, 3.5, 5.0, 7.0])).tolist() == [2, 4, 4, 6]  # ties: the even code
    w = pack(_weight(5, 64), "f4")
    assert torch.equal(pack(w.dequantised(), "f4").dequantised(), w.dequantised())


def test_odd_widths_of_floats() -> None:
    x, weight = _weight(3, 37, 1), _weight(5, 37)
    for format, error in (("bf16", 1e-2), ("e4m3", 1e-1), ("e5m2", 2e-1)):
        w = pack(weight, format)  # type: ignore[arg-type]
        assert (w.dequantised() - weight).norm() < error * weight.norm()
        torch.testing.assert_close(packed_product(w, x), x @ w.dequantised().T, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("format", ["q8", "q4", "q3", "bf16", "e4m3"])
def test_activations_that_are_not_numbers_spoil_their_token_only(format: str, bad: float) -> None:
    w, x = pack(_weight(20, 64), format), _weight(3, 64, 1)  # type: ignore[arg-type]
    good = packed_product(w, x)
    x[1, 40] = bad
    for level in LEVELS:
        found = packed_product(w, x, level=level)
        assert not bool(found[1].isfinite().any())
        assert torch.allclose(found[[0, 2]], good[[0, 2]], atol=1e-4)
