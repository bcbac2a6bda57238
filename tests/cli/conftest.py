"""A tiny local model and a way to call the command line inside the test's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from actlas.cli.main import main

CONTEXT = 64


def _tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["the cat sat on the mat and the dog ran to the house"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def make_model(folder: Path, width: int) -> Path:
    """Write a GPT-2 of three blocks with random weights."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(width)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(
        n_layer=3,
        n_embd=width,
        n_head=4,
        n_positions=CONTEXT,
        vocab_size=len(tokenizer),
        initializer_range=0.3,
        **ids,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models") / "tiny", 32))


@pytest.fixture(scope="session")
def wider(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models") / "wider", 48))


@pytest.fixture
def vector(tiny: str, tmp_path: Path) -> str:
    """A saved steering vector for the tiny model."""
    from actlas.core.edits import Add
    from actlas.models import load

    generator = torch.Generator().manual_seed(0)
    return str(
        Add("blocks.1.resid_post", torch.randn(32, generator=generator)).save(tmp_path / "vec", load(tiny))
    )


@dataclass(frozen=True)
class Said:
    """What a run of the command line printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def failed(self, status: int = 2) -> str:
        """Check that it ended with one line on standard error and nothing on standard output; return it."""
        assert self.status == status, self
        assert self.out == ""
        assert (
            self.err.startswith("actlas: error: ") and self.err.count("\n") == 1 and self.err.endswith("\n")
        )
        assert "Traceback" not in self.err
        return self.err


@pytest.fixture
def actlas(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return run


def command(*arguments: object) -> list[str]:
    """Return the command line for a process of its own."""
    return [sys.executable, "-c", "from actlas.cli.main import run; run()", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, in which children find this Actlas, one thread and no colour."""
    import actlas

    source = str(Path(actlas.__file__).parents[1])
    path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def spawn(*arguments: object, **more: str) -> Said:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, env=environment(**more), check=False
    )
    return Said(done.returncode, done.stdout, done.stderr)
