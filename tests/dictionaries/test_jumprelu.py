"""JumpReLU: forward values, and the straight-through gradients against the paper's equations in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries import Batch, RowsSource, TrainSettings, train
from actlas.dictionaries.jumprelu import JumpReluSAE

from .brute import random_weights, state
from .conftest import sparse_rows


def made(eps: float) -> JumpReluSAE:
    sae = random_weights(JumpReluSAE.create("s", 4, 7, seed=1, bandwidth=eps, threshold=0.4), spread=0.2)
    return sae


@pytest.mark.parametrize("eps", [0.05, 0.6, 1.5])
def test_loss_and_gradients_are_the_papers(eps: float) -> None:
    sae, weight = made(eps), 0.9
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(2)).double()
    n, m = 40, 7
    theta = sae.log_threshold.exp()
    expected = {name: torch.zeros_like(getattr(sae, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    d_theta, total, l0 = torch.zeros(m).double(), 0.0, 0
    near = 0
    for row in x:
        pre = sae.W_enc @ row + sae.b_enc
        z = torch.tensor([float(p) if p > t else 0.0 for p, t in zip(pre, theta, strict=True)]).double()
        g = 2 * (z @ sae.W_dec + sae.b_dec - row) / n
        total += float((z @ sae.W_dec + sae.b_dec - row).square().sum())
        l0 += int((z > 0).sum())
        expected["b_dec"] += g
        for i in range(m):
            expected["W_dec"][i] += z[i] * g
            dz = g @ sae.W_dec[i]
            if pre[i] > theta[i]:
                expected["W_enc"][i] += dz * row
                expected["b_enc"][i] += dz
            if abs(pre[i] - theta[i]) < eps / 2:
                near += 1
                d_theta[i] += dz * (-theta[i] / eps) + (weight / n) * (-1 / eps)
    assert near > 0
    objective, found = sae.gradients(Batch(x), state(sae, sparsity=weight))
    assert float(objective.loss) == pytest.approx(total / n + weight * l0 / n)
    assert float(objective.codes.l0.sum()) == l0
    expected["W_dec"] = sae.constrain({"W_dec": expected["W_dec"]})["W_dec"]
    expected["log_threshold"] = d_theta * theta
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, n=name: f"{n}: {text}")


def test_defaults_are_the_published_ones_in_our_units() -> None:
    sae = JumpReluSAE.create("s", 64, 128)
    assert sae.bandwidth == pytest.approx(0.008) and not sae.centred
    torch.testing.assert_close(sae.threshold, torch.full((128,), 0.008))
    assert sae.default_sparsity == pytest.approx(6e-4 * 64)


def test_thresholds_stay_positive_and_rise_with_the_penalty() -> None:
    rows, _ = sparse_rows(3000, 12, 20, 2)
    l0, thresholds = [], []
    for weight in (0.05, 1.0):
        sae = JumpReluSAE.create("s", 12, 24, seed=0, bandwidth=0.5, threshold=0.3)
        settings = TrainSettings(tokens=60_000, batch=200, lr=3e-3, sparsity=weight)
        train(sae, RowsSource(rows), settings, show=False)
        l0.append(float(sae.encode(rows).l0.double().mean()))
        thresholds.append(float(sae.threshold.mean()))
        assert float(sae.threshold.min()) > 0
    assert l0[1] < 0.7 * l0[0] and thresholds[1] > thresholds[0]


def test_bad_options() -> None:
    for name in ("bandwidth", "threshold"):
        with pytest.raises(InputError, match=f"{name} is 0.0; it must be above 0"):
            JumpReluSAE.create("s", 4, 8, **{name: 0})
    sae = JumpReluSAE.create("s", 4, 8)
    with pytest.raises(ShapeError, match=r"log_threshold has shape \[3\]; it must be \[8\]"):
        replace(sae, log_threshold=torch.zeros(3))
