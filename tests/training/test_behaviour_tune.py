"""Tuning the last blocks: what is learned is an edit, and the model has its own weights again."""

from __future__ import annotations

import pytest
import torch

from actlas.core.continuations import continuations
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.methods import find_method
from actlas.core.weight_edit import WeightEdit
from actlas.training.behaviour_tune import behaviour_tune
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

ROWS = [{"prompt": f"The {w} is", "target": " red"} for w in ("car", "house", "old dog", "sea", "hat")]


def loss(model, rows=ROWS) -> float:
    batch = continuations(model, [r["prompt"] for r in rows], [r["target"] for r in rows])
    return float(batch.losses(batch.logits(model)).sum() / batch.real.sum())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_learns_and_comes_off_bit_for_bit(family: str, tmp_path) -> None:
    model = tiny(family)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    flags = [p.requires_grad for p in model.module.parameters()]
    base = loss(model)
    edit = behaviour_tune(model, ROWS, last_layers=2, epochs=12, lr=1e-2, batch=2)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert all(p.grad is None for p in model.module.parameters())
    assert loss(model) == base
    first, last = (m.value for m in edit.measurements)
    assert first == pytest.approx(base, rel=1e-4) and last < 0.7 * base
    with model.edit(edit):
        assert loss(model) == pytest.approx(last, rel=1e-3)
    with model.edit(edit * 0.5):
        assert last < loss(model) < base
    assert isinstance(edit, WeightEdit)
    blocks = {n.split("layers.")[-1].split("h.")[-1].split(".")[0] for n in edit.deltas}
    assert blocks == {"1", "2"}
    edit.save(tmp_path / "e")
    again = Edit.load(tmp_path / "e", model)
    with model.edit(again):
        assert loss(model) == pytest.approx(last, rel=1e-3)
    assert [m.value for m in again.measurements] == [first, last]


def test_one_step_is_the_gradient_of_the_whole_model() -> None:
    """With one batch and one step AdamW moves every weight by lr along the sign of the full gradient."""
    model = tiny()
    edit = behaviour_tune(model, ROWS, last_layers=1, epochs=1, lr=1e-3, batch=8)
    batch = continuations(model, [r["prompt"] for r in ROWS], [r["target"] for r in ROWS])
    logits = batch.predictions(model.module(**batch.inputs).logits)
    (batch.losses(logits).sum() / batch.real.sum()).backward()
    name = "model.layers.2.mlp.down_proj.weight"
    gradient = dict(model.module.named_parameters())[name].grad
    clear = gradient.abs() > 1e-4
    assert clear.sum() > 100
    assert torch.equal(edit.deltas[name][clear].sign(), -gradient[clear].sign())


def test_installed_edits_do_not_count_and_the_seed_decides() -> None:
    model = tiny()
    options = {"last_layers": 1, "epochs": 2, "lr": 1e-3, "batch": 2}
    one = behaviour_tune(model, ROWS, **options)
    with model.edit(one):
        two = behaviour_tune(model, ROWS, **options)
    three = behaviour_tune(model, ROWS, seed=1, **options)
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(one.deltas[name], two.deltas[name])
    assert not torch.equal(one.deltas[name], three.deltas[name])


def test_bad_input_says_what_would_be_right() -> None:
    model = tiny()
    before = model.block(2).mlp.down_proj.weight.clone()
    assert find_method("behaviour-tune").fit is behaviour_tune
    with pytest.raises(InputError, match="has 1 to 3 blocks"):
        behaviour_tune(model, ROWS, last_layers=4)
    with pytest.raises(InputError, match="all must be positive"):
        behaviour_tune(model, ROWS, last_layers=1, epochs=0)
    with pytest.raises(InputError, match="no edit requests"):
        behaviour_tune(model, [])
    with pytest.raises(ModelError, match="chat=False"):
        behaviour_tune(model, ROWS, last_layers=1, chat=True)
    with pytest.raises(ModelError, match="causal-lm"):
        behaviour_tune(BY_NAME["bert"].model(), ROWS)
    with pytest.raises(NonFiniteError, match="lower lr"):
        behaviour_tune(model, ROWS, last_layers=1, epochs=40, lr=1e30)
    assert torch.equal(model.block(2).mlp.down_proj.weight, before)
