"""PSNR and bit operations against what they are defined to be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from actlas.core.errors import InputError
from actlas.core.numbers import QuantSpec
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.measure.bit_operations import bit_operations
from actlas.measure.psnr import luma, psnr


def test_psnr_is_the_formula_without_the_border():
    a = torch.rand(3, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    b = (a + 0.1).clamp(0, 1)
    for border in (0, 2):
        for i in range(3):
            part = slice(border, 12 - border), slice(border, 10 - border)
            mse = float((a[i, 0][part] - b[i, 0][part]).double().square().mean())
            assert float(psnr(b, a, crop_border=border)[i]) == pytest.approx(
                10 * math.log10(1 / mse), rel=1e-6
            )
    framed = a.clone()
    framed[..., 0, :] = 1 - framed[..., 0, :]
    assert math.isinf(psnr(framed, a, crop_border=1)[0]) and psnr(framed, a)[0] < 40
    assert math.isinf(psnr(a + 5 * (a == 1), a)[0])  # what is restored is clipped


def test_luma_of_grey_is_grey():
    grey = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(luma(grey.expand(-1, 3, -1, -1)), grey)
    green = torch.zeros(1, 3, 1, 1)
    green[:, 1] = 1
    assert luma(green).item() == pytest.approx(0.587)


def test_bit_operations_multiply_widths():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    found = bit_operations(net, torch.randn(7, 6))
    assert found.value == 7 * (30 + 20 + 12) * 32 * 32
    net[1].weight_bits = 4
    assert bit_operations(net, torch.randn(7, 6)).details["macs"] == {"32x32": 7 * 42, "4x32": 7 * 20}
    act = ActQuant(QuantSpec.parse("int8-token"))
    net[0] = QuantLinear.of(net[0], "int3-channel", act=act)
    found = bit_operations(net, torch.randn(7, 6))
    assert found.value == 7 * (30 * 3 * 8 + 20 * 4 * 32 + 12 * 32 * 32)


def test_bad_images():
    x = torch.rand(1, 1, 8, 8)
    with pytest.raises(InputError, match="both"):
        psnr(x, x[..., 1:])
    with pytest.raises(InputError, match="nothing"):
        psnr(x, x, crop_border=4)
    with pytest.raises(InputError, match="from 0 to 1"):
        psnr(x, x * 255)
    with pytest.raises(InputError, match="luma"):
        luma(x)
