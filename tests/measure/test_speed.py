"""Speed and memory: what is run, in which order, under which edits. Times themselves decide nothing."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from actlas.core.edits import Scale
from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.measure import speed
from actlas.measure.memory import PeakMemory
from actlas.measure.speed import decode_speed, forward_measures, forward_speed, peak_memory

from .small_models import bert, llama, vit


def test_forward_speed_has_its_baseline_interval_and_threads() -> None:
    found, memory = forward_measures(llama(), tokens=20, repeats=6)
    assert found.unit == "tokens/s" and found.value > 0 and found.n == 6
    assert found.low <= found.value <= found.high and found.interval.startswith("order statistics")
    base = found.baseline
    assert base is not None and base.value > 0 and base.n == 6 and "no edits" in base.note
    assert found.details["threads"] == torch.get_num_threads() and "threads" in found.note
    assert found.details["ratio_low"] <= found.details["ratio"] <= found.details["ratio_high"]
    assert memory.unit == "bytes" and memory.value >= 0 and memory.baseline is not None
    assert "20 tokens in one pass" in found.note and not found.under


@pytest.mark.parametrize("make, unit", [(bert, "tokens/s"), (vit, "images/s")])
def test_other_kinds_of_models(make: Any, unit: str) -> None:
    assert forward_speed(make(), tokens=8, repeats=2).unit == unit
    assert peak_memory(make(), tokens=8, repeats=2).unit == "bytes"


def test_a_plain_module_needs_an_example() -> None:
    model = Model(torch.nn.Linear(4, 2))
    with pytest.raises(InputError, match="example"):
        forward_speed(model)
    found = forward_speed(model, example=torch.randn(3, 4), repeats=2)
    assert found.unit == "inputs/s" and "3 inputs in one pass" in found.note


def test_runs_alternate_and_every_other_is_without_edits() -> None:
    model = llama()
    seen: list[tuple[str, int]] = []
    with model.edit(Scale("blocks.0.mlp.out", 2.0)):
        model.forward("the cat")
        calls = [
            lambda: seen.append(("ours", len(model.installed))),
            lambda: seen.append(("bare", len(model.installed))),
        ]
        seconds, peaks = speed._interleave(model, calls, 3, "test")
        model.forward("the cat")
    bare, ours = ("bare", 0), ("ours", 1)
    assert seen == [bare, ours, ours, bare, bare, ours, ours, bare]
    assert [len(column) for column in seconds] == [3, 3] and peaks[0] == [0, 0, 0]


def test_edits_are_named_on_the_value_but_not_on_the_baseline() -> None:
    model, edit = llama(), Scale("blocks.0.mlp.out", 2.0)
    with model.edit(edit):
        model.forward("the cat")
        found = decode_speed(model, prompt_tokens=4, new_tokens=4, repeats=2)
        model.forward("the cat")
    assert found.under == (edit.describe(),) and found.baseline.under == ()
    assert model.installed == ()


def test_decode_speed_takes_the_prompt_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second for a prompt and half a second a token must read as two tokens a second."""
    model = llama()
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def work(n: int) -> None:
        clock[0] += 1 + 0.5 * (n - 1)

    monkeypatch.setattr(model, "generate", lambda ids, max_new_tokens, **k: work(max_new_tokens))
    monkeypatch.setattr(model.module, "generate", lambda max_new_tokens, **k: work(2 * max_new_tokens - 1))
    found = decode_speed(model, new_tokens=9, repeats=3)
    assert found.value == pytest.approx(2) and found.baseline.value == pytest.approx(1)
    assert found.details["ratio"] == pytest.approx(2)
    assert found.interval == "range of the repeats"


def test_decoding_makes_as_many_tokens_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    lengths = []
    real = model.module.generate

    def watched(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        lengths.append(out.shape[1])
        return out

    monkeypatch.setattr(model.module, "generate", watched)
    with torch.no_grad():
        model.module.lm_head.weight[1] = 50.0  # always says the end-of-text token
    decode_speed(model, prompt_tokens=3, new_tokens=5, repeats=2)
    assert sorted(set(lengths)) == [4, 8]


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_peak_memory_sees_what_was_taken_and_given_back() -> None:
    meter = PeakMemory(torch.device("cpu"))
    if meter.source != "high-water mark":
        pytest.skip("this system does not let a process reset its high-water mark")
    size = 96 * 2**20
    for _ in range(2):  # the second time as well: earlier peaks are forgotten
        meter.start()
        block = np.ones(size // 8)
        block.sum()
        del block
        assert 0.9 * size < meter.stop() < 1.3 * size
    meter.start()
    assert meter.stop() < size / 4


def test_the_lifetime_maximum_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    from actlas.measure import memory

    monkeypatch.setattr(memory, "_reset", lambda: False)
    meter = PeakMemory(torch.device("cpu"))
    assert meter.source == "lifetime maximum" and "lifetime" in meter.note
    meter.start()
    assert meter.stop() >= 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"repeats": 1}, "repeats must be at least 2, not 1"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, not 1"),
        ({"prompt_tokens": 0}, "at least 1, not 0"),
    ],
)
def test_bad_options_are_said(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_speed(llama(), **options)


def test_a_model_that_does_not_generate_is_said() -> None:
    with pytest.raises(ModelError, match="does not generate"):
        decode_speed(bert(), repeats=2)


def test_values_are_finite() -> None:
    found = forward_measures(llama(), tokens=8, repeats=2)
    assert all(math.isfinite(m.value) for m in found)
