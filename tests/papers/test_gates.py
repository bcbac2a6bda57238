"""The judges of was-controller, g-act and skill-unlearning on invented numbers, and their prompts."""

from __future__ import annotations

import pytest
import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import g_act, skill_unlearning, was_controller
from actlas.papers.reproductions.gate_prompts import CODE_TASKS, SKILLS, skill, sums


def m(name: str, value: float, half: float = 0.01, **group: str) -> Measurement:
    return Measurement(name, value, "", 50, value - half, value + half, group=group)


def was(rise: float = 0.1, over: float = 0.1, selective: float = 0.1, area: float = 0.99) -> Measured:
    return Measured(
        [
            m(was_controller.RISE, rise, of="controller", on="sums"),
            m(was_controller.OVER_RANDOM, over),
            m(was_controller.SELECTIVE, selective),
            m("gate AUC", area, gate="controller"),
            m("gate AUC", 0.5, gate="trained on shuffled labels"),
            Measurement("largest difference between edit and pushes by hand", 1e-6, "", 4),
            m("target refusal: outcome minus labels", 0.05),
        ]
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"area": 0.9}, "partly"),
        ({"selective": 0.005}, "partly"),
        ({"rise": -0.1, "over": -0.1, "selective": -0.1}, "does not hold here"),
        ({"rise": 0.005, "over": 0.005, "selective": 0.005}, "not testable here"),
    ],
)
def test_the_controller_must_be_selective(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(was_controller.judge(was(**given))) == verdict


def clusters(over_random: float = 0.5, better: float = 0.1, learned: float = 0.1) -> Measured:
    at = {"alpha": g_act.ALPHA}
    return Measured(
        [
            m(g_act.OVER_RANDOM, over_random, **at),
            m(g_act.OVER_RANDOM, -1.0, alpha="0.1"),
            m(g_act.BETTER, better, **at),
            m(g_act.LEARNED, learned),
            m("mean direction minus random", 0.5, **at),
            m(g_act.GAIN, -0.02, of="flipped", **at),
            m("clusters minus random choice", 0.1, **at),
        ]
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"better": -0.1}, "partly"),
        ({"learned": 0.0}, "partly"),
        ({"over_random": -0.5, "better": -0.1, "learned": -0.1}, "does not hold here"),
    ],
)
def test_clusters_must_beat_one_direction(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(g_act.judge(clusters(**given))) == verdict


def unlearning(best: float = 0.9, gap: float = 0.5, chosen: float = 0.9, alarms: float = 0.02) -> Measured:
    everywhere = {"gate": "box, all skills"}
    return Measured(
        [
            m(skill_unlearning.BEST, best),
            m("detection", 0.0, skill="coding"),
            m("detection", chosen, **everywhere),
            m("false alarms", alarms, **everywhere),
            m("box detection minus random box", 0.2, on=skill_unlearning.NEW),
            m(skill_unlearning.GAP, gap, of="adjust"),
            m(skill_unlearning.GAP, 0.3, of="adjust minus prune"),
            m(skill_unlearning.GAP, 0.3, of="adjust minus random"),
            m("answers as the gate says", 1.0, 0.2),
        ]
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"chosen": 0.5}, "partly"),
        ({"alarms": 0.3}, "partly"),
        ({"best": 0.5}, "partly"),
        ({"best": 0.5, "gap": -0.5}, "does not hold here"),
    ],
)
def test_unlearning_must_reach_new_templates_and_spare_the_rest(
    given: dict[str, float], verdict: str
) -> None:
    assert verdict_of(skill_unlearning.judge(unlearning(**given))) == verdict


def test_c_and_python_are_told_apart() -> None:
    assert g_act._like_c("cpp\n#include <vector>\nint main() {")
    assert g_act._like_c("c\nvoid f(int a)")
    assert not g_act._like_c("python\ndef f(a):\n    return a")
    assert not g_act._like_c("python\nimport os;\n")


@pytest.mark.parametrize("name", [*SKILLS, "small talk"])
def test_held_out_queries_share_no_text_and_no_template(name: str) -> None:
    known, new = skill(name, 50, 0), skill(name, 50, 0, held_out=True)
    assert len(set(known)) == len(set(new)) == 50 and not set(known) & set(new)
    assert known == skill(name, 50, 0) and known != skill(name, 50, 1)
    assert not {" ".join(t.split()[:3]) for t in known} & {" ".join(t.split()[:3]) for t in new}


def test_the_full_modes_find_prompts_enough() -> None:
    for name in SKILLS:
        assert len(skill(name, 60 + 30 + 60, 0)) == 150 and len(skill(name, 60, 0, held_out=True)) == 60
    for name in ("geography", "coding", "small talk"):
        assert len(skill(name, 67, 0)) == 67 and len(skill(name, 67, 2, held_out=True)) == 67
    assert len(skill("arithmetic", 200, 0)) == 200 and len(skill("arithmetic", 200, 0, held_out=True)) == 200
    assert len(set(CODE_TASKS)) == 64 and len(set(sums(60, 0))) == 60


def test_the_gap_is_a_difference_of_means() -> None:
    found = skill_unlearning._gap(torch.tensor([2.0, 4.0]).numpy(), torch.tensor([1.0] * 3).numpy(), "x", 0)
    assert found.value == 2.0 and found.low is not None and found.low <= 2.0 <= (found.high or 0)
