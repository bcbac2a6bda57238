"""Number formats against independent implementations, on every value that they can hold."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers import (
    FakeQuant,
    Observer,
    QuantParams,
    QuantSpec,
    decode,
    encode,
    fake_quant,
    float_levels,
    gaussian_scale,
    integers,
    lp_search,
    pack,
    params_of,
    percentile,
    quantize,
    representable,
    unpack,
)
from actlas.core.numbers.floats import float_codes, float_values, round_to_float
from actlas.core.numbers.tables import nf4_levels

NAMES = (
    "int4-g64", "int3-channel", "int8-channel-sym", "int4-g32-float", "int2-tensor", "int1-channel-centred",
    "int2-channel-centred-gaussian", "fp8-e4m3-channel", "fp8-e5m2-tensor", "fp6-e3m2-channel", "fp6-e2m3-g32",
    "fp4-e2m1-g32", "fp4-e3m0-channel", "fp4-e1m2-channel", "nf4-g64", "mxfp4", "mxfp8", "mxfp6-e2m3", "nvfp4",
    "log2-4", "binary2-channel", "binary3-g64", "int16-channel-sym",
)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip_and_rounding_twice_changes_nothing(name: str) -> None:
    spec = QuantSpec.parse(name)
    assert QuantSpec.parse(spec.name) == spec
    x = normal(6, 128)
    if spec.grid == "log2":
        x = x.softmax(-1)
    params = params_of(x, spec)
    codes = encode(x, spec, params)
    assert codes.shape == x.shape and codes.dtype in (torch.uint8, torch.int32)
    once = decode(codes, spec, params)
    torch.testing.assert_close(quantize(once, spec, params), once, rtol=1e-5, atol=1e-6)
    low, high = representable(spec, params)
    groups = spec.groups(once)
    assert bool((groups <= high.unsqueeze(-1) * (1 + 1e-5) + 1e-6).all())
    assert bool((groups >= low.unsqueeze(-1) * (1 + 1e-5) - 1e-6).all())


@pytest.mark.parametrize(
    ("exp", "man", "theirs"),
    [
        (4, 3, ml_dtypes.float8_e4m3fn),
        (5, 2, ml_dtypes.float8_e5m2),
        (3, 2, ml_dtypes.float6_e3m2fn),
        (2, 3, ml_dtypes.float6_e2m3fn),
        (2, 1, ml_dtypes.float4_e2m1fn),
    ],
)
def test_float_codes_are_those_of_ml_dtypes(exp: int, man: int, theirs: type) -> None:
    bits = 1 + exp + man
    codes = np.arange(2**bits, dtype=np.uint8)
    values = (
        codes.view(theirs).astype(np.float32)
        if bits == 8
        else codes.astype(np.uint8).view(theirs).astype(np.float32)
    )
    finite = np.isfinite(values)
    mine = float_values(torch.from_numpy(codes), exp, man)
    assert torch.equal(mine[finite], torch.from_numpy(values[finite]))
    back = float_codes(torch.from_numpy(values[finite].copy()), exp, man)
    assert torch.equal(back, torch.from_numpy(codes[finite]))
    # rounding of everything in between, ties included, as their cast does it
    levels = float_levels(exp, man).float()
    middle = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([levels, middle, middle * 1.001, middle * 0.999])
    x = torch.cat([x, -x])
    cast = torch.from_numpy(x.numpy().astype(theirs).astype(np.float32))
    assert torch.equal(round_to_float(x, exp, man), cast)


def test_float8_rounds_as_torch_does() -> None:
    x = normal(100_000) * 30
    for exp, man, dtype in ((4, 3, torch.float8_e4m3fn), (5, 2, torch.float8_e5m2)):
        assert torch.equal(round_to_float(x, exp, man), x.to(dtype).float())


def test_formats_of_four_bits_by_brute_force() -> None:
    for name, levels in {
        "fp4-e2m1-tensor": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
        "fp4-e3m0-tensor": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
        "fp4-e1m2-tensor": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    }.items():
        spec = QuantSpec.parse(name)
        table = torch.tensor([-v for v in levels[::-1]] + levels, dtype=torch.float64)
        x = normal(4000) * 3
        params = params_of(x, spec)
        best = table[((x.double() / params.scale.double().item()).unsqueeze(-1) - table).abs().argmin(-1)]
        near = quantize(x, spec, params).double() / params.scale.double().item()
        error = (x.double() / params.scale.double().item() - near).abs()
        least = (x.double() / params.scale.double().item() - best).abs()
        torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-6)


def test_integer_formulas_entry_by_entry() -> None:
    x = normal(3, 8).double()
    for bits in (2, 3, 4, 8):
        for row in x:
            s = (max(row.max().item(), 0) - min(row.min().item(), 0)) / (2**bits - 1)
            z = min(max(round(-min(row.min().item(), 0) / s), 0), 2**bits - 1)
            want = [s * (min(max(round(v / s) + z, 0), 2**bits - 1) - z) for v in row.tolist()]
            got = quantize(row.view(1, -1), QuantSpec(bits, granularity="channel"))
            torch.testing.assert_close(got[0], torch.tensor(want, dtype=torch.float64))
            s = row.abs().max().item() / (2 ** (bits - 1) - 1)
            half = 2 ** (bits - 1)
            want = [s * min(max(round(v / s), -half), half - 1) for v in row.tolist()]
            got = quantize(row.view(1, -1), QuantSpec(bits, granularity="channel", symmetric=True))
            torch.testing.assert_close(got[0], torch.tensor(want, dtype=torch.float64))


def test_integers_are_what_the_values_are_multiples_of() -> None:
    x = normal(4, 64)
    for name in ("int4-g32", "int8-channel-sym"):
        spec = QuantSpec.parse(name)
        params = params_of(x, spec)
        codes = encode(x, spec, params)
        whole = spec.groups(integers(codes, spec, params)) * params.scale.unsqueeze(-1)
        torch.testing.assert_close(whole.reshape(x.shape), decode(codes, spec, params))
    with pytest.raises(InputError, match="integer zero point"):
        integers(codes, QuantSpec.parse("int4-g32-float"), params)


def test_symmetric_integers_agree_with_compressed_tensors() -> None:
    ct = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=4, symmetric=True, strategy="channel"
    )
    x = normal(8, 64)
    scale = x.abs().amax(1, keepdim=True) / 7
    theirs = ct.fake_quantize(x, scale, torch.zeros_like(scale), args)
    spec = QuantSpec.parse("int4-channel-sym")
    torch.testing.assert_close(quantize(x, spec, QuantParams(scale)), theirs)


def test_mx_is_the_ocp_recipe_and_nvfp4_has_two_levels_of_scales() -> None:
    x = normal(4, 64) * torch.tensor([1e-6, 1.0, 300.0, 1e5]).unsqueeze(1)
    params = params_of(x, QuantSpec.parse("mxfp4"))
    for row, group in itertools.product(range(4), range(2)):
        most = x[row, 32 * group : 32 * group + 32].abs().max().double()
        want = 2.0 ** (np.floor(np.log2(most.item())) - 2)
        assert params.scale[row, group].item() == want
    two = params_of(x, QuantSpec.parse("nvfp4"))
    inner = two.scale / two.outer
    assert torch.equal(inner, inner.to(torch.float8_e4m3fn).float())
    assert float(inner.max()) == 448


def test_nf4_has_the_published_levels() -> None:
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
                 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    torch.testing.assert_close(nf4_levels(), torch.tensor(published, dtype=torch.float64), rtol=0, atol=2e-6)


def test_log2_keeps_exact_zeros_and_refuses_negative_values() -> None:
    spec = QuantSpec.parse("log2-4")
    p = torch.tensor([0.0, 1.0, 0.5, 0.3, 2**-15.0, 2**-17.0])
    assert quantize(p, spec).tolist() == [0.0, 1.0, 0.5, 0.25, 2**-15, 0.0]
    with pytest.raises(InputError, match="negative"):
        quantize(-p, spec)


def test_binary_codes_are_nearest_sums_of_signs() -> None:
    x = normal(3, 64).double()
    spec = QuantSpec.parse("binary2-channel")
    params = params_of(x, spec)
    greedy = x.abs().mean(1)
    torch.testing.assert_close(params.scale[:, 0, 0], greedy)
    sums = torch.stack(
        [a * params.scale[:, 0, 0] + b * params.scale[:, 0, 1] for a in (-1, 1) for b in (-1, 1)], 1
    )
    best = (x.unsqueeze(-1) - sums.unsqueeze(1)).abs().amin(-1)
    torch.testing.assert_close((quantize(x, spec, params) - x).abs(), best)
    assert bool((quantize(torch.zeros(1, 8), QuantSpec.parse("binary1-channel")) == 0).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_gives_the_codes_back_in_as_many_bits(bits: int) -> None:
    codes = torch.randint(
        0, 2**bits, (7, 33), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.numel() == (231 if bits == 8 else 29 * bits)
    assert torch.equal(unpack(packed, bits, codes.shape), codes)
    bit_string = "".join(format(b, "08b")[::-1] for b in packed.tolist())
    assert [
        int(bit_string[i * bits : i * bits + bits][::-1], 2) for i in range(231)
    ] == codes.flatten().tolist()


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="does not fit into 3 bits"):
        pack(torch.tensor([8], dtype=torch.uint8), 3)
    with pytest.raises(InputError, match="take 3 bytes"):
        unpack(torch.zeros(4, dtype=torch.uint8), 3, (8,))


def test_gaussian_scales_are_the_published_ones() -> None:
    published = {
        1: 0.79788,
        2: 1.49353,
        3: 2.05107,
        4: 2.51393,
        5: 2.91609,
        6: 3.27660,
        7: 3.60105,
        8: 3.88494,
    }
    for bits, value in published.items():
        # the published values of 6 bits and more are a little short of the minimum
        assert gaussian_scale(bits) == pytest.approx(value, rel=1e-3 if bits < 7 else 1e-2)
    assert gaussian_scale(float(np.log2(3))) == pytest.approx(1.22401, abs=1e-3)


def test_searched_range_beats_the_whole_range_on_heavy_tails() -> None:
    x = normal(4, 256, seed=1)
    x[:, 0] = 12
    spec = QuantSpec.parse("int3-channel")
    whole, searched = (quantize(x, spec, p) for p in (params_of(x, spec), lp_search(x, spec)))
    errors = [float((v - x).abs().pow(2.4).sum()) for v in (whole, searched)]
    assert errors[1] < 0.8 * errors[0]
    low, high = percentile(x, spec, 5)
    torch.testing.assert_close(high[:, 0], torch.quantile(x, 0.95, dim=1))
    torch.testing.assert_close(low[:, 0], torch.quantile(x, 0.05, dim=1))


def test_observers_see_columns_over_batches() -> None:
    batches = [normal(2, 5, 8, seed=s) * (s + 1) for s in range(3)]
    spec = QuantSpec.parse("int8-channel-sym")
    observer = Observer(spec)
    for b in batches:
        observer.add(b)
    most = torch.cat([b.reshape(-1, 8) for b in batches]).abs().amax(0)
    torch.testing.assert_close(
        observer.params().scale[:, 0]
        if observer.params().scale.shape[0] == 8
        else observer.params().scale[0],
        most / 127,
    )
    with pytest.raises(InputError, match="never reached"):
        Observer(spec).params()


def test_gradients_of_the_estimators() -> None:
    x = torch.tensor([[-3.0, -0.4, 0.1, 0.6, 0.9, 5.0]], requires_grad=True)
    spec = QuantSpec(2, symmetric=True, granularity="channel")
    params = QuantParams(torch.tensor([[0.5]]))  # levels -1, -0.5, 0, 0.5
    for grad, want in {"ste": [1] * 6, "clip": [0, 1, 1, 0, 0, 0], "trust": [0, 1, 1, 1, 0, 0]}.items():
        y = fake_quant(x, spec, params, grad=grad)  # type: ignore[arg-type]
        assert torch.equal(y.detach(), quantize(x.detach(), spec, params))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.tolist() == [[float(w) for w in want]], grad
    noisy = fake_quant(x, spec, params, grad="noise", generator=torch.Generator().manual_seed(0))
    assert torch.autograd.grad(noisy.sum(), x)[0].tolist() == [[1.0] * 6]
    many = fake_quant(
        torch.zeros(1, 20_000), spec, params, grad="noise", generator=torch.Generator().manual_seed(0)
    )
    assert float(many.std()) == pytest.approx(0.25, rel=0.02)


def test_learned_step_has_the_published_gradient() -> None:
    layer = FakeQuant(QuantSpec(3, symmetric=True, granularity="tensor"), "lsq")
    x = normal(1, 400)
    layer(x)
    assert layer.scale is not None
    assert float(layer.scale.detach()) == pytest.approx(2 * float(x.abs().mean()) / 3**0.5, rel=1e-5)
    layer(x).sum().backward()
    s = layer.scale.detach()  # type: ignore[union-attr]
    v = x / s
    inside = torch.where(v <= -4, -4.0, torch.where(v >= 3, 3.0, v.round() - v))
    want = inside.sum() / (400 * 3) ** 0.5
    torch.testing.assert_close(layer.scale.grad.sum(), want, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_stored_params_are_16_bit_where_these_can_hold_them() -> None:
    spec = QuantSpec.parse("int4-g32-float")
    assert params_of(normal(4, 64), spec).stored(spec).scale.dtype == torch.float16
    assert params_of(normal(4, 64) * 1e-5, spec).stored(spec).scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int1-g64", "2 to 16 bits, not 1"),
        ("fp8-e4m2-channel", "has 7 bits"),
        ("fp4-e4m0-channel", "has 5 bits"),
        ("int4-g1", "at least 2"),
        ("int4-rows", "'rows' in the number format"),
        ("four bits", "examples: int4-g64"),
        ("int", "does not say how many bits"),
        ("nf3-g64", "4 to 4 bits"),
        ("log2-9", "2 to 6 bits"),
        ("int4-g64-gaussian", "symmetric or centred"),
    ],
)
def test_wrong_formats_are_named(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        QuantSpec.parse(name)


def test_wrong_tensors_are_named() -> None:
    with pytest.raises(InputError, match="legal sizes are 16, 32, 48, 64"):
        quantize(normal(2, 576), QuantSpec.parse("int4-g128"))
    with pytest.raises(NonFiniteError, match="up_proj holds NaN"):
        params_of(torch.tensor([[1.0, float("inf")]]), QuantSpec(4, granularity="channel"), where="up_proj")
    with pytest.raises(InputError, match="empty"):
        params_of(torch.empty(0, 4), QuantSpec(4, granularity="channel"))
    zero = torch.zeros(2, 64)
    for name in (
        "int4-g32",
        "int4-g32-float",
        "fp8-e4m3-channel",
        "mxfp4",
        "nvfp4",
        "nf4-g64",
        "binary2-channel",
    ):
        assert torch.equal(quantize(zero, QuantSpec.parse(name)), zero), name


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    assert QuantSpec.parse("int4-g64").bits_per_weight(8, 64) == 4 + 20 / 64
    assert QuantSpec.parse("int4-g32-float").bits_per_weight(8, 64) == 5
    assert QuantSpec.parse("int8-channel-sym").bits_per_weight(8, 64) == 8.25
    assert QuantSpec.parse("mxfp4").bits_per_weight(8, 64) == 4.25
    assert QuantSpec.parse("binary3-g64").bits_per_weight(8, 64) == 3 + 48 / 64
