"""Adam on orthogonal matrices stays on the manifold and finds what it should."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.stiefel import StiefelAdam, drift, nearest_orthogonal, retract, tangent


def _rotation(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    return q * torch.linalg.det(q)  # proper for odd n


@pytest.mark.parametrize("retraction", ["cayley", "qr"])
def test_it_finds_the_best_rotation_and_stays_orthogonal(retraction) -> None:
    # Procrustes: min |X R - Y| has a closed form
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 7, generator=g, dtype=torch.float64)
    y = x @ _rotation(7, 1) + 0.1 * torch.randn(40, 7, generator=g, dtype=torch.float64)
    best = nearest_orthogonal(x.T @ y)
    r = torch.nn.Parameter(torch.eye(7, dtype=torch.float64))
    optimiser = StiefelAdam([r], lr=0.05, retraction=retraction)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 400) + 1e-4
        optimiser.zero_grad()
        (x @ r - y).square().sum().backward()
        optimiser.step()
        assert drift(r.detach()) < 1e-9
    assert float((x @ r.detach() - y).square().sum()) < 1.01 * float((x @ best - y).square().sum())


@pytest.mark.parametrize("how", ["cayley", "qr"])
def test_a_retraction_agrees_with_its_tangent_to_second_order(how) -> None:
    r = _rotation(5, 2)
    along = tangent(r, torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    errors = [float((retract(r, along, h, how) - (r - h * along)).norm()) for h in (1e-2, 5e-3)]
    assert errors[0] < 1e-3 and 3.5 < errors[0] / errors[1] < 4.5
    skew = along @ r.T
    assert torch.allclose(skew, -skew.T, atol=1e-12)


def test_batches_of_matrices_are_independent() -> None:
    both = torch.nn.Parameter(torch.stack([_rotation(3, 4), _rotation(3, 5)]))
    alone = torch.nn.Parameter(_rotation(3, 5))
    target = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    for p in (both, alone):
        optimiser = StiefelAdam([p], lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            (p * target).sum().backward()
            optimiser.step()
    assert torch.allclose(both[1], alone, atol=1e-12)


def test_float32_does_not_drift() -> None:
    p = torch.nn.Parameter(_rotation(9, 6).float())
    optimiser = StiefelAdam([p], lr=0.1)
    for seed in range(100):
        p.grad = torch.randn(9, 9, generator=torch.Generator().manual_seed(seed))
        optimiser.step()
    assert drift(p.detach()) < 1e-5


def test_bad_input() -> None:
    with pytest.raises(ShapeError):
        StiefelAdam([torch.nn.Parameter(torch.ones(2, 3))])
    with pytest.raises(InputError, match="not orthogonal"):
        StiefelAdam([torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(InputError, match="retraction"):
        StiefelAdam([torch.nn.Parameter(torch.eye(2))], retraction="polar")
    p = torch.nn.Parameter(torch.eye(2))
    p.grad = torch.full((2, 2), float("nan"))
    with pytest.raises(NonFiniteError):
        StiefelAdam([p]).step()
