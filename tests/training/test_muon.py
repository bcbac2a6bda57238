"""Muon against torch's own, its equations and its limits; the outlier-safe loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.training.muon import COEFFICIENTS, Muon, orthogonalised
from actlas.training.outlier_safe import pretrain, safe_optimisers
from tests.core.tiny import tiny


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_it_agrees_with_torchs_muon(shape) -> None:
    ours, theirs = nn.Parameter(_random(*shape)), nn.Parameter(_random(*shape))
    a = Muon([ours], 0.02, decay=0.1)
    b = torch.optim.Muon([theirs], 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for seed in range(4):
        for p, o in ((ours, a), (theirs, b)):
            p.grad = _random(*shape, seed=seed + 1)
            o.step()
    moved = float((ours.detach() - start).norm())
    assert float((ours - theirs).detach().norm()) < 0.03 * moved  # torch computes in bfloat16


def test_newton_schulz_is_its_polynomial_on_singular_values() -> None:
    u = _random(6, 10)
    left, s, right = torch.linalg.svd(u.double(), full_matrices=False)
    a, b, c = COEFFICIENTS
    value = s / s.norm()
    for _ in range(5):
        value = a * value + b * value**3 + c * value**5
    torch.testing.assert_close(
        orthogonalised(u).double(), left @ torch.diag(value) @ right, atol=1e-4, rtol=1e-4
    )
    many = torch.linalg.svdvals(orthogonalised(_random(40, 60)))
    assert 0.6 < float(many.min()) and float(many.max()) < 1.3
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_vectors_take_steps_of_unit_length() -> None:
    p = nn.Parameter(torch.zeros(7))
    optimiser = Muon([p], 0.5)
    p.grad = 1e-3 * _random(7)
    optimiser.step()
    assert float(p.detach().norm()) == pytest.approx(0.5, rel=1e-5)


def test_a_rotation_of_the_weights_turns_the_whole_path() -> None:
    # no coordinate is special: Muon on W R walks as Muon on W, turned; Adam does not
    turn = torch.linalg.qr(_random(5, 5, seed=3).double())[0].float()
    target = _random(4, 5, seed=1)

    def walk(make, r):
        p = nn.Parameter(_random(4, 5) @ r)
        optimiser = make([p])
        for _ in range(5):
            optimiser.zero_grad()
            (p @ r.T - target).square().sum().backward()
            optimiser.step()
        return p.detach() @ r.T

    eye = torch.eye(5)
    muon = [walk(lambda q: Muon(q, 0.05), r) for r in (eye, turn)]
    adam = [walk(lambda q: torch.optim.Adam(q, 0.05), r) for r in (eye, turn)]
    assert float((muon[0] - muon[1]).abs().max()) < 1e-4
    assert float((adam[0] - adam[1]).abs().max()) > 1e-2


def test_the_loop_learns_and_tables_have_an_optimiser_of_their_own() -> None:
    model = tiny("llama")
    optimisers = safe_optimisers(model, lr=0.01, table_lr=0.01)
    sizes = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in optimisers]
    assert sizes[1] in (67 * 32, 2 * 67 * 32) and sum(sizes) == sum(
        p.numel() for p in model.module.parameters()
    )
    batches = [torch.randint(3, 12, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(30)]
    losses = pretrain(model, batches, optimisers, steps=30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and not model.module.training
    assert len(safe_optimisers(model, tables="muon")) == 1


def test_bad_input() -> None:
    with pytest.raises(InputError, match="momentum"):
        Muon([nn.Parameter(torch.ones(2, 2))], momentum=1.0)
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.full((2, 2), float("inf"))
    with pytest.raises(NonFiniteError):
        Muon([p]).step()
    with pytest.raises(InputError, match="tables"):
        safe_optimisers(tiny("llama"), tables="sgd")
    with pytest.raises(InputError, match="steps=0"):
        pretrain(tiny("llama"), [], [], steps=0)
