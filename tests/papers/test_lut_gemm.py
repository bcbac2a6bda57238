"""The judge of lut-gemm on invented numbers, and its parts on small ones."""

from __future__ import annotations

import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import lut_gemm


def number(name: str, value: float, half: float = 0.01, **group: str) -> Measurement:
    return Measurement(name, value, "", 10, value - half, value + half, group=group)


def numbers(
    error: float = 1e-8, growth: float = 2.0, over: float = 0.8, packed: float = 1.0
) -> list[Measurement]:
    return [
        number("error of signs for integers", error),
        number("error of the product by tables", error),
        number("operations that differ from the formula", 0.0),
        number(lut_gemm.GROWTH, growth, kernel="look-up"),
        number(lut_gemm.HALF, 1.5, kernel="look-up"),
        number(lut_gemm.HALF, packed, kernel="packed"),
        number(lut_gemm.OVER, over),
        number(lut_gemm.MORE, 0.87, fit="refined"),
        number(lut_gemm.MORE, 1.45, fit="greedy"),
    ]


def of(**changed: float) -> Measured:
    return Measured(numbers(**changed))


def test_the_judge() -> None:
    assert verdict_of(lut_gemm.judge(of())) == "holds"
    assert verdict_of(lut_gemm.judge(of(over=1.4))) == "partly"
    assert verdict_of(lut_gemm.judge(of(packed=1.8))) == "partly"
    assert verdict_of(lut_gemm.judge(of(error=1.0, growth=1.0))) == "does not hold here"
    timeless = Measured(
        [x for x in numbers() if x.name not in (lut_gemm.GROWTH, lut_gemm.HALF, lut_gemm.OVER)]
    )
    decided = [c for c in lut_gemm.judge(timeless) if c.passed is None]
    assert len(decided) == 3


def test_the_identities_and_operations() -> None:
    generator = torch.Generator().manual_seed(3)
    assert all(x.value < 1e-6 for x in lut_gemm._identities(generator))
    assert lut_gemm._operations(generator).value == 0
    ratios = {x.group["fit"]: x.value for x in lut_gemm._fits(32, generator, 0) if x.name == lut_gemm.MORE}
    assert ratios["refined"] < 1 < ratios["greedy"]
