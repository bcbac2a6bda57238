"""Binary layers: the greedy identity, gradients of the clipped estimator, export."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.binary_layers import BinaryLayer, sign
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers.tables import greedy_signs, signed_sums


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layer", [nn.Linear(9, 5), nn.Conv2d(3, 5, 3)])
def test_start_is_the_greedy_fit(layer: nn.Module, order: int) -> None:
    made = BinaryLayer(layer, order)
    w = layer.weight.detach().flatten(1)  # type: ignore[operator]
    alpha, codes = greedy_signs(w.unsqueeze(1), order)
    want = signed_sums(alpha).gather(-1, codes.long()).squeeze(1)
    assert torch.allclose(made.weight, want, atol=1e-6)
    s1 = w.abs().mean(1, keepdim=True)
    first = s1 * torch.where(w >= 0, 1.0, -1.0)
    if order == 2:
        s2 = (w - first).abs().mean(1, keepdim=True)
        first = first + s2 * torch.where(w - first >= 0, 1.0, -1.0)
    assert torch.allclose(made.weight, first, atol=1e-6)


def test_two_bases_are_nearer() -> None:
    layer = nn.Linear(64, 8)
    errors = [float((BinaryLayer(layer, k).weight - layer.weight).detach().square().mean()) for k in (1, 2)]
    assert errors[1] < 0.6 * errors[0]


def test_sign_of_zero_and_its_gradient() -> None:
    x = torch.tensor([0.0, -0.0, 0.5, -1.0, 1.5]).requires_grad_(True)
    y = sign(x)
    assert y.tolist() == [1, 1, 1, -1, 1]
    (y * torch.arange(1.0, 6.0)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 2, 3, 4, 0]


def test_scales_and_latent_weights_learn() -> None:
    torch.manual_seed(0)
    made = BinaryLayer(nn.Linear(16, 4), 2, act=ActQuantizer(4, 16, axis=-1))
    x, want = torch.randn(64, 16), torch.randn(64, 4)
    made(x)
    optimiser = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (made(x) - want).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert made.act is not None and made.act.scale.grad is not None and float(made.act.scale.grad.abs()) > 0


@pytest.mark.parametrize("layer", [nn.Linear(16, 6), nn.Conv2d(4, 6, 3, padding=1)])
@pytest.mark.parametrize("order", [1, 2])
def test_export_is_the_layer(layer: nn.Module, order: int) -> None:
    torch.manual_seed(0)
    conv = isinstance(layer, nn.Conv2d)
    act = ActQuantizer(4, 4 if conv else 16, axis=1 if conv else -1)
    made = BinaryLayer(layer, order, act=act)
    x = torch.randn(3, 4, 5, 5) if conv else torch.randn(3, 16)
    with torch.no_grad():
        made(x)
        for s in made.scales:
            s.copy_((s * 1.1).half().float())
        out = made.export()
        assert torch.allclose(out(x), made(x), atol=1e-5)
    n = layer.weight.numel()  # type: ignore[operator,union-attr]
    kept = out.state_dict()
    codes = next(t for name, t in kept.items() if name.endswith("codes"))
    assert codes.numel() == -(-n // 8) * order


def test_bad_input() -> None:
    with pytest.raises(InputError, match="1 or 2 signs"):
        BinaryLayer(nn.Linear(2, 2), 3)
    with pytest.raises(InputError, match="start"):
        BinaryLayer(nn.Linear(2, 2), 1, start="zeros")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="GELU"):
        BinaryLayer(nn.GELU(), 1)
    bad = nn.Linear(2, 2)
    with torch.no_grad():
        bad.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        BinaryLayer(bad)
