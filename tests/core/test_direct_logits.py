"""The direct effect on the logits is the derivative of norm and head, apart from the part along x."""

from __future__ import annotations

import pytest
import torch

from actlas.core.direct_logits import direct_logits, final_gain, top_logits
from actlas.core.errors import ModelError, ShapeError

from .families import BY_NAME


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gpt-neox", "bloom"])
def test_effect_is_the_change_of_the_logits(family: str) -> None:
    model = BY_NAME[family].model()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, generator=g)
    x -= x.mean()
    v = torch.randn(32, generator=g)
    v -= v.mean()
    v -= (v @ x) / (x @ x) * x  # what is left out is the part along x
    with torch.no_grad():
        both = model.unembed(torch.stack([x + 1e-3 * v, x - 1e-3 * v]).double().float())
    change = (both[0] - both[1]) / 2e-3 * x.square().mean().sqrt()
    change -= change.mean()
    found = direct_logits(model, v.unsqueeze(0))[0]
    torch.testing.assert_close(found, change, atol=0.02 * float(change.abs().max()), rtol=0)


def test_gain_is_the_weight() -> None:
    model = BY_NAME["llama"].model()
    torch.testing.assert_close(
        final_gain(model), model.module.model.norm.weight.detach(), atol=1e-4, rtol=1e-4
    )


def test_top_logits_are_sorted_and_chunks_do_not_matter() -> None:
    model = BY_NAME["llama"].model()
    directions = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    ids, effects = top_logits(model, directions, k=3)
    again = top_logits(model, directions, k=3, chunk=2)
    assert torch.equal(ids, again[0]) and torch.allclose(effects, again[1], atol=1e-5)
    logits = direct_logits(model, directions)
    assert torch.equal(effects[:, 0, 0], logits.max(1).values) and torch.equal(ids[:, 1, 0], logits.argmin(1))


def test_bad_directions() -> None:
    with pytest.raises(ShapeError, match=r"directions are \[n, 32\]"):
        direct_logits(BY_NAME["llama"].model(), torch.zeros(2, 5))
    with pytest.raises(ModelError, match="no output head"):
        direct_logits(BY_NAME["vit"].model(), torch.zeros(2, 32))
