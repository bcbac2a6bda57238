"""The judges of observable-propagation, chinchilla-mcq-circuits and cross-task-icl, and their data."""

from __future__ import annotations

import pytest

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import chinchilla_mcq_circuits, cross_task_icl, observable_propagation
from actlas.papers.reproductions.cross_task_sets import task_sets
from actlas.papers.reproductions.gendered_words import MEN, WOMEN, labelled
from actlas.papers.reproductions.lettered_items import LABELS, lettered_items


class _OneToken:
    """A tokenizer to which every word is one token."""

    def one(self, prompt: str, answer: str) -> int:
        return 1


def _m(name: str, value: float, width: float = 0.01, **group: str) -> Measurement:
    return Measurement(name, value, "", 40, value - width, value + width, group=group)


def _observable(r2: float = 0.9, gain: float = 0.1, moved: float = 0.97) -> list[Measurement]:
    return [
        _m("error against autograd", 1e-7, 0),
        _m("cosine with the norm's projection", 0.999, 0.0001),
        _m("coupling r2", r2),
        *(_m("AUC above the better probe", gain, names=n) for n in ("2", "4", "8")),
        _m("moved as foretold", moved, direction="observable"),
        _m("moved as foretold, above random directions", 0.4),
    ]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"r2": 0.1}, "partly"),
        ({"gain": 0.0}, "partly"),
        ({"r2": 0.1, "gain": -0.1, "moved": 0.5}, "does not hold here"),
    ],
)
def test_observable_propagation(changed: dict[str, float], verdict: str) -> None:
    assert verdict_of(observable_propagation.judge(Measured(_observable(**changed)))) == verdict


def _lettered(
    nodes: float = 0.02, kept: float = 0.95, lost: float = 0.0, gap: float = -0.5
) -> list[Measurement]:
    rank = {"rank": "3", "parts": "qkv"}
    return [
        _m("accuracy", 0.95, labels="A B C D"),
        _m("nodes that carry the effect", nodes),
        _m("effect kept", kept, subspace="fitted", labels="A B C D", **rank),
        _m("effect kept", 0.02, subspace="random", labels="A B C D", **rank),
        _m("accuracy of the head alone, lost", lost, rank="3"),
        _m("effect kept at rank 1 minus rank 3", -0.5),
        _m("effect kept on X K Q T minus A B C D", gap, **rank),
    ]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"kept": 0.8}, "partly"),
        ({"gap": 0.0}, "partly"),
        ({"nodes": 0.5, "kept": 0.2, "lost": 0.5, "gap": 0.0}, "does not hold here"),
    ],
)
def test_chinchilla(changed: dict[str, float], verdict: str) -> None:
    assert verdict_of(chinchilla_mcq_circuits.judge(Measured(_lettered(**changed)))) == verdict


@pytest.mark.parametrize(
    ("gain", "rank", "verdict"),
    [(0.3, 0.4, "holds"), (0.3, -0.4, "partly"), (-0.1, -0.4, "does not hold here")],
)
def test_cross_task(gain: float, rank: float, verdict: str) -> None:
    name = "gain over zero-shot, two-label targets"
    found = [
        _m(name, gain, by=by, judged=judged)
        for by in ("cross-task", "pseudo-labels")
        for judged in ("exact", "forced choice")
    ]
    found.append(_m("similarity against gain", rank, site=cross_task_icl.SITE))
    assert verdict_of(cross_task_icl.judge(Measured(found))) == verdict


def test_lettered_prompts_differ_from_their_counterfactual_in_the_asked_word_alone() -> None:
    words = ["river", "lamp", "bank", "oil", "tree", "door"]
    for labels in LABELS.values():
        items = lettered_items(words, 8, labels=labels, seed=1)
        assert [i.group["place"] for i in items] == ["0", "1", "2", "3"] * 2
        for item in items:
            lines = item.prompt.splitlines()
            asked = lines[0].removeprefix("Which option says ").removesuffix("?")
            assert f"{item.answer.strip()}. {asked}" in lines[1:5]
            other = item.counterfactual
            assert other is not None and other.prompt.splitlines()[1:] == lines[1:]
            assert other.answer != item.answer and item.wrong[0] == other.answer
            assert sorted([item.answer, *item.wrong]) == sorted(f" {x}" for x in labels)


def test_task_sets_are_balanced_and_their_outputs_allowed() -> None:
    sets = task_sets(_OneToken(), n=12, seed=0)  # type: ignore[arg-type]
    assert len(sets) == 7
    for task in sets:
        assert len({i for i, _ in task.examples}) == len(task.examples)
        if task.labels:
            counts = [sum(o == label for _, o in task.examples) for label in task.labels]
            assert counts[0] == counts[1] > 0


def test_gendered_names_are_in_no_two_lists_and_alternate() -> None:
    assert not set(WOMEN) & set(MEN)
    assert [y for _, y in labelled(_OneToken(), WOMEN, MEN)][:4] == [1, 0, 1, 0]  # type: ignore[arg-type]
