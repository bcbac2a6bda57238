"""Task measures against one prompt at a time with all logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actlas.core.edits import Scale
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.model import Model
from actlas.data import Task, task
from actlas.measure import tasks as room
from actlas.measure.statistics import wilson
from actlas.measure.tasks import (
    answer,
    last_logits,
    task_accuracy,
    task_logit_difference,
    task_measures,
    task_probability,
    task_top1,
)

from .small_models import bert, gpt2, llama, tokenizer


def ioi(n: int = 12) -> Task:
    return task("ioi", tokenizer(), n=n)


def brute(model: Model, items: Task) -> dict[str, np.ndarray]:
    rows: dict[str, list[float]] = {"correct": [], "top1": [], "difference": [], "probability": []}
    for item in items:
        with torch.no_grad():
            z = (
                model.module(model.tokenizer(item.prompt, return_tensors="pt")["input_ids"])
                .logits[0, -1]
                .double()
            )
        wrong = z[list(item.wrong_ids)]
        rows["correct"].append(float(z[item.answer_id] > wrong.max()))
        rows["top1"].append(float(z.argmax() == item.answer_id))
        rows["difference"].append(float(z[item.answer_id] - wrong.mean()))
        rows["probability"].append(float(z.softmax(-1)[item.answer_id]))
    return {k: np.array(v) for k, v in rows.items()}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", ["ioi", "capitals", "agreement"])
@pytest.mark.parametrize("keep", [True, False])
def test_answers_equal_one_prompt_at_a_time(
    make: Any, name: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    items = task(name, tokenizer(), n=10)
    monkeypatch.setattr(room, "takes_option", lambda model, option: keep)
    found, expected = answer(model, items, batch=4), brute(model, items)
    assert (found.correct == expected["correct"]).all() and (found.top1 == expected["top1"]).all()
    assert found.difference == pytest.approx(expected["difference"], abs=1e-4)
    assert found.probability == pytest.approx(expected["probability"], rel=1e-4)


def test_only_last_positions_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    shapes = []
    run = room.output_logits

    def watched(*args: Any, **options: Any) -> Any:
        logits = run(*args, **options)
        shapes.append((logits.shape[1], args[1]["input_ids"].shape[1]))
        return logits

    monkeypatch.setattr(room, "output_logits", watched)
    list(last_logits(model, ["the cat", "a", "the cat sat on a mat"]))
    assert shapes and all(kept <= 3 and kept < width for kept, width in shapes)


def test_batches_stay_under_the_logit_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(room, "LOGIT_BYTES", 8 * model.vocab_size)
    expected = answer(model, ioi())
    monkeypatch.setattr(room, "LOGIT_BYTES", 2**30)
    assert answer(model, ioi()).difference == pytest.approx(expected.difference, abs=1e-4)


def test_measures_are_means_over_items_with_intervals() -> None:
    model, items = llama(), ioi(20)
    expected = brute(model, items)
    accuracy, top1, difference, probability = task_measures(model, items, groups=False)
    assert (accuracy.name, accuracy.value, accuracy.n) == ("task-accuracy", expected["correct"].mean(), 20)
    assert (accuracy.low, accuracy.high) == wilson(expected["correct"].sum(), 20)
    assert top1.value == expected["top1"].mean()
    assert difference.value == pytest.approx(expected["difference"].mean(), abs=1e-4)
    assert probability.value == pytest.approx(expected["probability"].mean(), rel=1e-4)
    assert accuracy.group == {"task": "ioi"} and accuracy.details["chance"] == pytest.approx(items.chance)
    assert [task_accuracy(model, items), task_top1(model, items)] == [accuracy, top1]
    assert [task_logit_difference(model, items), task_probability(model, items)] == [difference, probability]


def test_groups_partition_the_items() -> None:
    found = task_measures(llama(), ioi(20))
    whole = found[0]
    labels = {key for m in found for key in m.group if key != "task"}
    assert labels
    for key in labels:
        parts = [m for m in found if m.name == "task-accuracy" and key in m.group]
        assert len(parts) > 1 and sum(p.n for p in parts) == whole.n
        assert sum(p.value * p.n for p in parts) / whole.n == pytest.approx(whole.value)
        assert all(p.group["task"] == "ioi" for p in parts)


def test_several_tasks_at_once() -> None:
    items = [task(name, tokenizer(), n=8) for name in ("ioi", "capitals")]
    found = task_measures(llama(), items, groups=False)
    assert [m.group["task"] for m in found] == ["ioi"] * 4 + ["capitals"] * 4


def test_edits_apply_and_are_named() -> None:
    model, edit = llama(), Scale("blocks.1.mlp.out", -2.0)
    before = task_logit_difference(model, ioi())
    with model.edit(edit):
        after = task_logit_difference(model, ioi())
    assert after.under == (edit.describe(),) and after.value != before.value
    assert task_logit_difference(model, ioi()) == before


def test_a_tie_is_not_right() -> None:
    model = llama()
    torch.nn.init.zeros_(model.module.lm_head.weight)
    assert task_accuracy(model, ioi()).value == 0


def test_a_task_made_without_a_tokenizer_is_checked_here() -> None:
    bare, model = task("ioi", n=200), llama()
    items = ioi(200)
    known = {item.prompt: item for item in items}
    shared = [i for i in bare if i.prompt in known]
    assert shared
    loose = Task(tuple(shared), 0, bare.info)
    tight = Task(tuple(known[i.prompt] for i in shared), 0, bare.info)
    assert answer(model, loose).difference == pytest.approx(answer(model, tight).difference, abs=1e-4)


def test_bad_items_are_said() -> None:
    model, items = llama(), ioi(8)
    one = items[0]

    def with_item(**changes: Any) -> Task:
        blank = replace(one, answer_id=None, wrong_ids=())
        return Task((replace(blank, **changes),), 0, items.info)

    with pytest.raises(InputError, match=r"' xylophone quartz' of item .* must be one token .*\['Ġ"):
        answer(model, with_item(answer=" xylophone quartz"))
    with pytest.raises(InputError, match="is the same token as the answer"):
        answer(model, with_item(wrong=(one.answer,)))
    with pytest.raises(InputError, match="no wrong answer"):
        answer(model, with_item(wrong=()))
    with pytest.raises(InputError, match="prompt 0 of task ioi is empty"):
        answer(model, Task((replace(one, prompt=""),), 0, items.info))
    with pytest.raises(InputError, match="has no items"):
        answer(model, Task((), 0, items.info))
    with pytest.raises(InputError, match="no task was given"):
        task_measures(model, [])
    with pytest.raises(InputError, match="context of 128"):
        answer(model, Task((replace(one, prompt=one.prompt * 20),), 0, items.info))


def test_bad_models_are_said() -> None:
    with pytest.raises(ModelError, match="kind encoder"):
        answer(bert(), ioi())
    model = llama()
    with torch.no_grad():
        model.module.lm_head.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity after prompt"):
        answer(model, ioi())
