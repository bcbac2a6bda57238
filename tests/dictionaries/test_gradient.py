"""Gradient SAE: which features are chosen, by hand; beta 0 and rows without a gradient are TopK."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries import Batch, RowsSource, TopKSAE, TrainSettings, train
from actlas.dictionaries.gradient import GradientSAE
from actlas.dictionaries.sae import SAE

from .brute import check_gradients, random_weights, state
from .conftest import sparse_rows


def chosen(sae: GradientSAE, x: torch.Tensor, g: torch.Tensor) -> list[set[int]]:
    """Choose by loops over rows and features."""
    out = []
    for row, gradient in zip(x, g, strict=True):
        z = torch.relu(sae.W_enc @ (row - sae.b_dec) + sae.b_enc)
        moved = [abs(float(sae.W_dec[i] @ gradient)) for i in range(sae.features)]
        mean = sum(moved) / len(moved)
        w = [v / mean if mean else (1.0 if sae.selection == "attribution" else 0.0) for v in moved]
        score = [
            float(z[i]) * (w[i] if sae.selection == "attribution" else 1 + sae.beta * w[i])
            for i in range(len(w))
        ]
        ranked = sorted(range(len(w)), key=lambda i: -score[i])[: sae.k]
        out.append({i for i in ranked if score[i] > 0})
    return out


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": 0.5}, {"beta": 30.0}, {"selection": "attribution"}]
)
def test_choice_is_the_formula(options: dict[str, object]) -> None:
    sae = random_weights(GradientSAE.create("s", 5, 14, seed=1, k=3, **options))
    g = torch.Generator().manual_seed(2)
    x, gradient = torch.randn(20, 5, generator=g).double(), torch.randn(20, 5, generator=g).double()
    gradient[4] = 0
    codes = sae.select(sae.pre(x), Batch(x, gradient=gradient))
    found = [set(c.indices[c.active].tolist()) for c in (codes[i] for i in range(20))]
    assert found == chosen(sae, x, gradient)
    plain = sae.activate(sae.pre(x))
    assert set(codes[4].indices[codes[4].active].tolist()) == set(plain[4].indices[plain[4].active].tolist())
    differs = any(set(plain[i].indices[plain[i].active].tolist()) != found[i] for i in range(20))
    assert differs == (options != {"beta": 0.0})
    pre = sae.pre(x)
    torch.testing.assert_close(codes.values, pre.gather(1, codes.indices).relu())  # values stay z
    scaled = sae.select(pre, Batch(x, gradient=1000 * gradient))
    assert torch.equal(scaled.indices, codes.indices)  # beta does not depend on the loss's scale


def test_gradient_of_the_loss_treats_the_choice_as_fixed() -> None:
    sae = random_weights(GradientSAE.create("s", 4, 9, seed=1, k=2, beta=2.0))
    g = torch.Generator().manual_seed(3)
    x, gradient = torch.randn(8, 4, generator=g).double(), torch.randn(8, 4, generator=g).double()
    sets = chosen(sae, x, gradient)

    def loss(s: GradientSAE) -> float:
        total = 0.0
        for row, on in zip(x, sets, strict=True):
            z = torch.relu(s.W_enc @ (row - s.b_dec) + s.b_enc)
            total += float((row - s.b_dec - sum(z[i] * s.W_dec[i] for i in on)).square().sum())
        return total / len(x)

    check_gradients(sae, Batch(x, gradient=gradient), state(sae), loss, SAE.trainable)


def test_beta_zero_trains_like_topk() -> None:
    rows, _ = sparse_rows(1500, 12, 24, 2)
    gradient = torch.randn(1500, 12, generator=torch.Generator().manual_seed(0))
    settings = TrainSettings(tokens=10_000, batch=100, lr=3e-3)
    plain = train(TopKSAE.create("s", 12, 24, k=3), RowsSource(rows), settings, show=False)
    zero = train(
        GradientSAE.create("s", 12, 24, k=3, beta=0.0),
        RowsSource(rows, gradient=gradient),
        settings,
        show=False,
    )
    torch.testing.assert_close(plain.W_dec, zero.W_dec, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(plain.b_enc, zero.b_enc, atol=1e-4, rtol=1e-3)


def test_features_that_the_loss_feels_are_kept_first() -> None:
    """Half of the true directions move the loss. With too few places, gradient selection keeps those."""
    g = torch.Generator().manual_seed(0)
    truth = torch.linalg.qr(torch.randn(24, 24, generator=g)).Q
    chosen_ones = torch.rand(6000, 24, generator=g).argsort(1)[:, :6]
    rows = torch.zeros(6000, 24).scatter(1, chosen_ones, 0.5 + torch.rand(6000, 6, generator=g)) @ truth
    gradient = torch.randn(6000, 12, generator=g) @ truth[:12]
    settings = TrainSettings(tokens=60_000, batch=200, lr=3e-3)
    error = {}
    for beta in (0.0, 3.0):
        sae = GradientSAE.create("s", 24, 36, seed=0, k=3, beta=beta)
        train(sae, RowsSource(rows, gradient=gradient), settings, show=False)
        codes = sae.encode_with_gradient(rows, gradient)
        error[beta] = float((((rows - sae.decode(codes)) * gradient).sum(1)).square().mean())
    assert error[3.0] < 0.6 * error[0.0]


def test_bad_input() -> None:
    for beta in (-1.0, float("inf")):
        with pytest.raises(InputError, match="beta is"):
            GradientSAE.create("s", 4, 8, k=2, beta=beta)
    with pytest.raises(InputError, match="selection is 'magic'"):
        GradientSAE.create("s", 4, 8, k=2, selection="magic")
    sae, x = GradientSAE.create("s", 4, 8, k=2), torch.randn(5, 4)
    with pytest.raises(InputError, match="trains on rows with gradients; collect them"):
        sae.gradients(Batch(x), state(sae))
    with pytest.raises(ShapeError, match=r"not \[5, 4\] and \[5, 3\]"):
        sae.encode_with_gradient(x, torch.randn(5, 3))
