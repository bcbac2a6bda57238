"""Similarity of tasks by their activations, against a brute-force reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actlas.core.errors import InputError
from actlas.measure.registry import find_measure
from actlas.measure.task_similarity import default_site, task_similarity
from tests.core.tiny import tiny

PROMPTS = {
    "one": ["the cat sat", "a dog ran on"],
    "two": ["one two three", "four five", "six"],
    "three": ["red green", "blue and white"],
}


def _last(text: str, site: str) -> np.ndarray:
    return tiny().trace(text, site)[site][0, -1].double().numpy()


@pytest.mark.parametrize("centre", [True, False])
def test_similarity_is_the_cosine_of_means_over_prompts(centre: bool) -> None:
    site = "blocks.1.resid_post"
    found = task_similarity(tiny(), PROMPTS, site, centre=centre)
    means = np.stack([np.mean([_last(t, site) for t in texts], 0) for texts in PROMPTS.values()])
    x = means - means.mean(0) if centre else means
    for i, a in enumerate(PROMPTS):
        for j, b in enumerate(PROMPTS):
            expected = x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
            assert found.between(a, b) == pytest.approx(expected, abs=1e-5)


def test_every_site_has_a_matrix_in_the_models_order() -> None:
    found = task_similarity(tiny(), PROMPTS, ["blocks.1.resid_post", "blocks.0.resid_post"])
    assert found.sites == ("blocks.0.resid_post", "blocks.1.resid_post")
    assert found.matrix["blocks.0.resid_post"].shape == (3, 3)
    last, mean = (task_similarity(tiny(), PROMPTS, tokens=t).between("one", "two") for t in ("last", "mean"))
    assert last != pytest.approx(mean, abs=1e-4)


def test_intervals_hold_the_value_and_are_seeded() -> None:
    found = task_similarity(tiny(), PROMPTS)
    first, again = found.measurements(seed=1), found.measurements(seed=1)
    assert len(first) == 3 and [m.low for m in first] == [m.low for m in again]
    for m in first:
        assert m.low is not None and m.high is not None
        assert m.low - 1e-9 <= m.high and -1 - 1e-9 <= m.value <= 1 + 1e-9


def test_the_measure_compares_every_two_tasks_and_says_when_there_is_one() -> None:
    from actlas.data.task_items import Task, TaskInfo, TaskItem

    def made(name: str) -> Task:
        info = TaskInfo(name, "completion", "", (), "", iter)  # type: ignore[arg-type]
        items = tuple(TaskItem(str(i), t, " a", (" b",)) for i, t in enumerate(PROMPTS[name]))
        return Task(items, 0, info)

    info = find_measure("task-similarity")
    assert info.together is not None
    many = info.together(tiny(), [made(n) for n in PROMPTS])
    assert {m.group["tasks"] for m in many} == {"one / two", "one / three", "two / three"}
    alone = info.together(tiny(), made("one"))
    assert len(alone) == 1 and np.isnan(alone[0].value) and "only one" in alone[0].note


def test_the_default_site_lies_at_two_thirds() -> None:
    model = tiny()
    block = int(default_site(model).split(".")[1])
    assert block == round((model.n_blocks or 0) * 2 / 3) - 1


def test_bad_tasks_are_refused() -> None:
    for tasks, said in (({"one": ["a"]}, "at least 2"), ({"one": ["a"], "two": []}, "no prompts")):
        with pytest.raises(InputError, match=said):
            task_similarity(tiny(), tasks)
    two = {k: PROMPTS[k] for k in ("one", "two")}
    with pytest.raises(InputError, match="give 3"):
        task_similarity(tiny(), two, centre=True)
    found = task_similarity(tiny(), two)
    assert not found.centred and torch.isfinite(torch.tensor(found.matrix[found.sites[0]])).all()
    with pytest.raises(InputError, match="not compared"):
        found.between("one", "nine")
