"""Running measures by name: choice, data, edits, options, shared passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from actlas.core.edits import Scale
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.data import corpus, task
from actlas.data.pictures import images
from actlas.measure import language, measure, measures, registry, runner
from actlas.measure.encoder import text_pairs
from actlas.measure.language import perplexity
from actlas.measure.runner import by_kind

from .small_models import WORDS, bert, llama, tokenizer, vit

TEXTS = [WORDS + f" number {i}" for i in range(6)]


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Only a few measures in the registry, so that "all" is quick."""
    names = (
        *(n for n in measures() if measures()[n].function.__module__.endswith((".language", ".tasks"))),
        "top1-accuracy",
    )
    monkeypatch.setattr(registry, "_registry", {n: measures()[n] for n in names})
    return dict.fromkeys(names)


def test_a_named_measure_is_what_the_function_returns() -> None:
    model = llama()
    found = measure(model, ["perplexity"], TEXTS, quick=False)
    assert found[0] == perplexity(model, TEXTS)
    assert measure(model, "perplexity", TEXTS, quick=False)[0] == found[0]


def test_measures_of_one_pass_share_it_and_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = language.nll
    monkeypatch.setattr(language, "nll", lambda *a, **k: calls.append(1) or real(*a, **k))
    names = ["output-entropy", "perplexity", "next-token-accuracy"]
    found = measure(llama(), names, TEXTS)
    assert [m.name for m in found] == names and len(calls) == 1


def test_groups_come_with_a_named_measure() -> None:
    found = measure(llama(), ["perplexity"], corpus("mixed", limit=6), tokens=400)
    assert [dict(m.group) for m in found] == [{}, {"domain": "code"}, {"domain": "docs"}, {"domain": "prose"}]


def test_everything_that_applies_is_run_without_names(mine: dict[str, Any]) -> None:
    found = measure(llama(), tokens=300, data={"task": task("ioi", tokenizer(), n=8)})
    assert {m.name for m in found} == set(mine) - {"top1-accuracy"}
    assert all(math.isfinite(m.value) for m in found)


def test_a_measure_that_does_not_apply_says_so() -> None:
    found = measure(llama(), ["top1-accuracy", "perplexity"], TEXTS)
    assert math.isnan(found[0].value) and found[0].n == 0
    assert found[0].note == "needs a model of kind image-classifier; small llama is of kind causal-lm"
    assert math.isfinite(found[1].value)


def test_edits_are_installed_named_and_taken_back() -> None:
    model, edit = llama(), Scale("blocks.0.mlp.out", 0.0)
    found = measure(model, ["perplexity", "kl-to-base", "top1-accuracy"], TEXTS, edits=[edit])
    assert all(m.under == (edit.describe(),) for m in found)
    assert not model.installed and found[0].value != perplexity(model, TEXTS).value
    with model.edit(edit):
        assert measure(model, ["perplexity"], TEXTS)[0].under == (edit.describe(),)
    with pytest.raises(InputError):
        measure(model, ["perplexity"], [], edits=[edit])
    assert not model.installed


def test_tokens_and_options_reach_the_measures_that_take_them() -> None:
    few = measure(
        llama(),
        ["perplexity", "task-accuracy"],
        {"corpus": [WORDS * 40] * 3, "task": "ioi"},
        tokens=128,
        context=32,
    )
    assert few[0].details["tokens"] <= 128 and few[0].details["context"] == 32
    assert math.isfinite(few[-1].value)
    with pytest.raises(
        InputError, match="none of the measures takes an option 'contxt'; did you mean context"
    ):
        measure(llama(), ["perplexity"], TEXTS, contxt=3)


def test_quick_changes_only_what_the_measure_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = language.nll
    monkeypatch.setattr(language, "nll", lambda *a, **k: seen.append(k["tokens"]) or real(*a, **k))
    measure(llama(), ["perplexity"], TEXTS)
    measure(llama(), ["perplexity"], TEXTS, quick=False)
    measure(llama(), ["perplexity"], TEXTS, tokens=77)
    assert seen == [language.QUICK["tokens"], language.TOKENS, 77]


