"""`actlas`: the command line's entry point, its table of commands, and how errors end.

A command is a file `actlas/cli/<name>.py` with a Typer app called `app` that has one command. It is
imported when somebody calls it. Errors become one line on standard error:

    actlas: error: no model is called 'smollm3'; did you mean smollm2?

with exit status 2 for bad input, 1 for a failure, 130 after Ctrl-C. `--debug` adds the traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from actlas.cli.shared import STATE
from actlas.core.errors import ActlasError, InputError, did_you_mean

COMMANDS = {
    "card": "Measure a model and write its activation card.",
    "sites": "List where a model's activations can be read and edited.",
    "trace": "Look at activations and the logit lens.",
    "generate": "Generate text, with edits installed if you like.",
    "serve": "Serve a model over HTTP, with edits per request, and a web page.",
    "measure": "Measure a model, with and without edits, side by side.",
    "calibrate": "Read a corpus once and save statistics of the activations.",
    "harvest": "Store the activations of a corpus on disk.",
    "fit": "Fit a method and save the lens or edit that it gives.",
    "shrink": "Make a model faster or smaller here, and show what it costs.",
    "features": "Show what the features of a dictionary mean.",
    "evaluate": "Evaluate a dictionary with SAEBench's measures.",
    "judge": "Judge a dictionary on a task whose variables are known.",
    "patch": "Find the parts of a model that carry a behaviour.",
    "circuit": "Find the circuit of a task and test whether it is faithful.",
    "convert": "Turn SAELens or control-vector files into ours, or back.",
    "export": "Write a quantised model for other programs.",
    "similarity": "Compare the layers of two models on the same tokens.",
    "select": "Choose the texts of a pool that are most like a few examples.",
    "attack": "Measure how easily a vector hijacks a model's answers.",
    "audit": "Check a model for hooks, added vectors and changed weights.",
    "explain": "Show which tokens of a prompt an answer rests on.",
    "methods": "List the methods that can be fitted.",
    "papers": "List the papers that Actlas rests on, and what came out here.",
    "reproduce": "Test a paper's claim here and judge it.",
    "models": "List the bundled models, fetch or remove them.",
    "doctor": "Find out why a model does not work, and what its folder lacks.",
}


class _Commands(TyperGroup):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            raise InputError(
                f"there is no command {cmd_name!r}"
                f"{did_you_mean(cmd_name, COMMANDS) or '; there are ' + ', '.join(COMMANDS)}"
            )
        module = importlib.import_module(f"actlas.cli.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=_Commands,
    name="actlas",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExample:\n  actlas card                        (measures the bundled model smollm2)\n"
    "  actlas trace smollm2 'The capital of France is'\n  actlas fit --help",
)


@app.callback(invoke_without_command=True)
def _global(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processor threads to use; default: all.")
    ] = None,
) -> None:
    """Read, explain, edit, compress, protect and report a neural network's activations."""
    if version:
        from actlas import __version__

        print(f"actlas {__version__}")
        raise typer.Exit
    if threads is not None:
        _set_threads(threads)
    if context.invoked_subcommand is None:
        print(context.get_help())


def _set_threads(threads: int) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: what stands after `actlas`; default: this process's.
    """
    STATE.debug = False
    STATE.arguments = tuple(sys.argv[1:] if arguments is None else arguments)
    try:
        command = typer.main.get_command(app)
        if "_ACTLAS_COMPLETE" in os.environ:  # the shell asks how a word could go on
            command.main(prog_name="actlas")
        with command.make_context("actlas", list(STATE.arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:
        status = _status(error)
        if status is None:
            raise
        if STATE.debug and status != 130:
            import traceback

            traceback.print_exception(error)
        _complain(error, status)
        return status


def _status(error: BaseException) -> int | None:
    """Return the exit status that an exception means, or `None` for one that is not ours to end."""
    if isinstance(error, SystemExit):
        return None
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130
    if isinstance(error, ActlasError):
        return error.exit_status
    if hasattr(error, "format_message"):  # a usage error of Typer, whichever package it comes from
        return int(getattr(error, "exit_code", 2))
    return 1 if isinstance(error, Exception) else None


def _complain(error: BaseException, status: int) -> None:
    if status == 130:
        said = "interrupted; nothing was left half written"
    elif isinstance(error, ActlasError):
        said = f"error: {error}"
    elif hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "actlas"
        said = f"error: {error.format_message().rstrip('.')}{_given(error)}; see '{path} --help'"
    elif isinstance(error, MemoryError):
        said = "error: this needs more memory than there is; try a smaller model, batch or context"
    else:
        hint = "" if STATE.debug else " (run it again with --debug to see where)"
        said = f"error: {type(error).__name__}: {error}{hint}"
    sys.stderr.write(f"actlas: {' '.join(said.split())}\n")
    sys.stderr.flush()


def _given(error: BaseException) -> str:
    """Return `" (given: 'many')"` for a usage error about an option's value, which Typer leaves out."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for word, following in zip(STATE.arguments, (*STATE.arguments[1:], ""), strict=True):
        name, sign, value = word.partition("=")
        if name in names and name.startswith("-"):
            return f" (given: {value if sign else following!r})"
    return ""


def run() -> None:
    """Entry point of the `actlas` command."""
    try:
        status = main()
    except KeyboardInterrupt:  # in the instant before or after the command itself
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run()
