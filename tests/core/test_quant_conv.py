"""Convolutions on a grid: the same sums as a plain convolution with the dequantised weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.numbers import QuantSpec, params_of, quantize
from actlas.core.quant_conv import QuantConv2d
from actlas.core.quant_edit import QuantEdit
from actlas.models.efficientnet_lite import SameConv2d


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, padding="same"),
        nn.Conv2d(4, 6, 1),
        SameConv2d(4, 6, 3, 2),
    ],
)
def test_forward_is_a_convolution_with_its_weight(conv: nn.Conv2d) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 7)
    layer = QuantConv2d.of(conv, "int4-channel")
    matrix = conv.weight.detach().flatten(1)
    want = quantize(matrix, layer.spec, params_of(matrix, layer.spec).stored(layer.spec))
    assert torch.allclose(layer.weight.flatten(1), want, atol=1e-6)
    with torch.no_grad():
        conv.weight.copy_(layer.weight)
        assert torch.allclose(layer(x), conv(x), atol=1e-5)


def test_split_weights_are_two_quantisations() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 3, 3)
    with torch.no_grad():
        conv.weight[:, 2:] *= 10
    layer = QuantConv2d.of(conv, "int4-channel", split=(2, 3))
    parts = [QuantConv2d.of(nn.Conv2d(n, 3, 3), "int4-channel", weight=w)  # noqa: RUF100
             for n, w in zip((2, 3), conv.weight.detach().split((2, 3), 1), strict=True)]  # fmt: skip
    assert torch.equal(layer.weight, torch.cat([p.weight for p in parts], 1))
    whole = QuantConv2d.of(conv, "int4-channel")
    w = conv.weight.detach()
    assert float((layer.weight - w)[:, :2].square().mean()) < float((whole.weight - w)[:, :2].square().mean())


def test_stored_as_codes() -> None:
    conv = nn.Conv2d(8, 16, 3)
    layer = QuantConv2d.of(conv, "int3-channel")
    assert layer.codes.numel() == 8 * 16 * 9 * 3 // 8
    assert layer.bits_per_weight == pytest.approx(3 + (16 + 8) / 72)
    again = QuantConv2d.from_config(layer.config())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


def test_binary_codes() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    layer = QuantConv2d.of(conv, "binary2-channel")
    spec, matrix = QuantSpec.parse("binary2-channel"), conv.weight.detach().flatten(1)
    want = quantize(matrix, spec, params_of(matrix, spec).stored(spec))
    assert torch.allclose(layer.weight.flatten(1), want, atol=1e-6)


def test_in_an_edit_and_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import actlas

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x = torch.randn(2, 2, 5, 5)
    act = ActQuantizer(8, 3)
    act.calibrate(torch.relu(network[0](x)).detach())
    edit = QuantEdit({"2": QuantConv2d.of(network[2], "int4-channel", act=act)}, method="test")
    model = actlas.load(network)
    before = network(x)
    with model.edit(edit):
        inside = network(x)
    assert torch.equal(network(x), before)
    assert not torch.equal(inside, before)
    edit.save(tmp_path / "e", model)
    with model.edit(actlas.Edit.load(tmp_path / "e", model)):
        assert torch.equal(network(x), inside)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="zero padding"):
        QuantConv2d.of(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "int4-channel")
    with pytest.raises(InputError, match="int4-channel"):
        QuantConv2d.of(nn.Conv2d(2, 2, 3), "int4-tensor")
    with pytest.raises(InputError, match="split"):
        QuantConv2d.of(nn.Conv2d(4, 2, 3), "int4-channel", split=(1, 2))
    with pytest.raises(InputError, match="groups of 5"):
        QuantConv2d.of(nn.Conv2d(4, 2, 3), "int4-g5")
    with pytest.raises(ShapeError, match="input channels"):
        QuantConv2d.of(nn.Conv2d(4, 2, 3), "int4-channel", act=ActQuantizer(8, 3))
    bad = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        bad.weight[0] = torch.nan
    with pytest.raises(NonFiniteError):
        QuantConv2d.of(bad, "int4-channel")
