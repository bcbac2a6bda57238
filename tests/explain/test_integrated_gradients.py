"""Attributions as a lens: they add up, save, load, and find what a model was built to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens
from actlas.core.methods import find_method
from actlas.core.model import Model
from actlas.explain import IntegratedGradients, deletion, integrated_gradients
from tests.core.tiny import tiny

PROMPT = "The committee met on"


def test_attributions_add_up_and_the_lens_gives_them_back(tmp_path: Path) -> None:
    model = tiny("gpt-neox")
    found = integrated_gradients(model, PROMPT, ("e", "i"), steps=64)
    assert found.error < 0.02
    assert found.measurements[0].value == pytest.approx(found.error, abs=1e-3)
    assert found.target == "log p('e') - log p('i')"
    assert "".join(found.tokens) == PROMPT
    x = model.trace(PROMPT, "embed")["embed"][0]
    assert torch.allclose(found.score(x), found.scores, atol=1e-5)
    assert [t for t, _ in found.top(2)] == [
        found.tokens[i] for i in found.scores.abs().argsort(descending=True)[:2]
    ]
    again = Lens.load(found.save(tmp_path / "why", model), model)
    assert isinstance(again, IntegratedGradients)
    assert torch.equal(again.scores, found.scores) and again.tokens == found.tokens
    with pytest.raises(ShapeError, match="one input"):
        found.score(x[:-1])


def test_the_default_target_is_the_models_own_next_token() -> None:
    model = tiny("llama")
    top = int(model.logits(PROMPT)[0, -1].argmax())
    found = integrated_gradients(model, PROMPT, steps=2)
    assert found.value == pytest.approx(float(model.logits(PROMPT)[0, -1].log_softmax(-1)[top]), abs=1e-4)


def test_a_later_site_is_attributed_too() -> None:
    model = tiny("gpt-neox")
    found = integrated_gradients(model, PROMPT, "e", steps=64, site="blocks.1.resid_post")
    assert found.site == "blocks.1.resid_post"
    assert found.error < 0.02


class Looks(nn.Module):
    """A classifier of `[b, 3]` numbers that looks at the second only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 2.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(x * self.weight).sum(1), -x.sum(1)], 1)


def test_numbers_are_attributed_directly() -> None:
    model = Model(Looks())
    x = torch.tensor([[1.0, 3.0, -1.0]])
    found = integrated_gradients(model, x, 0, steps=2)
    assert found.scores.tolist() == pytest.approx([0.0, 6.0, 0.0])
    shifted = integrated_gradients(model, x, 0, torch.tensor([0.0, 1.0, 0.0]), 2)
    assert shifted.scores.tolist() == pytest.approx([0.0, 4.0, 0.0])
    own = integrated_gradients(model, x, lambda output: output[:, 1], steps=2)
    assert own.scores.tolist() == pytest.approx([-1.0, -3.0, 1.0])
    with pytest.raises(InputError, match="classes are 0 to 1"):
        integrated_gradients(model, x, 5)
    with pytest.raises(InputError, match="one input at a time"):
        integrated_gradients(model, x.repeat(2, 1), 0)
    with pytest.raises(InputError, match="is for text"):
        integrated_gradients(model, x, 0, "mean")


def test_bad_targets() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="one input at a time"):
        integrated_gradients(model, ["a text", "another"], "e")
    with pytest.raises(InputError, match="one number for each row"):
        integrated_gradients(model, PROMPT, lambda output: output.logits, steps=1)


def test_deletion_reports_controls() -> None:
    model = tiny("gpt-neox")
    pairs = [(f"The committee met {w}e", f"The committee met {w}i") for w in ("on", "at", "in", "by")]
    found = deletion(model, pairs, steps=16, controls=2)
    by = {(m.name, m.group.get("tokens", "")): m for m in found}
    gap = by["drop of F", "top minus random"]
    assert gap.value == pytest.approx(by["drop of F", "top"].value - by["drop of F", "random"].value)
    assert gap.low is not None and gap.n == 4
    assert by["completeness error", ""].details["largest"] < 0.2
    assert find_method("integrated-gradients").fit is deletion
    with pytest.raises(InputError, match="k is 99"):
        deletion(model, pairs, k=99)
    with pytest.raises(InputError, match="at least 1 and 2"):
        deletion(model, pairs, controls=0)
