"""`actlas shrink`, and what the other commands do with its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actlas.kernels.loading import native

from .conftest import Said, _tokenizer, command, environment

Run = Callable[..., Said]
WORDS = "the cat sat on the mat and the dog ran to the house while the sun was going down".split()  # noqa: SIM905
QUICK = ("--tokens", 256, "--repeats", 1)
lean = pytest.mark.skipif(native() is None, reason="no native kernels")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        vocab_size=len(tokenizer),
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "book.jsonl"
    texts = [" ".join(WORDS[(7 * i + j * (i + 1)) % len(WORDS)] for j in range(40)) for i in range(12)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@lean
def test_from_shrink_to_generate_measure_and_card(actlas: Run, llama: str, book: str, tmp_path: Path) -> None:
    folder = tmp_path / "shrunk"
    said = actlas("shrink", llama, book, "--keep-ppl", "50%", "--out", folder, *QUICK)
    assert said.status == 0 and "chosen: " in said.out and "tokens/s" in said.out
    assert str(folder / "frontier.html") in said.out
    record = json.loads((folder / "shrink.json").read_text())
    assert record["model"] == llama and record["goal"]["keep"] == 0.5
    page = (folder / "frontier.html").read_text(encoding="utf-8")
    assert "https://cdn" not in page and "tokens a second" in page

    plain = actlas("generate", llama, "the cat", "--max-new-tokens", 8, "--json").json
    assert plain["runtime"] == {"base": {"runtime": "lean loop"}}
    slow = actlas(
        "generate", llama, "the cat", "--max-new-tokens", 8, "--runtime", "transformers", "--json"
    ).json
    assert slow["base"] == plain["base"] and slow["runtime"] == {"base": {"runtime": "transformers"}}
    short = actlas("generate", folder, "the cat", "--max-new-tokens", 8, "--json").json
    long = actlas("generate", llama, "the cat", "--max-new-tokens", 8, "--edit", folder, "--json").json
    assert short["edited"] == long["edited"] and short["edits"] == long["edits"] != []
    assert short["runtime"] == {"edited": {"runtime": "lean loop"}}

    found = actlas("measure", folder, "perplexity", "--data", book, "--tokens", 256, "--json").json
    assert {r["variant"] for r in found["comparison"]["rows"]} == {"base", "edited"}
    card = actlas("card", folder, "--sections", "sparsity", "--out", tmp_path / "card")
    assert card.status == 0, card.err
    text = (tmp_path / "card" / "card.md").read_text(encoding="utf-8")
    assert "was shrunk from" in text and record["chosen"] in text and "Mixes that were measured" in text


@lean
def test_json(actlas: Run, llama: str, book: str, tmp_path: Path) -> None:
    found = actlas(
        "shrink", llama, book, "--formats", "f32,q8", "--no-skip", "--out", tmp_path / "s", *QUICK, "--json"
    ).json
    assert [r["name"] for r in found["rows"]] == ["original", "f32", "q8"]
    assert found["saved"] == str(tmp_path / "s") and found["goal"]["keep"] == 0.01
    small = actlas(
        "shrink",
        llama,
        book,
        "--budget",
        "3bit",
        "--methods",
        "rtn",
        "--out",
        tmp_path / "t",
        *QUICK,
        "--json",
    ).json
    assert small["goal"]["keep"] is None and small["goal"]["bits"] == 3
    chosen = next(r for r in small["rows"] if r["chosen"])
    assert chosen["bits"] <= 3 and chosen["weights"] == "rtn"
    assert (
        actlas("generate", tmp_path / "t", "the cat", "--json").json["runtime"]["edited"]["runtime"]
        == "lean loop"
    )


def test_other_architectures_say_so(actlas: Run, tiny: str, book: str, tmp_path: Path) -> None:
    said = actlas("shrink", tiny, book, "--keep-ppl", "200", "--out", tmp_path / "s", *QUICK)
    assert said.status == 0 and "note: the lean loop cannot run" in said.out
    made = actlas("generate", tmp_path / "s", "the cat", "--max-new-tokens", 4)
    assert made.status == 0
    assert made.err == (
        "actlas: transformers generated, not the lean loop: tiny cannot run on the lean loop: its architecture "
        "is gpt2, and the lean loop runs llama, mistral, qwen2, qwen3\n"
    )


def test_bad_input(actlas: Run, llama: str, tiny: str, book: str, tmp_path: Path) -> None:
    out = tmp_path / "s"
    for arguments, said in (
        (["--keep-ppl", "many"], "--keep-ppl 'many' is no percentage; write e.g. 1%"),
        (["--keep-ppl", "-1%"], "between 0% and 1000%"),
        (["--budget", "huge"], "--budget 'huge' is no number of bits"),
        (["--budget", "64bit"], "between 1 and 32"),
        (["--max-mb", "0"], "--max-mb is 0"),
        (["--max-mb", "0.001"], "the least is 2"),
        (["--rule", "mean"], "'upper' or 'estimate'"),
        (["--formats", "q5"], "no weight format 'q5'"),
        (["--budget", "3bit", "--methods", "rtnn"], "did you mean rtn"),
    ):
        assert said in actlas("shrink", llama, book, "--out", out, *arguments, *QUICK).failed()
    assert not out.exists()
    (tmp_path / "one.txt").write_text("one short text")
    assert "documents" in actlas("shrink", llama, tmp_path / "one.txt", "--out", out).failed()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    assert "not a shrunk model" in actlas("shrink", llama, book, "--out", tmp_path / "mine").failed()
    assert "'auto'" not in actlas("generate", llama, "a", "--runtime", "fast").failed()


@lean
def test_a_folder_of_another_model_is_refused(
    actlas: Run, llama: str, tiny: str, book: str, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    assert actlas("shrink", llama, book, "--formats", "q8", "--no-skip", "--out", folder, *QUICK).status == 0
    assert "another model" in actlas("generate", tiny, "the cat", "--edit", folder).failed()
    assert "give the model itself" in actlas("sites", folder).failed()
    assert "num_beams" in actlas("generate", folder, "a", "--num-beams", 2, "--runtime", "lean").failed()
    record = json.loads((folder / "shrink.json").read_text())
    (folder / "shrink.json").write_text(json.dumps({**record, "model": str(tmp_path / "gone")}))
    assert "gone" in actlas("generate", folder, "the cat").failed()


@pytest.mark.slow
@lean
def test_killed_half_way_leaves_nothing(llama: str, book: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    done = subprocess.Popen(
        command("shrink", llama, book, "--out", folder, "--repeats", 2000),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    time.sleep(15)
    assert done.poll() is None
    os.kill(done.pid, signal.SIGINT)
    assert done.wait(30) == 130
    assert list(tmp_path.iterdir()) == []
