"""Mixture of hidden dimensions: only the chosen columns and rows of a component matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.errors import InputError, ShapeError
from actlas.nn.mohd import MoHD, MonarchLinear


def made(**options: object) -> MoHD:
    torch.manual_seed(0)
    return MoHD(nn.Linear(12, 12), 12, n_sub=6, n_shared=2, top_k=1, **options)  # type: ignore[arg-type]


def test_layer_is_its_equation_token_by_token() -> None:
    layer, x = made(fusion="none").requires_grad_(False), torch.randn(2, 5, 12)
    y = layer(x)
    for b in range(2):
        for t in range(5):
            g = torch.softmax(layer.router.weight @ x[b, t], 0)
            best = int(g.argmax())
            used = [0, 1, 2, 3, *range(4 + 2 * best, 6 + 2 * best)]
            weight = torch.tensor([1.0] * 4 + [float(g[best])] * 2)
            narrow = layer.component.weight[used][:, used] @ (weight * x[b, t, used])
            want = torch.zeros(12)
            want[used] = 6 / 3 * weight * (narrow + layer.component.bias[used])
            torch.testing.assert_close(y[b, t], want)
    assert layer.active_share == 0.5


def test_fusion_starts_as_the_identity_and_can_mix_everything() -> None:
    x = torch.randn(3, 4, 12)
    torch.testing.assert_close(made()(x), made(fusion="none")(x))
    for d in (12, 64, 7):
        m = MonarchLinear(d)
        v = torch.randn(5, d)
        torch.testing.assert_close(m(v), v)
        for p in m.parameters():
            nn.init.normal_(p)
        dense = m(torch.eye(d)).T
        torch.testing.assert_close(m(v), v @ dense.T, atol=1e-4, rtol=1e-4)
        assert (dense != 0).all()
    assert sum(p.numel() for p in MonarchLinear(64).parameters()) == 2 * 64 * 8


def test_router_learns_and_balance_counts() -> None:
    layer, x = made(), torch.randn(50, 12)
    layer(x).square().sum().backward()
    assert layer.router.weight.grad is not None and layer.router.weight.grad.any()
    assert layer.routed is not None and float(layer.routed.balance().detach()) >= 0.9
    with torch.no_grad():
        layer(x)
    assert layer.routed is None


def test_components_that_return_tuples() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor, gain: float = 1.0) -> tuple[torch.Tensor, str]:
            return gain * x, "weights"

    layer = MoHD(Attention(), 12, n_sub=6, n_shared=2, top_k=4, fusion="none")
    y, rest = layer(torch.ones(2, 12), gain=3.0)
    assert rest == "weights" and torch.equal(y[:, :4], torch.full((2, 4), 3.0))


def test_bad_input() -> None:
    for options, said in (
        ({"n_sub": 5}, "n_sub is 5"),
        ({"n_shared": 16}, "n_shared is 16"),
        ({"top_k": 13}, "top_k 13"),
    ):
        with pytest.raises(InputError, match=said):
            MoHD(nn.Identity(), 16, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fusion is 'dense'"):
        MoHD(nn.Identity(), 16, fusion="dense")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="MoHD reads 12"):
        made()(torch.randn(3, 11))
    with pytest.raises(InputError, match="blocks"):
        MonarchLinear(12, 5)
