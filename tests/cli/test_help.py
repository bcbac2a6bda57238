"""Help is instant, complete, and the table of commands agrees with the commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from actlas import __version__
from actlas.cli.main import COMMANDS

from .conftest import Said, environment, spawn

HEAVY = ("torch", "transformers", "numpy", "altair", "pandas", "rich", "sklearn", "pyarrow", "jinja2")


@pytest.mark.parametrize("arguments", [["--help"], ["trace", "--help"], ["card", "--help"], ["models"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    allowed = ("rich",) if arguments == ["models"] else ()
    heavy = tuple(name for name in HEAVY if name not in allowed)
    code = (
        "import sys; from actlas.cli.main import main; status = main(sys.argv[1:]);"
        f"print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert done.stderr.strip() == "[]"


def test_the_commands_files_import_nothing_heavy() -> None:
    modules = ", ".join(f"actlas.cli.{name}" for name in COMMANDS)
    code = f"import sys, {modules}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_first_page_lists_every_command(actlas: Callable[..., Said]) -> None:
    said = actlas("--help")
    assert said.status == 0 and said.err == ""
    assert all(f"  {name} " in said.out and summary in said.out for name, summary in COMMANDS.items())
    assert actlas().out == said.out and actlas().status == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_the_common_options(
    actlas: Callable[..., Said], name: str
) -> None:
    said = actlas(name, "--help")
    assert said.status == 0
    text = " ".join(said.out.split())
    assert COMMANDS[name] in text
    assert f"Example: actlas {name}" in text
    assert all(option in text for option in ("--json", "--seed", "--debug"))


def test_version(actlas: Callable[..., Said]) -> None:
    assert actlas("--version").out == f"actlas {__version__}\n"


def test_threads_reach_torch(tiny: str) -> None:
    code = (
        "import sys; from actlas.cli.main import main; main(['--threads', '2', 'sites', sys.argv[1], 'embed']);"
        "import torch; print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.splitlines()[-1] == "2"


def test_unknown_commands_and_options_end_with_one_line() -> None:
    for arguments, said in (
        (["crd"], "there is no command 'crd'; did you mean card?"),
        (["xyzzy"], "there is no command 'xyzzy'; there are card,"),
        (["sites", "--paternn"], "--paternn"),
        (["sites"], "MODEL"),
        (["--threads", "0", "models"], "--threads"),
        (["trace", "m", "p", "--top", "many"], "many"),
    ):
        assert said in spawn(*arguments).failed()
