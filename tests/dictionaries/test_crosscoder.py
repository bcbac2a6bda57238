"""Crosscoders: loss and gradient in float64, where features live, steering and patching of a small model."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.dictionaries import Batch, RowsSource, TrainSettings, train
from actlas.dictionaries.crosscoder import Crosscoder

from .brute import check_gradients, random_weights, recovery, state

SITES = ("blocks.0.resid_post", "blocks.2.resid_post")


def test_loss_and_gradient_are_the_formula() -> None:
    sae = random_weights(Crosscoder.create("a, b", 7, 6, seed=1, sizes=(3, 4)))
    sae.W_dec *= torch.linspace(0.5, 2, 6).double()[:, None]
    sae.site_scale[:3] = 1.7
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(2)).double()

    def loss(s: Crosscoder) -> float:
        total = 0.0
        for row in x:
            y = row * s.site_scale
            z = [max(0.0, float(s.W_enc[i] @ y + s.b_enc[i])) for i in range(6)]
            for part in (slice(0, 3), slice(3, 7)):
                x_hat = s.b_dec[part] + sum(z[i] * s.W_dec[i, part] for i in range(6))
                total += float((y[part] - x_hat).square().sum())
            total += 0.6 * sum(z[i] * float(s.W_dec[i, :3].norm() + s.W_dec[i, 3:].norm()) for i in range(6))
        return total / len(x)

    check_gradients(sae, Batch(x), state(sae, sparsity=0.6), loss, ("W_enc", "b_enc", "W_dec", "b_dec"))


def test_shared_and_private_features_are_told_apart() -> None:
    g = torch.Generator().manual_seed(0)
    n, d, count = 12_000, 12, 18
    a, b = (torch.nn.functional.normalize(torch.randn(count, d, generator=g)) for _ in range(2))
    a[12:], b[:6] = 0, 0  # 0-5 only in the first site, 6-11 in both, 12-17 only in the second
    z = (torch.rand(n, count, generator=g) < 0.12) * (0.5 + torch.rand(n, count, generator=g))
    rows = torch.cat([z @ a, 20 * (z @ b)], dim=1)  # the second site is twenty times as large
    rows = rows[rows.norm(dim=1) > 0]
    sae = Crosscoder.create("a, b", 2 * d, 24, seed=0)
    settings = TrainSettings(tokens=400_000, batch=256, lr=3e-3, sparsity=0.4)
    train(sae, RowsSource(rows), settings, show=False)
    parts = sae.atoms[:, :d], sae.atoms[:, d:] / 20
    whole = torch.cat(parts, dim=1)
    truth = torch.cat([a, b], dim=1)
    assert recovery(truth, whole) > 0.9
    best = (torch.nn.functional.normalize(truth) @ torch.nn.functional.normalize(whole).T).argmax(1)
    share = sae.norms()[best, 0]
    assert float(share[:6].min()) > 0.8 and float(share[12:].max()) < 0.2
    assert 0.2 < float(share[6:12].min()) and float(share[6:12].max()) < 0.8
    assert 0.4 < float(share[6:12].mean()) < 0.6
    error = (sae.reconstruct(rows) - rows).square()
    for part in (slice(0, d), slice(d, 2 * d)):
        assert float(error[:, part].sum()) < 0.2 * float((rows - rows.mean(0))[:, part].square().sum())


def test_edits_on_a_model(toy: Model, text: list[str]) -> None:
    trace = toy.trace(text[:3], list(SITES))
    sae = Crosscoder.create(SITES[0], 64, 20, sites=SITES, seed=0)
    rows = torch.cat([t.reshape(-1, 32) for t in (trace[SITES[0]], trace[SITES[1]])], dim=1)
    train(sae, RowsSource(rows, keep_massive=True), TrainSettings(tokens=600, batch=30), show=False)
    assert torch.equal(sae.read(trace).reshape(-1, 64), rows)
    expected = sae.reconstruct(rows)
    with toy.edit(sae.patch(trace)):
        after = toy.trace(text[:3], list(SITES))
    for site, part in zip(SITES, expected.split(32, dim=1), strict=True):
        torch.testing.assert_close(after[site].reshape(-1, 32), part)
    with toy.edit(sae.edit(4, 3.0)):
        after = toy.trace(text[:3], list(SITES))
    torch.testing.assert_close(
        after[SITES[0]], trace[SITES[0]] + 3.0 * sae.direction(4)[:32], atol=1e-5, rtol=1e-4
    )


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"7 channels in all; it has 2 sites and sizes \[3, 3\]"):
        Crosscoder.create("a, b", 7, 4)
    sae = Crosscoder.create("a, b", 8, 4)
    with pytest.raises(InputError, match=r"use crosscoder.patch"):
        sae.substitute()
    with pytest.raises(InputError, match=r"steer with edit\(feature, strength\)"):
        sae.edit({0: 1.0})
    with pytest.raises(InputError, match="the mean norm at b is 0"):
        sae.prepared(Batch(torch.cat([torch.randn(5, 4), torch.zeros(5, 4)], 1)))
