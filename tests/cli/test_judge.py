"""`actlas judge`, called as its function would be from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.main import get_command

from actlas.cli import judge
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.dictionaries.evaluation.controls import UnitDirections
from tests.dictionaries.test_task_runs import SITE, reader


def call(*arguments: str) -> None:
    command = get_command(judge.app)
    with command.make_context("judge", list(arguments)) as context:
        command.invoke(context)


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Model:
        return reader()

    monkeypatch.setattr(judge, "load_model", load)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    lens = UnitDirections(site=SITE, directions=torch.eye(32), centre=torch.zeros(32), k=8)
    return str(lens.save(tmp_path / "d", reader()))


SMALL = ("--prompts", "60", "--test", "16", "--words", "4", "--exchanges", "1,3")


def test_a_dictionary_is_judged(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    call("any", saved, *SMALL, "--change", "Pos")
    said = capsys.readouterr().out
    for word in (
        "60 prompts to fit, ",
        "Approximation",
        "supervised mean",
        "random atoms",
        "Control",
    ):
        assert word in said


def test_json_has_every_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    call("any", "--site", SITE, *SMALL, "--json", "--parametrisation", "coupled")
    document = json.loads(capsys.readouterr().out)
    assert document["task"] == "ioi" and {m["name"] for m in document["measurements"]} >= {"edit success"}


def test_bad_input(saved: str) -> None:
    with pytest.raises(InputError, match="give a saved dictionary"):
        call("any")
    with pytest.raises(InputError, match="--exchanges '0,2'"):
        call("any", saved, "--exchanges", "0,2")
    with pytest.raises(InputError, match="two of the dictionaries are for one site"):
        call("any", saved, saved)
    with pytest.raises(InputError, match="there is no task 'io'"):
        call("any", saved, "--task", "io")
    with pytest.raises(typer.BadParameter):
        call("any", saved, "--test", "2")
