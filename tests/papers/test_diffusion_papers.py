"""Judges of q-diffusion, quest-diffusion, binarydm and quartdepth on invented measurements; rendered scenes."""

from __future__ import annotations

import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import binarydm, q_diffusion, quartdepth, quest_diffusion
from actlas.papers.reproductions.rendered_scenes import depth_errors, scenes


def gap(name: str, value: float) -> Measurement:
    return Measurement(name, value, "squared", 9, value - 0.01, value + 0.01)


def one(name: str, value: float, **group: str) -> Measurement:
    return Measurement(name, value, "ratio", 9, group=group)


def _q(cut: float, plain: float, wide: float, frechet: float = 0.5) -> list[Measurement]:
    return [
        gap("AdaRound minus 0.6 times nearest", cut),
        gap("all minus the worse timestep", -0.1),
        gap("split minus unsplit", -0.1),
        one("gain of splitting", plain, layer="a", widened="no"),
        one("gain of splitting", wide, layer="a", widened="yes"),
        one("frechet-distance", 0.4, arm="float"),
        one("frechet-distance", 0.9, arm="W4A8 nearest"),
        one("frechet-distance", frechet, arm="W4A8 AdaRound"),
    ]


def test_q_diffusion_verdicts() -> None:
    judge = q_diffusion.judge
    assert verdict_of(judge(Measured(_q(-0.1, 1.1, 9.0)))) == "holds"
    assert verdict_of(judge(Measured(_q(-0.1, 1.1, 9.0, frechet=2.0)))) == "partly"
    assert verdict_of(judge(Measured(_q(-0.1, 0.9, 9.0)))) == "partly"
    assert verdict_of(judge(Measured(_q(0.1, 0.9, 0.8)))) == "does not hold here"


def _quest(times: float, stages: float, chosen: float) -> list[Measurement]:
    return [
        gap("ranges by timestep minus Q-Diffusion", times),
        gap("stage 2 minus ranges by timestep", stages),
        gap("stage 2 minus random layers", chosen),
        gap("stage 1 minus ranges by timestep", -0.1),
        gap("stage 2 minus stage 1", -0.1),
        one("frechet-distance", 1.0, arm="Q-Diffusion"),
        one("frechet-distance", 0.5, arm="stage 2"),
    ]


def test_quest_verdicts() -> None:
    judge = quest_diffusion.judge
    assert verdict_of(judge(Measured(_quest(-0.1, -0.1, -0.1)))) == "holds"
    assert verdict_of(judge(Measured(_quest(-0.1, -0.1, 0.005)))) == "partly"
    assert verdict_of(judge(Measured(_quest(0.1, 0.1, 0.1)))) == "does not hold here"


def _binary(bases: float, mimic: float, start: float = 0.1, greedy: float = 0.0) -> list[Measurement]:
    return [
        gap("noise error of two bases minus one", bases),
        gap("noise error of low-rank minus none", mimic),
        gap("noise error of random minus progressive start", start),
        gap("training loss of low-rank minus full", 0.0),
        one("largest difference from greedy coding", greedy),
        one("frechet-distance", 1.0, arm="one basis"),
        one("frechet-distance", 0.5, arm="two bases"),
    ]


def test_binary_verdicts() -> None:
    assert verdict_of(binarydm.judge(Measured(_binary(-0.1, -0.1)))) == "holds"
    assert verdict_of(binarydm.judge(Measured(_binary(-0.1, -0.1, greedy=0.1)))) == "partly"
    assert verdict_of(binarydm.judge(Measured(_binary(-0.1, 0.1)))) == "partly"
    assert verdict_of(binarydm.judge(Measured(_binary(0.1, 0.1)))) == "does not hold here"


def _depth(polish: float, repair: float, rounded: float, sign: float = 2.0) -> list[Measurement]:
    return [
        gap("AbsRel of polished minus direct", polish),
        gap("difference of compensated minus polished", repair),
        gap("difference of AdaRound minus compensated", rounded),
        gap("AbsRel of all steps minus direct", -0.1),
        gap("agreement of compensated minus direct", 0.1),
        one("largest relative error of the inverse map", 1e-9),
        one("bulk error polished over even", 0.3),
        one("residual along the inputs", 1e-9),
        one("error with a minus sign over none", sign),
    ]


def test_quartdepth_verdicts() -> None:
    judge = quartdepth.judge
    assert verdict_of(judge(Measured(_depth(0.005, -0.1, -0.1)))) == "holds"
    assert verdict_of(judge(Measured(_depth(-0.1, -0.1, -0.1, sign=0.5)))) == "partly"
    assert verdict_of(judge(Measured(_depth(0.1, -0.1, 0.005)))) == "partly"
    assert verdict_of(judge(Measured(_depth(0.1, 0.1, 0.1)))) == "does not hold here"


def test_the_exact_properties_hold() -> None:
    found = {m.name: m.value for m in quartdepth.exact_properties(0)}
    assert found["largest relative error of the inverse map"] < 1e-5
    assert found["residual along the inputs"] < 1e-6
    assert found["error compensated over none"] < 1 < found["error with a minus sign over none"]
    assert found["bulk error polished over even"] < 0.5


def test_scenes_have_exact_depth() -> None:
    pixels, depth = scenes(4, 0)
    assert pixels.shape == (4, 3, 32, 32) and depth.shape == (4, 1, 32, 32)
    assert torch.equal(pixels, scenes(4, 0)[0]) and not torch.equal(pixels, scenes(4, 1)[0])
    assert float(pixels.abs().max()) <= 1 and float(depth.min()) > 0.3 and float(depth.max()) <= 12.0
    assert float(depth[:, :, 0].max()) > 5  # the wall above the horizon
    found = depth_errors((1.2 * depth).log(), depth)
    assert torch.allclose(found[0], torch.full((4,), 0.2, dtype=torch.float64), atol=1e-5)
    assert found[1].tolist() == [1, 1, 1, 1]
    assert depth_errors((1.3 * depth).log(), depth)[1].tolist() == [0, 0, 0, 0]
