"""TIES against a loop over entries, and weight edits that leave every bit as it was."""

from __future__ import annotations

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ShapeError
from actlas.core.ties import average, ties
from actlas.core.weight_edit import WeightEdit
from tests.core.families import BY_NAME


def brute(changes: list[torch.Tensor], density: float, weights: list[float]) -> torch.Tensor:
    """The paper's three steps, entry by entry in float64."""
    kept = []
    for change in changes:
        flat = change.double().flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[
            : max(1, round(density * len(flat)))
        ]
        kept.append([flat[i] if i in order else 0.0 for i in range(len(flat))])
    out = []
    for entries in zip(*kept, strict=True):
        total = sum(w * x for w, x in zip(weights, entries, strict=True))
        sign = (total > 0) - (total < 0)
        agree = [(w, x) for w, x in zip(weights, entries, strict=True) if x * sign > 0]
        out.append(sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0.0)
    return torch.tensor(out, dtype=torch.float64).view(changes[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.53, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]])
def test_ties_is_what_the_paper_says(density: float, weights: list[float]) -> None:
    generator = torch.Generator().manual_seed(3)
    changes = [torch.randn(5, 7, generator=generator) for _ in range(3)]
    found = ties([{"w": c} for c in changes], density=density, weights=weights)["w"]
    torch.testing.assert_close(found.double(), brute(changes, density, weights), atol=1e-6, rtol=1e-6)


def test_trimming_is_global_unless_asked_otherwise() -> None:
    change = {"small": torch.tensor([0.1, 0.2]), "large": torch.tensor([5.0, 4.0])}
    assert ties([change], density=0.5)["small"].tolist() == [0.0, 0.0]
    assert ties([change], density=0.5, trim="tensor")["small"].tolist() == [0.0, pytest.approx(0.2)]


def test_equal_magnitudes_keep_exactly_the_density() -> None:
    assert int(ties([{"w": torch.ones(10)}], density=0.3)["w"].count_nonzero()) == 3


def test_one_change_whole_is_itself_and_opposites_cancel() -> None:
    change = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ties([{"w": change}], density=1.0)["w"], change)
    assert not ties([{"w": change}, {"w": -change}], density=1.0)["w"].any()


def test_disjoint_changes_keep_their_full_size() -> None:
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, -2.0, 0.0])
    assert ties([{"w": a}, {"w": b}], density=1.0)["w"].tolist() == [1.0, -2.0, 0.0]
    assert average([{"w": a}, {"w": b}])["w"].tolist() == [0.5, -1.0, 0.0]


def test_bad_input_says_what_is_wrong() -> None:
    w = {"w": torch.ones(2)}
    with pytest.raises(InputError, match="density is 0"):
        ties([w], density=0.0)
    with pytest.raises(InputError, match="nothing to merge"):
        ties([])
    with pytest.raises(InputError, match="2 positive numbers"):
        ties([w, w], weights=[1.0])
    with pytest.raises(InputError, match=r"only change 2 has 'v'"):
        ties([w, {"w": torch.ones(2), "v": torch.ones(1)}])
    with pytest.raises(ShapeError, match=r"\[2\] in change 1 and \[3\]"):
        ties([w, {"w": torch.ones(3)}])


NAME = "model.layers.1.mlp.down_proj.weight"


def test_a_weight_edit_comes_off_bit_for_bit(tmp_path) -> None:
    family = BY_NAME["llama"]
    model = family.model()
    inputs = family.inputs(model.module)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    delta = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    edit = WeightEdit({NAME: delta}, note="test")
    plain = model.logits(inputs)
    with model.edit(edit * 0.5):
        halved = model.logits(inputs)
        with model.edit(edit * 0.5):
            twice = model.logits(inputs)
            with model.without_edits():
                assert torch.equal(model.logits(inputs), plain)
            assert torch.equal(model.logits(inputs), twice)
        assert torch.equal(model.logits(inputs), halved)
    assert not torch.equal(halved, plain)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    with model.edit(edit):
        torch.testing.assert_close(model.logits(inputs), twice)
    with model.edit(edit * 0.0):
        assert torch.equal(model.logits(inputs), plain)
    edit.save(tmp_path / "e", model)
    again = Edit.load(tmp_path / "e", model)
    assert isinstance(again, WeightEdit) and again.note == "test" and torch.equal(again.deltas[NAME], delta)
    baked = edit.bake(family.model())
    with model.edit(again):
        assert torch.equal(baked.logits(inputs), model.logits(inputs))


def test_the_difference_of_two_models_turns_one_into_the_other() -> None:
    family = BY_NAME["gpt2"]
    base, tuned = family.model(), family.model()
    with torch.no_grad():
        tuned.module.transformer.h[0].mlp.c_fc.weight.add_(0.1)
    edit = WeightEdit.between(base, tuned)
    assert list(edit.deltas) == ["transformer.h.0.mlp.c_fc.weight"]
    inputs = family.inputs(base.module)
    with base.edit(edit):
        torch.testing.assert_close(base.logits(inputs), tuned.logits(inputs))
    with pytest.raises(InputError, match="no difference"):
        WeightEdit.between(base, family.model())
    with pytest.raises(InputError, match="differ in"):
        WeightEdit.between(base, BY_NAME["llama"].model())


def test_a_weight_edit_that_does_not_fit_is_refused_before_anything_changes() -> None:
    model = BY_NAME["llama"].model()
    before = model.block(1).mlp.down_proj.weight.clone()
    wrong = WeightEdit({NAME: torch.ones(32, 48), "model.layers.0.mlp.down_proj.weight": torch.ones(3)})
    with pytest.raises(ShapeError, match="the parameter is"):
        with model.edit(wrong):
            pass
    assert torch.equal(model.block(1).mlp.down_proj.weight, before)
    with pytest.raises(InputError, match="did you mean"):
        with model.edit(WeightEdit({"model.layers.1.mlp.down_pro.weight": torch.ones(1)})):
            pass
    with pytest.raises(InputError, match="same for every token"):
        WeightEdit({NAME: torch.ones(32, 48)}).at(rows=0)
