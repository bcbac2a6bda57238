"""Prompts with examples of another task: their text, the choice of examples and sources, and votes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actlas.core.errors import InputError, ModelError
from actlas.select.cross_task import (
    Instructed,
    answer_prompts,
    best_source,
    cross_task_demos,
    cross_task_prompt,
    vote,
)
from tests.core.tiny import tiny

MOOD = Instructed("mood", "Is it good?", (("fine day", "yes"), ("bad day", "no")), ("yes", "no"))
COLOR = Instructed("color", "Name the color.", (("sky", "blue"), ("grass", "green"), ("blood", "red")))


def test_the_target_part_is_the_same_with_and_without_examples() -> None:
    bare = cross_task_prompt(MOOD, "a day")
    shown = cross_task_prompt(MOOD, "a day", [(COLOR, COLOR.examples[:2])])
    assert bare == "Definition: Is it good?\nInput: a day\nOutput:"
    assert shown == (
        "Definition: Name the color.\nInput: sky\nOutput: blue\nInput: grass\nOutput: green\n\n" + bare
    )


def test_the_nearest_examples_are_chosen_nearest_last_and_never_the_query_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = {"sky": (1.0, 0.0), "grass": (0.6, 0.8), "blood": (0.0, 1.0), "query": (0.9, 0.4358899)}

    def embed(model: Any, texts: list[str]) -> Any:
        return np.array([vectors[t] for t in texts])

    monkeypatch.setattr("actlas.measure.encoder.embed", embed)
    encoder: Any = None
    assert cross_task_demos(encoder, COLOR, ["query"], 2) == [[("grass", "green"), ("sky", "blue")]]
    assert cross_task_demos(encoder, COLOR, ["sky"], 1, same=True) == [[("grass", "green")]]
    assert cross_task_demos(encoder, COLOR, ["sky"], 1) == [[("sky", "blue")]]
    for k in (0, 4):
        with pytest.raises(InputError, match="1 to 3"):
            cross_task_demos(encoder, COLOR, ["query"], k)
    with pytest.raises(InputError, match="1 to 2"):
        cross_task_demos(encoder, COLOR, ["sky"], 3, same=True)


def test_answers_are_judged_by_the_greatest_logit_of_all_tokens_and_of_the_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny()
    labels = ("a", "b", "c")
    target = Instructed("t", "say", tuple((w, w) for w in labels), labels)
    prompts = [f"{a} {b}" for a in labels for b in labels]
    with pytest.raises(InputError, match="same token"):  # every character is a token here: all begin with " "
        answer_prompts(model, target, prompts, ["a"] * 9)

    ids = [model.tokenizer.get_vocab()[w] for w in labels]
    monkeypatch.setattr("actlas.select.cross_task._first", lambda m, w: ids[labels.index(w)])
    logits = [model.logits(p)[0, -1] for p in prompts]
    said = [labels[int(z[ids].argmax())] for z in logits]
    right = [said[0], *(labels[(labels.index(s) + 1) % 3] for s in said[1:])]
    found = answer_prompts(model, target, prompts, right)
    assert list(found.chosen) == said
    assert found.forced.tolist() == [True] + [False] * (len(prompts) - 1)
    exact = [int(z.argmax()) == ids[labels.index(r)] for z, r in zip(logits, right, strict=True)]
    assert found.exact.tolist() == exact
    assert [str(model.tokenizer.decode([int(z.argmax())])).strip() for z in logits] == list(found.said)


def test_votes_count_sources_and_ties_go_to_the_first() -> None:
    assert vote([["a", "b"], ["b", "b"], ["a", "c"]]) == ["a", "b"]
    assert vote([["a"], ["b"]]) == ["a"]
    for bad in ([], [[]], [["a"], ["a", "b"]]):
        with pytest.raises(InputError, match="vote"):
            vote(bad)


def test_sources_are_ranked_by_activations_and_the_own_examples_come_first() -> None:
    model = tiny()
    twin = Instructed("twin", MOOD.instruction, MOOD.examples, MOOD.labels)
    far = Instructed("far", "Count to ten now please", (("one", "two"), ("five", "six")))
    ranked = best_source(model, MOOD, [far, COLOR, twin])
    assert ranked[0][0] == "twin" and ranked[0][1] == pytest.approx(1.0, abs=1e-5)
    assert [s for _, s in ranked] == sorted((s for _, s in ranked), reverse=True)


def test_bad_tasks_are_refused() -> None:
    with pytest.raises(InputError, match="none of yes, no"):
        Instructed("x", "say", (("a", "maybe"),), ("yes", "no"))
    with pytest.raises(InputError, match="at least one example"):
        Instructed("x", "say", ())
    with pytest.raises(InputError, match="at least 2"):
        best_source(tiny(), MOOD, [COLOR])
    with pytest.raises(InputError, match="other names"):
        best_source(tiny(), MOOD, [COLOR, MOOD])
    with pytest.raises(InputError, match="as many"):
        answer_prompts(tiny(), COLOR, ["a"], [])
    no_tokenizer = tiny()
    no_tokenizer.tokenizer = None
    with pytest.raises(ModelError, match="tokenizer"):
        answer_prompts(no_tokenizer, COLOR, ["a"], ["red"])
