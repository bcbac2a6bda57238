"""Power iteration and Hutchinson's trace against explicit Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.measure.hessian import (
    Sharpness,
    hessian_trace,
    layer_sharpness,
    top_eigenvalue,
    twice_differentiable,
)
from tests.core.tiny import TEXTS, tiny


def _net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 14), nn.Tanh(), nn.Linear(14, 5)).double()  # 201 parameters
    return net, torch.randn(40, 8, dtype=torch.float64), torch.randint(0, 5, (40,))


def _explicit(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    names = [n for n, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(v: torch.Tensor) -> torch.Tensor:
        parts = v.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, values, (x,)), y)

    return torch.func.hessian(loss)(flat)


def test_power_iteration_and_trace_on_201_parameters() -> None:
    net, x, y = _net()
    values = torch.linalg.eigvalsh(_explicit(net, x, y))
    want = values[values.abs().argmax()]
    found = top_eigenvalue(
        lambda: nn.functional.cross_entropy(net(x), y), list(net.parameters()), iterations=300, tolerance=1e-4
    )
    assert found.converged
    assert found.value == pytest.approx(float(want), rel=0.01)
    trace, error = hessian_trace(
        lambda: nn.functional.cross_entropy(net(x), y), list(net.parameters()), samples=200
    )
    assert abs(trace - float(values.sum())) < 4 * error
    assert error < 0.1 * float(values.sum())


def test_the_sign_is_kept() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    found = top_eigenvalue(lambda: -3 * w[0] ** 2 + w[1] ** 2, [w])
    assert found.value == pytest.approx(-6.0, rel=1e-3)
    assert top_eigenvalue(lambda: w.sum(), [w]).value == 0.0


def test_blocks_of_a_transformer_and_frozen_parameters_stay_frozen() -> None:
    model = tiny()
    module = model.module.requires_grad_(False)
    inputs = model.encode(TEXTS[:2])
    ids = inputs["input_ids"]

    def loss() -> torch.Tensor:
        return module(input_ids=ids, labels=ids).loss

    groups = {
        str(i): [p for n, p in b.named_parameters() if "mlp" in n] for i, b in enumerate(module.model.layers)
    }
    with twice_differentiable(module):
        found = layer_sharpness([loss], groups, iterations=40)
    assert all(s.omega > 0 for s in found.values())
    assert not any(p.requires_grad for p in module.parameters())


def test_omega_and_bad_input() -> None:
    assert Sharpness((1.0, 3.0), 5).omega == pytest.approx(2 + 2**0.5)
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(InputError, match="at least one parameter"):
        top_eigenvalue(lambda: w.sum(), [])
    with pytest.raises(InputError, match="does not depend"):
        top_eigenvalue(lambda: (w * 2).sum(), [torch.ones(3)])
    with pytest.raises(NonFiniteError, match="finite"):
        top_eigenvalue(lambda: w.sum() / 0, [w])
    with pytest.raises(InputError, match="shard"):
        layer_sharpness([], {})
