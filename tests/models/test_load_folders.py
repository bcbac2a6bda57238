"""Local folders in transformers' format: the right class, the same numbers, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import actlas
from actlas.core.errors import InputError, ModelError
from tests.models import tiny_models
from tests.models.tiny_models import save

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (tiny_models.gpt2, "causal-lm"),
        (tiny_models.llama, "causal-lm"),
        (tiny_models.bert, "encoder"),
        (tiny_models.bert_masked, "encoder"),
        (tiny_models.bert_classifier, "encoder"),
        (tiny_models.t5, "seq2seq"),
        (tiny_models.vit, "image-classifier"),
        (tiny_models.vit_base, "image-encoder"),
        (tiny_models.clip, "image-text"),
        (tiny_models.whisper, "speech"),
    ],
)
def test_each_family_is_loaded_with_its_class_kind_and_weights(
    tmp_path: Path, build: Callable[[], Any], kind: str
) -> None:
    made = save(tmp_path / "model", build)
    model = actlas.load(tmp_path / "model")
    assert type(model.module) is type(made) and model.kind == kind and model.name == "model"
    assert model.tokenizer is None and not model.module.training
    saved = made.state_dict()
    loaded = model.module.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[k], loaded[k]) for k in saved)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (tiny_models.gpt2, "causal-lm"),
        (tiny_models.bert, "encoder"),
        (tiny_models.t5, "seq2seq"),
        (tiny_models.vit, "image-classifier"),
        (tiny_models.clip, "image-text"),
        (tiny_models.whisper, "speech"),
    ],
)
def test_without_a_declared_architecture_the_model_type_decides(
    tmp_path: Path, build: Callable[[], Any], kind: str
) -> None:
    made = save(tmp_path, build)
    edit_config(tmp_path, architectures=None)
    model = actlas.load(tmp_path)
    assert model.kind == kind
    assert set(dict(model.module.named_parameters())) == set(dict(made.named_parameters()))


def test_the_outputs_are_those_of_the_saved_model(tmp_path: Path) -> None:
    made = save(tmp_path, tiny_models.gpt2, tokenizer=True)
    model = actlas.load(str(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model.module(ids).logits, made(ids).logits)
    assert model.tokenizer("the capital of france")["input_ids"] == [5, 6, 7, 8]


def test_dtype_is_as_saved_unless_asked_for(tmp_path: Path) -> None:
    save(tmp_path, lambda: tiny_models.gpt2().to(torch.bfloat16))
    assert actlas.load(tmp_path).dtype == torch.bfloat16
    assert actlas.load(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert actlas.load(tmp_path, dtype=torch.float16).dtype == torch.float16
    assert actlas.load(tmp_path, dtype="float32").dtype == torch.float32
    assert actlas.load(tmp_path, "fp64", "cpu").dtype == torch.float64


def test_a_loaded_model_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    made = save(tmp_path / "a", tiny_models.llama, tokenizer=True)
    first = actlas.load(tmp_path / "a")
    first.module.save_pretrained(tmp_path / "b")
    first.tokenizer.save_pretrained(tmp_path / "b")
    second = actlas.load(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), second.module.parameters(), strict=True))
    assert second.fingerprint == first.fingerprint


def test_weights_in_shards_are_one_model(tmp_path: Path) -> None:
    made = tiny_models.llama()
    made.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = actlas.load(tmp_path).module
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), loaded.parameters(), strict=True))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"there must be a {shard.name} beside config.json" in one_line(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../../outside.safetensors"))
    with pytest.raises(InputError, match="outside its folder"):
        actlas.load(tmp_path)
    index.write_text("{")
    assert "readable model.safetensors.index.json" in one_line(tmp_path)


def one_line(x: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        actlas.load(x, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_folder_without_config_or_weights(tmp_path: Path) -> None:
    assert "has no config.json" in one_line(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in one_line(tmp_path)
    save(tmp_path, tiny_models.gpt2)
    (tmp_path / "model.safetensors").unlink()
    assert "has no whole weights: there must be a model.safetensors" in one_line(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}'])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in one_line(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    save(tmp_path, tiny_models.gpt2)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 100, b"\x00" * 100):
        (tmp_path / "model.safetensors").write_bytes(broken)
        assert "damaged weights" in one_line(tmp_path)


def test_an_unknown_model_type_or_architecture_is_corrected(tmp_path: Path) -> None:
    save(tmp_path, tiny_models.gpt2)
    edit_config(tmp_path, model_type="gpt22")
    assert "model type 'gpt22', which transformers" in one_line(tmp_path)
    assert "did you mean gpt2" in one_line(tmp_path)
    edit_config(tmp_path, model_type="gpt2", architectures=["GPT2LMHeadModle"])
    assert "did you mean GPT2LMHeadModel" in one_line(tmp_path)


def test_weights_are_never_made_up(tmp_path: Path) -> None:
    save(tmp_path, tiny_models.vit_base)
    edit_config(tmp_path, architectures=["ViTForImageClassification"])
    assert "lacks weights of its architecture, which would have to be random: classifier" in one_line(
        tmp_path
    )


def test_a_pooler_that_nobody_trained_may_be_missing(tmp_path: Path) -> None:
    made = save(tmp_path, lambda: tiny_models.t.BertModel(tiny_models.bert().config, add_pooling_layer=False))
    model = actlas.load(tmp_path)
    assert torch.equal(model.module.embeddings.word_embeddings.weight, made.embeddings.word_embeddings.weight)


def test_shapes_that_do_not_fit_the_config(tmp_path: Path) -> None:
    save(tmp_path, tiny_models.gpt2)
    edit_config(tmp_path, n_embd=16)
    assert str(tmp_path) in one_line(tmp_path)


def test_code_of_a_checkpoint_is_not_run_unasked(tmp_path: Path) -> None:
    save(tmp_path, tiny_models.gpt2)
    edit_config(
        tmp_path, model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "trust_remote_code=True" in one_line(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_is_broken_is_said(tmp_path: Path) -> None:
    save(tmp_path, tiny_models.gpt2, tokenizer=True)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "the tokenizer or processor of" in one_line(tmp_path)


def test_the_processors_of_a_folder_come_along(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    import numpy as np

    save(tmp_path / "vit", tiny_models.vit)
    tiny_models.t.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    vit = actlas.load(tmp_path / "vit")
    pixels = vit.processor(np.zeros((20, 20, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8) and vit.logits({"pixel_values": pixels}).shape == (1, 3)

    save(tmp_path / "clip", tiny_models.clip, tokenizer=True)
    tiny_models.t.CLIPImageProcessor(crop_size=8, size=8).save_pretrained(tmp_path / "clip")
    clip = actlas.load(tmp_path / "clip")
    assert clip.processor is not None and clip.tokenizer("paris")["input_ids"] == [10]

    save(tmp_path / "whisper", tiny_models.whisper)
    tiny_models.t.WhisperFeatureExtractor(feature_size=4).save_pretrained(tmp_path / "whisper")
    assert actlas.load(tmp_path / "whisper").processor.feature_size == 4
