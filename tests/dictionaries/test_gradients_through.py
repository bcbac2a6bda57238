"""Gradients pass through a reconstruction, for every kind of autoencoder, as finite differences say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actlas.core.model import Model
from actlas.dictionaries import TopKSAE
from actlas.dictionaries.sae import ARCHITECTURES, architecture

architecture("topk")  # fills the table


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_derivative_of_the_reconstruction(name: str) -> None:
    kind = architecture(name)
    g = torch.Generator().manual_seed(0)
    options = {"k": 4} if "k" in kind.__dataclass_fields__ else {}
    if kind.several_sites:
        options |= {"sites": ("a", "b"), "sizes": (6, 6)}
    sae = kind.create("s", 12, 24, seed=3, **options).to(dtype=torch.float64)
    moved = {"b_enc": 0.2 * torch.randn(24, generator=g).double()}
    if "r_mag" in kind.__dataclass_fields__:
        moved["r_mag"] = 0.3 * torch.randn(24, generator=g).double()
    sae = replace(sae, scale=0.7, **moved)
    x = torch.randn(5, 12, generator=g, dtype=torch.float64, requires_grad=True)
    along = torch.randn(5, 12, generator=g, dtype=torch.float64)
    weight = torch.randn(5, sae.b_dec.shape[0], generator=g, dtype=torch.float64)
    found = torch.autograd.grad((sae.reconstruct(x) * weight).sum(), x)[0]
    with torch.no_grad():
        assert torch.equal(sae.reconstruct(x), sae.reconstruct(x.detach()))
        step = 1e-7
        both = [(sae.reconstruct(x + s * along) * weight).sum() for s in (step, -step)]
    assert float((found * along).sum()) == pytest.approx(float(both[0] - both[1]) / (2 * step), rel=1e-4)
    assert float(found.abs().sum()) > 0


def test_the_model_is_differentiable_under_a_substitution(toy: Model) -> None:
    sae = TopKSAE.create("blocks.1.resid_post", 32, 48, k=6, seed=1)
    with toy.edit(sae.substitute()):
        trace = toy.trace("w1 w2 w3 w4", "blocks.0.resid_post", grad=True, stop=False)
        found = trace.gradients(lambda logits: logits[0, -1, 5])["blocks.0.resid_post"]
    assert float(found.abs().sum()) > 0
