"""Integer arithmetic: exact against int64 sums, the affine identity, halves, and quantised layers bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from actlas.core.errors import InputError, ShapeError
from actlas.core.integer_product import affine_product, integer_forward, integer_linear, split_halves
from actlas.core.numbers import QuantParams, QuantSpec, integers
from actlas.core.quant_linear import ActQuant, QuantLinear


def draw(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [3, 64, 1536, 9000])
@pytest.mark.parametrize(("low", "high"), [(-8, 8), (-128, 128), (0, 256), (-32768, 32768)])
def test_product_is_that_of_int64(width: int, low: int, high: int) -> None:
    x, w = draw(low, high, 5, width), draw(-255, 256, 7, width, seed=1)
    x[0], w[0] = high - 1, 255  # the largest sum there is
    want = (x[:, None].long() * w[None].long()).sum(-1)
    assert torch.equal(integer_linear(x, w), want)


def test_plain_float32_would_be_wrong() -> None:
    """The case above really leaves what float32 holds, so that the halves are needed."""
    x, w = torch.full((1, 1536), 127), torch.full((1, 1536), 255)
    x[0, ::2] -= 1
    w[0, ::3] -= 1
    w[0, 1] -= 1  # 127 * 1 less: the sum is odd, which float32 cannot hold there
    exact = int((x * w).sum())
    assert exact > 2**24 and exact % 2 == 1
    assert int(nn.functional.linear(x.float(), w.float())[0, 0]) != exact
    assert int(integer_linear(x, w)[0, 0]) == exact


@given(st.integers(0, 255), st.integers(0, 15), st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_affine_identity(zx: int, zw: int, seed: int) -> None:
    x, w = draw(0, 256, 4, 24, seed=seed % 1000), draw(0, 16, 6, 24, seed=seed % 999)
    rows = draw(0, 16, 6, seed=seed % 998)
    want = ((x - zx)[:, None] * (w - zw)[None]).sum(-1)
    assert torch.equal(affine_product(x, zx, w, zw), want)
    want = ((x - zx)[:, None] * (w - rows[:, None])[None]).sum(-1)
    assert torch.equal(affine_product(x, zx, w, rows), want)


def test_halves() -> None:
    x = torch.arange(-128, 256)
    hi, lo = split_halves(x)
    assert torch.equal(16 * hi + lo, x)
    assert int(lo.min()) == 0 and int(lo.max()) == 15 and int(hi.min()) == -8 and int(hi.max()) == 15


@pytest.mark.parametrize("spec", ["int8-channel", "int6-channel", "int4-channel-sym", "int8-tensor"])
@pytest.mark.parametrize("act", ["int8-tensor-sym", "int6-tensor-sym", "int8-tensor"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_are_integer_arithmetic_bit_for_bit(spec: str, act: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    form = QuantSpec.parse(act)
    zero = None if form.symmetric else torch.full((1, 1), 100.0)
    step = 0.037 if form.symmetric else 0.0625  # with a zero point the layer multiplies step by (code - zero)
    params = QuantParams(torch.full((1, 1), step if zero is not None else 1.0), zero)
    layer = QuantLinear.of(linear, spec, act=ActQuant(form, params))
    x = 40 * torch.randn(3, 11, 96) * (step if zero is not None else 1.0)
    assert torch.equal(layer(x.double()), integer_forward(layer, x))
    rows = integers(layer.unpacked, layer.spec, layer.params).double()
    taken = x.reshape(-1, 96) / params.scale.item()
    low = -(2 ** (form.bits - 1)) if zero is None else -100.0
    codes = taken.round().clamp(low, low + 2**form.bits - 1).double()
    want = torch.zeros(33, 40, dtype=torch.float64)
    for i in range(40):
        want[:, i] = (codes * rows[i]).sum(-1)
    want = want * (layer.scale.double().flatten() * params.scale.double().item())
    want = want if not bias else want + layer.bias.double()
    assert torch.equal(integer_forward(layer, x).reshape(33, 40), want)


def test_bad_input() -> None:
    linear = nn.Linear(32, 8)
    one = ActQuant(QuantSpec.parse("int8-tensor-sym"), QuantParams(torch.ones(1, 1)))
    with pytest.raises(InputError, match="not torch.float32"):
        integer_linear(torch.randn(2, 3), torch.ones(4, 3, dtype=torch.long))
    with pytest.raises(ShapeError, match="do not fit"):
        integer_linear(torch.ones(2, 3, dtype=torch.long), torch.ones(4, 5, dtype=torch.long))
    with pytest.raises(InputError, match="inputs are not rounded"):
        integer_forward(QuantLinear.of(linear, "int8-channel"), torch.randn(2, 32))
    with pytest.raises(InputError, match="one scale a row"):
        integer_forward(QuantLinear.of(linear, "int8-g16", act=one), torch.randn(2, 32))
    rotated = QuantLinear.of(linear, "int8-channel", act=one, rotate=32)
    with pytest.raises(InputError, match="rotate"):
        integer_forward(rotated, torch.randn(2, 32))
