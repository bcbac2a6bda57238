"""Matryoshka: the sum over levels, its sparse gradient, and features that stay general."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError
from actlas.dictionaries import Batch, RowsSource, TrainSettings, train
from actlas.dictionaries.batch_topk import BatchTopKSAE
from actlas.dictionaries.matryoshka import MatryoshkaSAE
from actlas.dictionaries.sae import SAE

from .brute import check_gradients, random_weights, state


def test_loss_and_gradient_are_the_formula() -> None:
    sae = random_weights(MatryoshkaSAE.create("s", 4, 9, seed=1, k=3, levels=(2, 5, 9)))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()

    def loss(s: MatryoshkaSAE) -> float:
        pre = (x - s.b_dec) @ s.W_enc.T + s.b_enc
        cut = pre.relu().flatten().sort(descending=True).values[3 * 6 - 1]
        z = torch.where(pre >= cut, pre, torch.zeros_like(pre)).relu()
        return sum(
            float((x - z[:, :level] @ s.W_dec[:level] - s.b_dec).square().sum(1).mean())
            for level in (2, 5, 9)
        )

    check_gradients(sae, Batch(x), state(sae), loss, ("W_enc", "b_enc", "W_dec", "b_dec"))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dead", [[], [0, 8, 11]])
def test_sparse_gradients_are_autograds(dead: list[int], centred: bool) -> None:
    sae = random_weights(MatryoshkaSAE.create("s", 6, 12, seed=3, k=3, levels=(1, 4, 12), centred=centred))
    batch = Batch(torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).double())
    expected_objective, expected = SAE.gradients(sae, batch, state(sae, dead))
    objective, found = sae.gradients(batch, state(sae, dead))
    torch.testing.assert_close(objective.loss, expected_objective.loss.detach())
    torch.testing.assert_close(objective.error, expected_objective.error)
    for name in sae.trainable:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_default_levels_are_the_published_shares() -> None:
    assert MatryoshkaSAE.create("s", 4, 320, k=3).levels == (10, 30, 70, 150, 320)
    assert MatryoshkaSAE.create("s", 4, 4, k=1).levels[-1] == 4


def test_levels_must_rise_to_the_width() -> None:
    for levels in ((4, 2, 9), (2, 5), (0, 9), (3, 3, 9)):
        with pytest.raises(InputError, match="they must increase and end at the width, 9"):
            MatryoshkaSAE.create("s", 4, 9, k=3, levels=levels)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_level_reconstructs_alone(seed: int) -> None:
    """Sixteen directions, each rarer than the one before. Cut to its first four features, a Matryoshka still
    holds the frequent ones; those of a plain BatchTopK hold whatever came first."""
    g = torch.Generator().manual_seed(100 + seed)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=g)).Q
    share = 0.5 / torch.arange(1, 17).float()
    rows = (
        (torch.rand(6000, 16, generator=g) < share) * (0.5 + torch.rand(6000, 16, generator=g))
    ) @ directions
    rows = rows[rows.norm(dim=1) > 0]
    total = (rows - rows.mean(0)).square().sum()
    left = {}
    for kind, options in ((MatryoshkaSAE, {"levels": (4, 24)}), (BatchTopKSAE, {})):
        sae = kind.create("s", 16, 24, seed=seed, k=3, **options)
        train(sae, RowsSource(rows), TrainSettings(tokens=120_000, batch=300, lr=3e-3), show=False)
        codes = sae.encode(rows)
        first, whole = (sae.decode(c) - rows for c in (codes.only(range(4)), codes))
        left[kind.__name__] = float(first.square().sum() / total), float(whole.square().sum() / total)
    assert left["MatryoshkaSAE"][0] < 0.85 * left["BatchTopKSAE"][0]
    assert left["MatryoshkaSAE"][1] < 0.06 and left["BatchTopKSAE"][1] < 0.06
