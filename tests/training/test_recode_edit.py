"""Recode as an edit: the gradient against finite differences, scopes, control, saving, the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.training.recode_edit import Recode, fit_recode
from actlas.training.recoding_signals import entropy
from tests.core.tiny import TEXTS, tiny

LAST = "blocks.2.resid_post"


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


def test_a_raw_step_against_finite_differences() -> None:
    model = tiny("llama")
    model.module.double()
    h = model.trace("Why", LAST)[LAST]
    with model.edit(Recode(LAST, "entropy", step=0.5, unit="raw")):
        moved = model.trace("Why", LAST)[LAST]
    with torch.no_grad():
        for j in range(0, 32, 5):
            e = torch.zeros(32).double()
            e[j] = 1e-4
            slope = (entropy(model.unembed(h + e)) - entropy(model.unembed(h - e))) / 2e-4
            torch.testing.assert_close((h - moved)[..., j], 0.5 * slope, atol=5e-5, rtol=1e-2)


@pytest.mark.parametrize("site", [LAST, "blocks.0.resid_post"])
def test_entropy_falls_and_rises_with_the_other_sign(model: Model, site: str) -> None:
    base = entropy(model.unembed(model.trace(TEXTS[0], site)[site])).detach()
    for strength, sign in ((1.0, -1), (-1.0, 1)):
        with model.edit(Recode(site, step=0.005) * strength):
            got = entropy(model.unembed(model.trace(TEXTS[0], site)[site])).detach()
        assert bool((sign * (got - base) > 0).all())
    with model.edit(Recode(site, step=0.005, random_seed=0)):
        chance = entropy(model.unembed(model.trace(TEXTS[0], site)[site])).detach()
    assert float((chance - base).abs().mean()) < 0.5 * float((got - base).abs().mean())


def test_a_target_is_raised_only_in_scope_and_step_zero_changes_nothing(model: Model) -> None:
    base = model.logits(TEXTS[0]).log_softmax(-1)[0, :, 40]
    with model.edit(Recode(LAST, "target_nll", 40, step=0.05, steps=3).at(positions="last")):
        made = model.logits(TEXTS[0]).log_softmax(-1)[0, :, 40]
    assert torch.equal(made[:-1], base[:-1]) and float(made[-1] - base[-1]) > 0.05
    with model.edit(Recode(LAST, step=0.0)), pytest.warns(UserWarning, match="changed nothing"):
        assert torch.equal(model.logits(TEXTS[0]).log_softmax(-1)[0, :, 40], base)
    with model.edit(Recode(LAST, "target_nll", 40, step=0.5, steps=10)):
        assert 40 in model.generate("Why", max_new_tokens=3).tokens[0].tolist()


def test_the_method_measures_and_the_edit_saves(model: Model, tmp_path: Path) -> None:
    edit = fit_recode(model, TEXTS, step=0.02)
    found = {(m.name, m.group["direction"]): m for m in edit.measurements}
    fall, chance = (found["rise of the entropy", d] for d in ("gradient", "random"))
    assert fall.high is not None and fall.high < 0 and fall.value < chance.value
    edit.save(tmp_path / "e")
    again = Edit.load(tmp_path / "e", model)
    with model.edit(edit):
        wanted = model.logits(TEXTS[0])
    with model.edit(again):
        assert torch.equal(model.logits(TEXTS[0]), wanted)
    assert len(again.measurements) == 4


def test_bad_input(model: Model) -> None:
    for wrong, said in (
        ({"step": -1.0}, "step is -1"),
        ({"signal": "surprise"}, "must be 'entropy'"),
        ({"signal": "target_nll"}, "give target="),
        ({"target": 3}, "give target="),
        ({"unit": "m"}, "'resid' or 'raw'"),
    ):
        with pytest.raises(InputError, match=said):
            Recode(LAST, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be decoded"), model.edit(Recode("blocks.0.mlp.act")):
        pass
    with pytest.raises(InputError, match="has 67 tokens"), model.edit(Recode(LAST, "target_nll", 400)):
        model.logits("Why")
    with pytest.raises(InputError, match="no text"):
        fit_recode(model, [])
