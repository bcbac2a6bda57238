"""`explain_output` names every tensor; `doctor` names the stage that fails, with the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from actlas.core.model import Model
from actlas.core.passes import CACHES
from actlas.report import doctor, explain_output
from actlas.report.diagnosis import Check
from tests.measure.small_models import bert, llama, tokenizer, vit


def test_outputs_of_a_language_model_are_named_with_their_axes() -> None:
    model = llama()
    found = explain_output(model, ["the cat sat", "on a mat"])
    parts = {p.name: p for p in found.parts}
    logits = parts["logits"]
    assert logits.axes == ("batch", "position", "vocabulary") and logits.shape[0] == 2
    assert logits.shape[-1] == model.vocab_size
    assert "row i predicts token i + 1" in logits.meaning
    cache = next(parts[name] for name in CACHES if name in parts)
    assert "positions" in cache.meaning
    assert found.example.startswith("Most probable next tokens")
    p = model.logits("the cat sat")[0, -1].softmax(-1)
    assert f"({float(p.max()):.1%})" in explain_output(model, "the cat sat").example
    assert "batch 2" in str(found) and json.dumps(found.to_json())


def test_outputs_of_other_models() -> None:
    encoder = {p.name: p for p in explain_output(bert()).parts}
    assert encoder["last_hidden_state"].axes == ("batch", "position", "width")
    assert "pooler_output" in encoder
    images = explain_output(vit())
    assert images.parts[0].axes == ("batch", "class") and images.example.startswith("Most probable classes")
    plain = explain_output(Model(nn.Linear(4, 2), name="m"), torch.zeros(3, 4))
    assert plain.returned == "Tensor" and plain.parts[0].shape == (3, 2)


def test_hidden_states_and_attentions_are_counted() -> None:
    model = llama()
    model.module.config.output_hidden_states = True
    names = [p.name for p in explain_output(model, "the cat").parts]
    assert "hidden_states[0..2]" in names


def save(folder: Path, model: Model | None = None) -> Path:
    model = model or llama()
    model.module.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def failing(checks: list[Check]) -> Check:
    return next(c for c in checks if c.status == "failed")


def test_a_healthy_model_passes_every_stage(tmp_path: Path) -> None:
    checks = doctor(save(tmp_path / "m"))
    assert [c for c in checks if c.status == "failed"] == []
    stages = {c.stage: c.status for c in checks}
    for stage in (
        "files",
        "config",
        "tokenizer files",
        "loading",
        "tokenizer",
        "input",
        "forward pass",
        "output",
        "generation",
    ):
        assert stages[stage] == "ok", stage
    assert stages["chat template"] == "skipped"


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _other_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))


def _unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["NopeForCausalLM"], "model_type": "nope"}
    (folder / "config.json").write_text(json.dumps(config))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("harm", "stage", "fix"),
    [
        (_no_config, "config", "config.json"),
        (_bad_config, "config", "download config.json again"),
        (_truncated, "files", "download the weights again"),
        (_pointer, "files", "git lfs pull"),
        (_other_vocabulary, "tokenizer files", "tokenizer that belongs"),
        (_unknown_architecture, "loading", ""),
        (_empty, "files", "whole repository"),
    ],
)
def test_the_failing_stage_is_named_with_the_fix(tmp_path: Path, harm: object, stage: str, fix: str) -> None:
    folder = save(tmp_path / "m")
    harm(folder)
    checks = doctor(folder)
    bad = failing(checks)
    assert bad.stage == stage
    assert fix in f"{bad.detail}; {bad.fix}"
    assert "\n" not in str(bad)
    assert any(c.status == "skipped" for c in checks)


def test_nan_outputs_and_broken_templates_are_found() -> None:
    model = llama()
    with torch.no_grad():
        model.module.model.norm.weight.fill_(float("nan"))
    bad = failing(doctor(model))
    assert bad.stage == "output" and "NaN" in bad.detail
    broken = llama()
    kept = broken.tokenizer.chat_template
    broken.tokenizer.chat_template = "{{ raise_exception('no') }}"
    try:
        assert failing(doctor(broken)).stage == "chat template"
        broken.tokenizer.chat_template = "always the same"
        assert "does not hold the message" in failing(doctor(broken)).detail
    finally:
        broken.tokenizer.chat_template = kept


def test_a_name_that_cannot_be_loaded_is_a_check_and_no_traceback() -> None:
    checks = doctor("smollm3-that-is-not-there")
    assert failing(checks).stage == "loading"
