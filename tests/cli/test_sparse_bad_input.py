"""Sparsity from the command line with input that cannot work: one line, status 2, nothing saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import actlas
from actlas.core.errors import InputError
from actlas.sparsity.chess import fit_chess
from actlas.sparsity.r_sparse import fit_r_sparse
from actlas.sparsity.wina import fit_magnitude, fit_wina

from .conftest import Said, _tokenizer

Run = Callable[..., Said]
RULES = ("magnitude-sparsity", "wina", "r-sparse", "priced-inputs", "chess")
EVERY = ("--skip-first", "0", "--skip-last", "0")


def llama(folder: Path, width: int, *, broken: bool = False) -> str:
    """Write a gated model of three blocks; a broken one has a weight that is not a number."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    if broken:
        with torch.no_grad():
            module.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    module.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llama(tmp_path_factory.mktemp("sparse") / "gated", 32)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llama(tmp_path_factory.mktemp("sparse") / "broken", 32, broken=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "t.txt"
    file.write_text("the cat sat on the mat and the dog ran to the house " * 20)
    return file


@pytest.mark.parametrize("rule", RULES)
def test_a_share_of_all_inputs_or_more(actlas: Run, gated: str, text: Path, tmp_path: Path, rule: str):
    for share in ("1", "1.5", "-0.1"):
        said = actlas("fit", rule, gated, text, "--sparsity", share, "-o", tmp_path / "o").failed()
        assert "sparsity" in said and f"not {share}" in said
    for share in ("nan", "half"):
        said = actlas("fit", rule, gated, text, "--sparsity", share, "-o", tmp_path / "o").failed()
        assert f"sparsity must be a number, not '{share}'" in said
    assert not (tmp_path / "o").exists()


def test_a_share_of_neurons_outside_its_range(actlas: Run, gated: str, text: Path, tmp_path: Path):
    for keep in ("0", "1.5"):
        said = actlas(
            "fit", "core-neurons", gated, text, "--keep", keep, *EVERY, "-o", tmp_path / "o"
        ).failed()
        assert f"(0, 1], not {keep}" in said
    said = actlas("fit", "core-neurons", gated, text, "-o", tmp_path / "o").failed()
    assert "leave none of 3 blocks sparse" in said


def test_thresholds_for_another_model(actlas: Run, gated: str, text: Path, tmp_path: Path):
    other = llama(tmp_path / "other", 48)
    made = actlas("fit", "wina", gated, text, "--sparsity", "0.5", "-o", tmp_path / "w")
    assert made.status == 0, made
    for arguments in (["generate", other, "the"], ["measure", other, "perplexity", "--data", text]):
        assert "made for another model" in actlas(*arguments, "--edit", tmp_path / "w").failed()


def test_a_model_without_the_layout(actlas: Run, tiny: str, text: Path, tmp_path: Path):
    assert "no gated MLPs" in actlas("fit", "chess", tiny, text, "-o", tmp_path / "o").failed()
    said = actlas("fit", "wina", "efficientnet-lite0", text, "-o", tmp_path / "o").failed()
    assert "no known layout" in said and not (tmp_path / "o").exists()


@pytest.mark.parametrize("fit", [fit_wina, fit_magnitude, fit_chess, fit_r_sparse])
def test_a_calibration_without_rows_of_a_layer(gated: str, fit: Callable[..., object]):
    model = actlas.load(gated)
    read = actlas.calibrate(model, ["the cat sat on the mat"] * 3, ["blocks.0.resid_post"])
    with pytest.raises(InputError, match=r"no rows of module:model\.layers\.0\.self_attn\.q_proj\.input"):
        fit(model, read, sparsity=0.5)


@pytest.mark.parametrize("rule", [*RULES, "core-neurons", "layer-skip", "ppl-p-sparsity"])
def test_activations_that_are_not_numbers(actlas: Run, broken: str, text: Path, tmp_path: Path, rule: str):
    more = EVERY if rule == "core-neurons" else ()
    said = actlas("fit", rule, broken, text, *more, "-o", tmp_path / "o").failed()
    assert "NaN" in said and not (tmp_path / "o").exists()


def test_a_weight_that_is_not_a_number_does_not_decode(actlas: Run, broken: str):
    assert "NaN" in actlas("generate", broken, "the cat", "--max-new-tokens", "2").failed()
