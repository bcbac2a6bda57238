"""ReLU with L1: the loss and its gradient in float64, and resampling."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError
from actlas.dictionaries import Batch, RowsSource, TrainSettings, train
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.relu import ReluSAE, resampling_steps

from .brute import check_gradients, random_weights, state
from .conftest import sparse_rows


def loss(sae: ReluSAE, x: torch.Tensor, weight: float) -> float:
    total = 0.0
    for row in x:
        z = [max(0.0, float(sae.W_enc[i] @ (row - sae.b_dec) + sae.b_enc[i])) for i in range(sae.features)]
        x_hat = sae.b_dec + sum(z[i] * sae.W_dec[i] for i in range(sae.features))
        total += float((row - x_hat).square().sum()) + weight * sum(z)
    return total / len(x)


def test_loss_and_gradient_are_the_formula() -> None:
    sae = random_weights(ReluSAE.create("s", 4, 7, seed=1))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
    run = state(sae, sparsity=0.7)
    check_gradients(sae, Batch(x), run, lambda s: loss(s, x, 0.7), ("W_enc", "b_enc", "W_dec", "b_dec"))


def test_sparsity_warms_up_and_has_a_default() -> None:
    sae = random_weights(ReluSAE.create("s", 4, 7, seed=1))
    x = torch.randn(5, 4).double()
    plain, full = (float(sae.objective(Batch(x), state(sae, sparsity=s)).loss) for s in (0.0, None))
    l1 = sae.objective(Batch(x), state(sae)).parts["l1"]
    assert full == pytest.approx(plain + 5.0 * l1)
    early = sae.objective(Batch(x), state(sae, step=1, sparsity_warmup=0.1)).loss  # 2 of 6.2 steps
    assert float(early) == pytest.approx(plain + 2 / 6.2 * 5.0 * l1)


def test_codes_of_dense() -> None:
    g = torch.Generator().manual_seed(0)
    for share in (0.0, 0.05, 0.9):
        z = torch.rand(11, 40, generator=g) * (torch.rand(11, 40, generator=g) < share)
        codes = codes_of(z)
        assert torch.equal(codes.dense(), z) and torch.equal(codes.l0, (z != 0).sum(1))
        assert torch.equal(codes.counts(), (z != 0).sum(0))
    assert codes_of(torch.zeros(0, 5)).shape == (0,)


def test_dead_features_get_a_new_start_from_a_bad_row() -> None:
    sae = ReluSAE.create("s", 6, 12, seed=0)
    g = torch.Generator().manual_seed(0)
    x = torch.cat([0.01 * torch.randn(30, 6, generator=g), 5 * torch.eye(6)[:2]])
    sae.b_enc[:] = -100.0  # nothing is reconstructed: the two long rows are the bad ones
    run, before = state(sae, dead=[3, 7]), sae.W_dec.clone()
    live = [i for i in range(12) if i not in (3, 7)]
    length = 0.2 * sae.W_enc[live].norm(dim=1).mean()
    assert sae.revive(Batch(x), run) == 2
    assert torch.equal(sae.W_dec[live], before[live]) and not bool(run.dead.any())
    found = {tuple(r.round().int().tolist()) for r in sae.W_dec[[3, 7]]}
    assert found == {(1, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0)}
    torch.testing.assert_close(sae.W_enc[[3, 7]].norm(dim=1), length.expand(2))
    assert float(sae.b_enc[[3, 7]].abs().max()) == 0


def test_resampling_brings_features_back_in_training() -> None:
    rows, _ = sparse_rows(2000, 12, 24, 2)
    dead = {}
    for times in (0, 2):
        sae = ReluSAE.create("s", 12, 24, seed=0, resample=times)
        sae.b_enc[:12] = -50.0
        settings = TrainSettings(tokens=60_000, batch=200, lr=3e-3, sparsity=0.5, dead_after=2000)
        train(sae, RowsSource(rows), settings, show=False)
        dead[times] = int((sae.encode(rows).counts() == 0).sum())
    assert dead[0] >= 10 > 3 >= dead[2]
    assert resampling_steps(4, 1000) == {125, 250, 375, 500} and resampling_steps(0, 100) == set()


def test_bad_resample() -> None:
    with pytest.raises(InputError, match="resample is -1"):
        ReluSAE.create("s", 4, 8, resample=-1)
