"""Every method of quantization-aware training from the command line, on a model in a folder."""

from __future__ import annotations

import pytest

from actlas.cli.main import main
from tests.core.tiny import TEXTS, tiny

SMALL = ["--steps", 2, "--batch", 2, "--context", 16, "--tokens", 400]
COMMANDS = {
    "quest-llm": ["--w-bits", 1, "--a-bits", 4, *SMALL],
    "lr-qat": ["--spec", "int2-channel-sym", "--rank", 4, *SMALL],
    "edgeqat": ["--w-bits", 4, "--a-bits", 8, *SMALL],
    "bit-search": ["--bits", "2,3,4", "--mean-bits", 3, "--form", "g16", *SMALL],
    "token-bits": ["--low", 4, "--tokens", 400, "--context", 16],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, at = tiny(), tmp_path_factory.mktemp("qat")
    model.module.save_pretrained(at / "model")
    model.tokenizer.save_pretrained(at / "model")
    (at / "texts").mkdir()
    for i, text in enumerate(TEXTS * 2):
        (at / "texts" / f"{i:02d}.txt").write_text(text)
    return at


@pytest.mark.parametrize("name", COMMANDS)
def test_fit_saves_an_edit_that_generates(name, folder, tmp_path, capsys):
    options = [str(x) for x in COMMANDS[name]]
    target = tmp_path / "edit"
    status = main(["fit", name, str(folder / "model"), str(folder / "texts"), *options, "-o", str(target)])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "perplexity-ratio" in said.out and "saved in" in said.out
    options = ["--edit", str(target), "--max-new-tokens", "3"]
    assert main(["generate", str(folder / "model"), "The river", *options]) == 0, capsys.readouterr().err


def test_a_wrong_option_is_said_in_one_line(folder, tmp_path, capsys):
    command = ["fit", "lr-qat", str(folder / "model"), str(folder / "texts"), "--spec", "int8-channel-sym"]
    assert main([*command, *map(str, SMALL), "-o", str(tmp_path / "e")]) != 0
    said = capsys.readouterr().err.strip()
    assert "fraction" in said and "\n" not in said and not (tmp_path / "e").exists()
