"""Merging: edits and fine-tunes of one model become one edit."""

from __future__ import annotations

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.edits import Add, Zero
from actlas.core.errors import InputError, ModelError
from actlas.core.methods import find_method
from actlas.core.model import Model
from actlas.core.ties import ties
from actlas.core.weight_edit import WeightEdit
from actlas.merge.ties import fit_merge, fit_task_vector, merge, task_vector
from tests.core.families import BY_NAME

DOWN = "model.layers.{}.mlp.down_proj.weight"


def tuned(seed: int, *blocks: int) -> Model:
    """Return the small model with some matrices moved, as a fine-tune would."""
    model = BY_NAME["llama"].model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for b in blocks:
            weight = model.block(b).mlp.down_proj.weight
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def logits(model: Model) -> torch.Tensor:
    return model.logits(BY_NAME["llama"].inputs(model.module))


def test_a_task_vector_is_the_fine_tune_and_can_be_taken_back() -> None:
    base, other = BY_NAME["llama"].model(), tuned(1, 0, 2)
    vector = task_vector(base, other)
    assert sorted(vector.deltas) == [DOWN.format(0), DOWN.format(2)]
    with base.edit(vector):
        torch.testing.assert_close(logits(base), logits(other))
    with other.edit(-vector):
        torch.testing.assert_close(logits(other), logits(base))


def test_ties_of_two_fine_tunes_is_ties_of_their_task_vectors(tmp_path) -> None:
    base, one, two = BY_NAME["llama"].model(), tuned(1, 0, 1), tuned(2, 1)
    saved = task_vector(base, two).save(tmp_path / "two")
    edit = merge(base, [one, saved], density=0.5)
    assert isinstance(edit, WeightEdit)
    a, b = task_vector(base, one).deltas, task_vector(base, two).deltas
    zeros = torch.zeros_like(a[DOWN.format(0)])
    expected = ties([dict(a), {DOWN.format(0): zeros, DOWN.format(1): b[DOWN.format(1)]}], density=0.5)
    assert set(edit.deltas) == set(expected)
    assert all(torch.equal(edit.deltas[n], t) for n, t in expected.items())
    edit.save(tmp_path / "merged")
    with base.edit(edit):
        now = logits(base)
    with base.edit(Edit.load(tmp_path / "merged", base)):
        assert torch.equal(logits(base), now)


def test_sum_and_average() -> None:
    base, one, two = BY_NAME["llama"].model(), tuned(1, 0), tuned(2, 0)
    a, b = task_vector(base, one), task_vector(base, two)
    name = DOWN.format(0)
    total, mean = merge(base, [a, b], method="sum"), merge(base, [a * 2, b], method="average")
    torch.testing.assert_close(total.deltas[name], a.deltas[name] + b.deltas[name])
    torch.testing.assert_close(mean.deltas[name], (2 * a.deltas[name] + b.deltas[name]) / 2)
    weighted = merge(base, [a, b], method="sum", weights=[3.0, 1.0])
    torch.testing.assert_close(weighted.deltas[name], 3 * a.deltas[name] + b.deltas[name])
    with base.edit(total):
        both = logits(base)
    with base.edit(a + b):
        torch.testing.assert_close(logits(base), both)


def test_steering_vectors_at_one_site_merge() -> None:
    model = BY_NAME["llama"].model()
    site = "blocks.1.resid_post"
    a, b = Add(site, torch.tensor([1.0, 0.5] * 16)) * 2, Add(site, torch.tensor([1.0, -3.0] * 16))
    edit = merge(model, [a, b], density=1.0, scale=0.5)
    assert isinstance(edit, Add) and edit.strength == 0.5
    assert edit.vector[:2].tolist() == [1.5, -3.0]
    with pytest.raises(InputError, match="cannot be merged; use one site"):
        merge(model, [a, Add("blocks.2.resid_post", torch.ones(32))])


def test_bad_input_says_what_would_be_right() -> None:
    model = BY_NAME["llama"].model()
    weights = task_vector(model, tuned(1, 0))
    with pytest.raises(InputError, match="at least two"):
        merge(model, [weights])
    with pytest.raises(InputError, match="must be 'ties', 'average' or 'sum'"):
        merge(model, [weights, weights], method="slerp")
    with pytest.raises(InputError, match="cannot be merged with the others"):
        merge(model, [weights, Zero("blocks.0.mlp.out")])
    with pytest.raises(InputError, match="no difference"):
        task_vector(model, BY_NAME["llama"].model())
    with pytest.raises((InputError, ModelError), match="differ|tokens"):
        task_vector(model, BY_NAME["gpt2"].model())
    with pytest.raises(InputError, match="an edit already"):
        task_vector(model, weights)
    with pytest.raises(InputError, match="made for"):
        merge(model, [weights, task_vector(model, tuned(2, 0)).bind(BY_NAME["gpt2"].model().fingerprint)])


def test_both_are_methods_that_the_command_line_can_fit(tmp_path) -> None:
    assert find_method("merge").fit is fit_merge and find_method("task-vector").fit is fit_task_vector
    model = BY_NAME["llama"].model()
    paths = [str(task_vector(model, tuned(s, 0)).save(tmp_path / f"e{s}")) for s in (1, 2)]
    found = fit_merge(model, sources=",".join(paths), density=1.0)
    expected = merge(model, paths, density=1.0)
    assert torch.equal(found.deltas[DOWN.format(0)], expected.deltas[DOWN.format(0)])
