"""BatchTopK: the choice over a batch, its gradient, and the threshold that stands for it at inference."""

from __future__ import annotations

import pytest
import torch

from actlas.dictionaries import Batch, RowsSource, TrainSettings, train
from actlas.dictionaries.batch_topk import BatchTopKSAE, batch_topk
from actlas.dictionaries.sae import SAE

from .brute import check_gradients, random_weights, state
from .conftest import sparse_rows


def test_choice_is_over_the_whole_batch() -> None:
    pre = torch.tensor([[9.0, 8.0, 7.0, -1.0], [1.0, 0.5, -3.0, -4.0]])
    assert batch_topk(pre, 2).tolist() == [[9.0, 8.0, 7.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert batch_topk(pre, 4).tolist() == [[9.0, 8.0, 7.0, 0.0], [1.0, 0.5, 0.0, 0.0]]  # never a negative one


def test_gradient_is_the_formulas() -> None:
    sae = random_weights(BatchTopKSAE.create("s", 4, 9, seed=1, k=2))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()

    def loss(s: BatchTopKSAE) -> float:
        pre = (x - s.b_dec) @ s.W_enc.T + s.b_enc
        cut = pre.relu().flatten().sort(descending=True).values[2 * 6 - 1]
        z = torch.where(pre >= cut, pre, torch.zeros_like(pre)).relu()
        error = x - z @ s.W_dec - s.b_dec
        return float(error.square().sum(1).mean())

    check_gradients(sae, Batch(x), state(sae), loss, ("W_enc", "b_enc", "W_dec", "b_dec"))


@pytest.mark.parametrize("dead", [[], [0, 4]])
def test_sparse_gradients_are_autograds(dead: list[int]) -> None:
    sae = random_weights(BatchTopKSAE.create("s", 6, 12, seed=3, k=3))
    batch = Batch(torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).double())
    expected_objective, expected = SAE.gradients(sae, batch, state(sae, dead))
    objective, found = sae.gradients(batch, state(sae, dead))
    torch.testing.assert_close(objective.loss, expected_objective.loss.detach())
    for name in sae.trainable:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_threshold_follows_the_smallest_active_value() -> None:
    sae = BatchTopKSAE.create("s", 6, 12, k=3)
    g, smallest = torch.Generator().manual_seed(0), []
    for step in range(30):
        batch = Batch(torch.randn(20, 6, generator=g))
        objective, _ = sae.gradients(batch, state(sae, step=step))
        smallest.append(float(objective.codes.values[objective.codes.active].min()))
    assert float(sae.threshold) == pytest.approx(sum(smallest) / 30, rel=1e-5)
    before = float(sae.threshold)
    objective, _ = sae.gradients(Batch(3 * torch.randn(20, 6, generator=g)), state(sae, step=5000))
    last = float(objective.codes.values[objective.codes.active].min())
    assert float(sae.threshold) == pytest.approx(before + 0.01 * (last - before), rel=1e-5)


def test_inference_uses_the_threshold_row_by_row() -> None:
    rows, _ = sparse_rows(4000, 16, 24, 3)
    sae = BatchTopKSAE.create("s", 16, 32, seed=0, k=4)
    train(sae, RowsSource(rows), TrainSettings(tokens=60_000, batch=200, lr=3e-3), show=False)
    codes = sae.encode(rows)
    assert float(sae.threshold) > 0
    assert float(codes.l0.double().mean()) == pytest.approx(4, abs=0.6)
    assert float(codes.values[codes.active].min()) > float(sae.threshold)
    assert int(codes.l0.max()) > 4 > int(codes.l0.min())  # rows differ in how many they need
    alone = torch.cat([sae.reconstruct(r[None]) for r in rows[:5]])
    torch.testing.assert_close(alone, sae.reconstruct(rows)[:5])
