"""Answers by strength: equal to a plain run with the edit installed, and the measure of action entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.model import Model
from actlas.data.task_items import TaskItem
from actlas.measure import measure
from actlas.measure.action_entropy import action_chances, action_entropy, entropy
from actlas.steering.alpha_curve import AnswerRuns, alpha_curve
from actlas.steering.directions import fit_direction
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

PAIRS = [("he was glad", "he was sad"), ("a fine day", "a grim day"), ("so good now", "so bad now")]
ITEMS = [
    TaskItem("a", "The answer to it i", "s", ("t", "n")),
    TaskItem("b", "Why", "x", ("y", "z")),
    TaskItem("c", "It was raining and nobody cam", "e", ("o", "a")),
    TaskItem("d", "We will come back", ".", ("!", "?")),
]


def brute(model: Model, item: TaskItem) -> tuple[torch.Tensor, list[int]]:
    """Return log probabilities after an item's prompt, alone and unpadded, and the answers' tokens."""
    ids = [model.tokenizer(text)["input_ids"][0] for text in item.choices]
    return model.logits(item.prompt)[0, -1].double().log_softmax(-1), ids


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.mlp.out"])
def test_a_curve_equals_installed_edits(family: str, site: str) -> None:
    model = tiny(family)
    edit = fit_direction(model, PAIRS, site).steer(1.0)
    curve = alpha_curve(model, edit, ITEMS, (-0.3, 0.0, 0.5), batch=3)
    assert list(curve.points) == [-0.3, 0.5]
    for alpha, point in [(0.0, curve.base), *curve.points.items()]:
        for i, item in enumerate(ITEMS):
            plain, ids = brute(model, item)
            with model.edit(edit * alpha):
                logp, _ = brute(model, item)
            chance = logp.exp()
            assert point.kl[i] == pytest.approx(float((plain.exp() * (plain - logp)).sum()), abs=2e-5)
            assert point.entropy[i] == pytest.approx(float(-(chance * logp).sum()), abs=1e-4)
            assert point.mass[i] == pytest.approx(float(chance[ids].sum()), abs=1e-5)
            assert point.probability[i] == pytest.approx(float(chance[ids[0]] / chance[ids].sum()), abs=1e-5)
            assert point.correct[i] == float(chance[ids[0]] > chance[ids[1:]].max())
    assert not curve.base.kl.any()  # strength 0 costs exactly nothing


def test_edits_at_the_last_token_under_padding() -> None:
    model = tiny()
    edit = fit_direction(model, PAIRS, "blocks.1.resid_post").steer(0.7).at(positions="last")
    together = AnswerRuns(model, edit, ITEMS).under(edit)
    for i, item in enumerate(ITEMS):
        alone = AnswerRuns(model, edit, [item]).under(edit)
        assert alone.probability[0] == pytest.approx(together.probability[i], abs=1e-5)
        assert alone.kl[0] == pytest.approx(together.kl[i], abs=1e-5)


def test_measurements_and_rows_of_a_curve() -> None:
    model = tiny()
    edit = fit_direction(model, PAIRS, "blocks.1.resid_post").steer(1.0)
    curve = alpha_curve(model, edit, ITEMS, (0.4, -0.2))
    found = curve.measurements(vector="v")
    by = {(m.name, m.group["alpha"]): m for m in found}
    assert {m.group["vector"] for m in found} == {"v"}
    gain = by["answer probability gain", "0.4"]
    assert gain.value == pytest.approx(np.mean(curve.points[0.4].probability - curve.base.probability))
    assert gain.low <= gain.value <= gain.high
    assert by["accuracy", "0"].n == 4 and by["KL to the plain model", "0"].value == 0
    assert [row["alpha"] for row in curve.rows("x")] == [-0.2, 0.0, 0.4]


def test_kl_grows_like_the_square_of_a_small_strength() -> None:
    model = tiny()
    edit = fit_direction(model, PAIRS, "blocks.1.resid_post").steer(1.0)
    curve = alpha_curve(model, edit, ITEMS, (0.02, 0.04))
    ratio = curve.points[0.04].kl.sum() / curve.points[0.02].kl.sum()
    assert ratio == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize(
    ("items", "alphas", "message"),
    [
        (ITEMS, (), "at least one finite number other than 0"),
        (ITEMS, (0.0,), "at least one finite number other than 0"),
        (ITEMS, (math.nan,), "at least one finite number"),
        ([], (0.1,), "no items"),
        ([TaskItem("a", "Why", "xy", ("z",))], (0.1,), "must be one token"),
        ([TaskItem("a", "Why", "x", ("x",))], (0.1,), "same token"),
    ],
)
def test_unfit_curves_give_one_line(items: list, alphas: tuple, message: str) -> None:
    model = tiny()
    edit = fit_direction(model, PAIRS, "blocks.1.resid_post").steer(1.0)
    with pytest.raises(InputError, match=message) as error:
        alpha_curve(model, edit, items, alphas)
    assert "\n" not in str(error.value)


def test_unfit_models_and_edits() -> None:
    model = tiny()
    late = fit_direction(model, PAIRS, "blocks.2.resid_post").steer(1.0)
    early = fit_direction(model, PAIRS, "blocks.0.resid_post").steer(1.0)
    with pytest.raises(InputError, match="reaches before block 2"):
        AnswerRuns(model, late, ITEMS).under(early)
    with pytest.raises(NonFiniteError, match="NaN or infinite; use a smaller strength"):
        AnswerRuns(model, late, ITEMS).under(late * 1e39)
    with pytest.raises(ModelError, match="causal-lm with a tokenizer"):
        AnswerRuns(BY_NAME["bert"].model(), late, ITEMS)


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6))
def test_entropy_lies_between_0_and_log_n(weights: list[float]) -> None:
    p = np.array(weights) / sum(weights)
    found = float(entropy(p))
    assert -1e-12 <= found <= math.log(len(p)) + 1e-12
    assert found == pytest.approx(-sum(x * math.log(x) for x in p))
    assert float(entropy(np.append(p, 0.0))) == pytest.approx(found)


def test_action_entropy_of_logits() -> None:
    model = tiny()
    prompts, actions = ["I press ", "Why not go to "], ["A", "B", "C"]
    found = action_chances(model, prompts, actions)
    ids = [model.tokenizer(a)["input_ids"][0] for a in actions]
    for i, prompt in enumerate(prompts):
        p = model.logits(prompt)[0, -1].double().softmax(-1)[ids].numpy()
        np.testing.assert_allclose(found.chance[i], p / p.sum(), rtol=1e-4)
        assert found.valid[i] == pytest.approx(p.sum(), rel=1e-4)
    h, valid = action_entropy(model, prompts, actions)
    assert (h.name, valid.name, h.unit, h.n) == ("action-entropy", "action-valid-mass", "nats", 2)
    assert h.value == pytest.approx(np.mean([-(p * np.log(p)).sum() for p in found.chance]))
    edit = fit_direction(model, PAIRS, "blocks.1.resid_post").steer(2.0)
    with model.edit(edit):
        under, _ = action_entropy(model, prompts, actions)
    assert under.value != h.value and under.under == (edit.describe(),)


def test_action_entropy_of_samples_agrees_with_logits_and_drops_what_names_no_action() -> None:
    model = tiny()
    actions = ["A", "B", "k", "e", "t"]
    exact = action_chances(model, ["I press "], actions)
    sampled = action_chances(model, ["I press "], actions, mode="sample", samples=600, max_new_tokens=1)
    assert sampled.valid[0] == pytest.approx(exact.valid[0], abs=0.06)
    assert int(sampled.samples[0]) == round(600 * sampled.valid[0])
    assert sampled.entropy()[0] == pytest.approx(exact.entropy()[0], abs=0.25)
    seen = int((sampled.chance[0] > 0).sum())
    added = sampled.entropy(correct=True) - sampled.entropy()
    assert added[0] == pytest.approx((seen - 1) / (2 * sampled.samples[0]))
    again = action_chances(model, ["I press "], actions, mode="sample", samples=600, max_new_tokens=1)
    np.testing.assert_array_equal(again.chance, sampled.chance)


def test_the_first_action_that_a_text_names_counts() -> None:
    from actlas.measure.action_entropy import _first_named

    read = _first_named([" A", " B", " BA"])
    assert [read(t) for t in ("I take B, not A", "take BA", "nothing", "A or B")] == [1, 2, None, 0]


@pytest.mark.parametrize(
    ("actions", "options", "message"),
    [
        (["A"], {}, "at least two different actions"),
        (["A", "A"], {}, "at least two different actions"),
        (["A", "xyz"], {}, "'xyz' is not one token"),
        (["A", "B"], {"mode": "guess"}, "must be 'logits' or 'sample'"),
        (["A", "B"], {"mode": "sample", "samples": 1}, "at least 2 samples"),
        (["A ", "A"], {"mode": "sample"}, "differ in more than spaces"),
        (["never said at all", "nor this"], {"mode": "sample", "samples": 2, "max_new_tokens": 2}, "none of 2 samples"),
    ],
)  # fmt: skip
def test_unfit_actions_give_one_line(actions: list[str], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        action_chances(tiny(), ["I press "], actions, **options)


def test_the_registered_measures_run_on_a_task() -> None:
    from actlas.data.task_items import Task, TaskInfo

    info = TaskInfo("letters", "completion", "", (), "", lambda b: iter(()))
    task = Task(tuple(ITEMS), 0, info)
    found = measure(tiny(), ["action-entropy", "action-valid-mass"], task)
    assert [(m.name, m.n) for m in found] == [("action-entropy", 4), ("action-valid-mass", 4)]
    runs = AnswerRuns(tiny(), (), ITEMS)
    assert found[1].value == pytest.approx(runs.base.mass.mean(), rel=1e-4)