def test_data_by_name_by_path_and_as_objects(tmp_path: Path) -> None:
    model = llama()
    file = tmp_path / "text.txt"
    file.write_text(WORDS * 3, encoding="utf-8")
    assert math.isfinite(measure(model, ["perplexity"], str(file))[0].value)
    assert math.isfinite(measure(model, ["perplexity"], file)[0].value)
    by_name = measure(model, ["task-accuracy"], "ioi")
    assert by_name[0].n == runner.QUICK_TASK_ITEMS and by_name[0].group == {"task": "ioi"}
    by_object = measure(model, ["task-accuracy"], task("ioi", tokenizer(), n=runner.QUICK_TASK_ITEMS))
    assert by_object == by_name
    both = measure(model, ["task-accuracy"], ["ioi", "capitals"])
    assert {m.group["task"] for m in both} == {"ioi", "capitals"}
    with pytest.raises(InputError, match="there is no corpus 'ioj'"):
        measure(model, ["perplexity"], "ioj")


def test_what_data_is_for() -> None:
    assert list(by_kind("ioi")) == ["task"] and list(by_kind(["ioi", "capitals"])) == ["task"]
    assert list(by_kind("digits")) == ["images"] and list(by_kind("prose")) == ["corpus"]
    assert list(by_kind(TEXTS)) == ["corpus"] and list(by_kind(corpus("docs", limit=2))) == ["corpus"]
    assert list(by_kind(images("digits", n=2))) == ["images"] and list(by_kind(text_pairs(2))) == ["pairs"]
    assert list(by_kind([task("ioi")])) == ["task"] and by_kind(None) == {}
    assert list(by_kind(t for t in TEXTS)) == ["corpus"]
    with pytest.raises(InputError, match="unknown kind 'text': one of corpus"):
        by_kind({"text": "prose"})


def test_default_tasks_leave_out_what_a_tokenizer_cannot_express() -> None:
    found = measure(llama(), ["task-accuracy"])
    names = {m.group["task"] for m in found}
    assert names and names <= set(runner.TASKS)


def test_default_images_suit_the_model() -> None:
    found = {m.name: m for m in measure(vit(), ["top1-accuracy", "confidence"]) if "class" not in m.group}
    assert found["top1-accuracy"].n == runner.QUICK_IMAGES and found["confidence"].n == runner.QUICK_IMAGES


def test_an_encoder_makes_its_own_pairs() -> None:
    found = measure(bert(), ["embedding-separation", "embedding-dimension"])
    assert len(found) == 3 and all(math.isfinite(m.value) for m in found)


def test_errors_of_named_measures_are_raised_and_of_all_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any, *, seed: int = 0) -> Measurement:
        raise InputError("there is no such site here")

    def works(model: Any, *, seed: int = 0) -> Measurement:
        return Measurement("test-works", 1.0, "count", n=1, seed=seed)

    monkeypatch.setattr(registry, "_registry", {})
    registry.measure("test-fails", summary="s", unit="count", data="none")(fails)
    registry.measure("test-works", summary="s", unit="count", data="none")(works)
    found = measure(llama(), seed=5)
    assert [m.name for m in found] == ["test-fails", "test-works"]
    assert math.isnan(found[0].value) and found[0].note == "there is no such site here" and found[1].seed == 5
    with pytest.raises(InputError, match="no such site"):
        measure(llama(), ["test-fails"])


def test_nan_in_the_model_is_never_only_noted(mine: dict[str, Any]) -> None:
    model = llama()
    with torch.no_grad():
        model.module.lm_head.weight[0] = math.nan
    with pytest.raises(NonFiniteError):
        measure(model, None, TEXTS)


def test_wrong_names_are_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(InputError, match="did you mean perplexity"):
        measure(model, ["perplexity", "perplexitty"], TEXTS)
    with pytest.raises(InputError, match="no measure was named"):
        measure(model, [], TEXTS)
