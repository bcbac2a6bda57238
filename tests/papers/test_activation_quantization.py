"""Judges of outliertune, llm-fp4 and agile-quant on invented measurements, and small parts of their runs."""

from __future__ import annotations

import pytest
import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, recipe, verdict_of
from actlas.papers.reproductions import agile_quant, llm_fp4, outliertune
from actlas.papers.reproductions.byte_gpt2 import byte_gpt2


def _one(name: str, value: float, width: float = 0.1, **group: str) -> Measurement:
    reach = width * abs(value)
    return Measurement(name, value, "nats", 9, value - reach, value + reach, group=group)


def _outliertune(
    whole: float, alone: float, mismatches: float = 0.0, fold: float = 1e-6
) -> list[Measurement]:
    pair = {"variant": outliertune.WHOLE, "over": outliertune.TOKEN}
    return [
        _one("extra-kl", whole, model="smollm2", **pair),
        _one("extra-kl", -0.1, model="byte GPT-2", **pair),
        _one("extra-kl", 1.0, model="smollm2", variant="A6 static tensor", over="A6 per token"),
        _one("kl channel minus 0.3 token", alone, model="smollm2"),
        _one("fold change", fold, model="smollm2"),
        _one("fold change", 1e-6, model="byte GPT-2"),
        _one("integer mismatches", mismatches),
        _one("log error, symmetrised over folded", -0.1),
    ]


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({"whole": -0.2, "alone": -0.1}, "holds"),
        ({"whole": 0.2, "alone": -0.1}, "partly"),
        ({"whole": 0.2, "alone": 0.1}, "does not hold here"),
        ({"whole": -0.2, "alone": -0.1, "mismatches": 1.0}, "partly"),
        ({"whole": -0.2, "alone": -0.1, "fold": 1e-3}, "partly"),
    ],
)
def test_outliertune(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(outliertune.judge(Measured(_outliertune(**given)))) == verdict


def _llm_fp4(alone: float, searched: float, off: float = 0.0, folded: float = 0.0) -> list[Measurement]:
    shifted = llm_fp4.W_SHIFTED
    return [
        _one("kl shifted minus 0.4 shared", alone),
        _one("extra-kl", searched, variant=shifted, over=llm_fp4.W_SHARED),
        _one("extra-kl", -0.1, variant=shifted, over=llm_fp4.W_RANGE),
        _one("extra-kl", 0.1, variant=llm_fp4.INTEGER, over=llm_fp4.SHARED),
        _one("codes off the table", off),
        _one("outputs that the fold changes", folded),
    ]


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({"alone": -1.0, "searched": -0.1}, "holds"),
        ({"alone": -1.0, "searched": 0.1}, "partly"),
        ({"alone": 1.0, "searched": 0.1}, "does not hold here"),
        ({"alone": -1.0, "searched": -0.1, "off": 2.0}, "partly"),
        ({"alone": -1.0, "searched": -0.1, "folded": 1.0}, "partly"),
    ],
)
def test_llm_fp4(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(llm_fp4.judge(Measured(_llm_fp4(**given)))) == verdict


def _agile(log2: float, column: float, first: float = -0.1, leaks: float = 0.0) -> list[Measurement]:
    name = "extra last-token kl"
    return [
        _one("kl log2 minus half of even", log2),
        _one(name, column, scores="column_mean", over="random", ratio="0.3"),
        _one(name, first, scores="first_token", over="random", ratio="0.3"),
        _one(name, -0.1, scores="first_token", over="reversed", ratio="0.3"),
        _one("log largest input", -0.1),
        _one("mask leaks", leaks),
    ]


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({"log2": -0.1, "column": -0.1}, "holds"),
        ({"log2": -0.1, "column": -0.1, "first": 0.1}, "partly"),
        ({"log2": -0.1, "column": 0.1}, "partly"),
        ({"log2": 0.1, "column": 0.1}, "does not hold here"),
        ({"log2": -0.1, "column": -0.1, "leaks": 3.0}, "partly"),
    ],
)
def test_agile(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(agile_quant.judge(Measured(_agile(**given)))) == verdict


@pytest.mark.parametrize("module", [outliertune, llm_fp4, agile_quant])
def test_nothing_is_decided_without_measurements(module: object) -> None:
    checks = module.judge(Measured([]))  # type: ignore[attr-defined]
    assert verdict_of(checks) == "not testable here"
    assert all(c.passed is None for c in checks)


@pytest.mark.parametrize("slug", ["outliertune", "llm-fp4", "agile-quant"])
def test_there_are_two_modes(slug: str) -> None:
    made = recipe(slug)
    assert set(made.quick) == set(made.full) and made.quick["tokens"] < made.full["tokens"]
    assert made.criterion.startswith("Central:")


def test_the_table_and_the_count_of_codes() -> None:
    assert sorted(set(map(abs, llm_fp4.table_of(2, 1)))) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert sorted(set(map(abs, llm_fp4.table_of(3, 0)))) == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert [x / llm_fp4.table_of(1, 2)[1] for x in llm_fp4.table_of(1, 2)[:8]] == list(range(8))
    assert llm_fp4._codes().value == 0


def test_the_byte_gpt2_has_norms_with_biases_and_a_head_of_its_own() -> None:
    model = byte_gpt2()
    names = dict(model.module.named_parameters())
    assert "transformer.h.0.ln_1.bias" in names and "lm_head.weight" in names
    assert model.tokenizer is not None
    with torch.no_grad():
        assert model.forward(model.encode("whale")).logits.shape == (1, 5, 256)
