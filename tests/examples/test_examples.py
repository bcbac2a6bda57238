"""The example scripts run: on a small random model here, on the bundled one with `-m slow`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.data.tokenizers_made_here import tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "any_module": (),
    "read_layers": ("MODEL", "The film was"),
    "probe_and_steer": ("MODEL", "1"),
    "compare_edits": ("MODEL", "1", "500"),
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("small")
    words = tokenizer("bytes")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_positions=256, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_runs_on_a_small_model(
    name: str, small_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load(name).main(*(small_model if a == "MODEL" else a for a in ARGUMENTS[name]))
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_runs_on_the_bundled_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main()
    assert len(capsys.readouterr().out.splitlines()) >= 3
