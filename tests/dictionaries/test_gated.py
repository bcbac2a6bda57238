"""Gated: the three-term loss and its gradient in float64, with the frozen decoder frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actlas.core.errors import ShapeError
from actlas.dictionaries import Batch
from actlas.dictionaries.gated import GatedSAE

from .brute import check_gradients, random_weights, state


def test_loss_and_gradient_are_the_formula() -> None:
    sae = random_weights(GatedSAE.create("s", 4, 7, seed=1))
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)).double()
    frozen_dec, frozen_bias, weight = sae.W_dec.clone(), sae.b_dec.clone(), 0.8
    active = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) > 0  # the step passes no gradient

    def loss(s: GatedSAE) -> float:
        total = 0.0
        for row, on in zip(x, active, strict=True):
            u = s.W_enc @ (row - s.b_dec)
            gate = u + s.b_enc
            z = on * torch.relu(torch.exp(s.r_mag) * u + s.b_mag)
            x_hat = z @ s.W_dec + s.b_dec
            by_gate = torch.relu(gate) @ frozen_dec + frozen_bias
            total += float((row - x_hat).square().sum() + (row - by_gate).square().sum())
            total += weight * float(torch.relu(gate).sum())
        return total / len(x)

    check_gradients(sae, Batch(x), state(sae, sparsity=weight), loss, GatedSAE.trainable)


def test_gate_decides_and_magnitude_measures() -> None:
    sae = GatedSAE.create("s", 3, 3, seed=0)
    sae = replace(
        sae,
        W_enc=torch.eye(3), b_enc=torch.tensor([-1.0, 0.0, 0.0]),
        r_mag=torch.tensor([0.0, 1.0, 0.0]), b_mag=torch.tensor([0.0, 0.0, -5.0]),
    )  # fmt: skip
    z = sae.encode(torch.tensor([[0.5, 2.0, 1.0], [1.5, -2.0, 6.0]])).dense()
    e = 2.718281828
    torch.testing.assert_close(z, torch.tensor([[0.0, 2 * e, 0.0], [1.5, 0.0, 1.0]]))


def test_wrong_shape() -> None:
    sae = GatedSAE.create("s", 3, 5)
    with pytest.raises(ShapeError, match=r"r_mag and b_mag of shape \[5\], not \[2\] and \[5\]"):
        replace(sae, r_mag=torch.zeros(2))
