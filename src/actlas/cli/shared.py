"""What all commands share: their common options, and turning names and paths into models, edits and data."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actlas.cli.output import Output
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of every random choice.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and all warnings.")]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A bundled name, a local folder, a GGUF file or a hub name.")
]
Edits = Annotated[
    list[str] | None,
    typer.Option(
        "--edit",
        metavar="PATH[*STRENGTH]",
        help="Install a saved edit or control vector, e.g. vec*4; a lens's feature is lens#3*4. Repeatable.",
    ),
]


@dataclass
class State:
    """What the end of a run and the record of a result must know about its start."""

    debug: bool = False
    arguments: tuple[str, ...] = ()


STATE = State()


@contextlib.contextmanager
def session(*, json: bool, debug: bool) -> Iterator[Output]:
    """Yield the command's output; print its JSON document at the end, if that was asked for.

    With `json`, whatever a library prints meanwhile goes to standard error.
    """
    STATE.debug = debug
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    output = Output(json)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        if not debug:
            warnings.showwarning = _warn
        if json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield output
    output.finish()


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """Print Actlas's own warnings on one line and drop those of libraries."""
    own = category.__module__.startswith("actlas") or f"{os.sep}actlas{os.sep}" in filename
    if own:
        sys.stderr.write(f"actlas: warning: {' '.join(str(message).split())}\n")


def new_app() -> typer.Typer:
    """Return the Typer app of one command."""
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def example(*lines: str) -> str:
    """Return the end of a command's help: example command lines, one a line."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def load_model(name: str) -> Model:
    """Load a model by name or path.

    Raises:
        InputError: an empty name, or a folder of `actlas shrink`. ModelError: no such model.
    """
    from actlas.models import load

    if not name.strip():
        raise InputError("the model's name is empty; 'actlas models' lists the bundled ones")
    if _is_shrunk(name):
        raise InputError(f"{name} holds what shrinks a model; give the model itself, and --edit {name}")
    return load(name)


def load_with_edits(name: str, given: Sequence[str] | None) -> tuple[Model, list[Edit]]:
    """Load a model and the edits that it is to have; a folder of `actlas shrink` names both.

    Raises:
        InputError, ModelError: as `load_model`. ArtifactError, FingerprintError: as `load_edits`.
    """
    given = list(given or ())
    if _is_shrunk(name):
        from actlas.report.shrink.result import load_record

        given = [name, *given]
        name = str(load_record(name)["model"])
    loaded = load_model(name)
    return loaded, load_edits(given, loaded)


def _is_shrunk(name: str) -> bool:
    try:
        return (Path(name) / "shrink.json").is_file()
    except (OSError, ValueError):
        return False


def load_edits(given: Sequence[str] | None, model: Model) -> list[Edit]:
    """Load the edits that `--edit` names, each at its strength.

    Args:
        given: `PATH`, `PATH*STRENGTH`, or `PATH#FEATURE*STRENGTH` for a feature of a saved lens.
        model: the model that they must fit.

    Raises:
        InputError: an unreadable strength or feature. ArtifactError: not a whole edit or lens.
        FingerprintError: made for another model.
    """
    return [_load_edit(text, model) for text in given or ()]


def _load_edit(text: str, model: Model) -> Edit:
    from actlas.core import edits as known  # noqa: F401  (the kinds of edit register themselves)
    from actlas.core.artifact import load_artifact
    from actlas.core.edit import Edit
    from actlas.core.lens import Lens

    path, feature, strength = split_edit(text)
    if path.suffix.lower() in (".gguf", ".safetensors") and not path.is_dir():
        from actlas.steering.exchange import read_control_vector

        if feature is not None:
            raise InputError(f"{path} is a control vector, which has no features; leave out #{feature}")
        vector = read_control_vector(path, model)
        return vector if strength == 1.0 else vector * strength
    kind = load_artifact(path)[0]["kind"]
    if kind == "lens":
        return Lens.load(path, model).edit(feature or 0, strength)
    if feature is not None:
        raise InputError(f"{path} holds an {kind}, which has no features; leave out #{feature}")
    edit = Edit.load(path, model)
    return edit if strength == 1.0 else edit * strength


def installed(model: Model, edits: Sequence[Edit]) -> contextlib.AbstractContextManager[object]:
    """Return the `with` block that has the edits installed; there may be none."""
    return model.edit(*edits) if edits else contextlib.nullcontext()


def split_edit(text: str) -> tuple[Path, int | None, float]:
    """Split `PATH[#FEATURE][*STRENGTH]`; a path that exists as it stands is taken as it stands.

    Raises:
        InputError: the part after `*` or `#` is not a number, or the path is empty.
    """
    rest, strength, feature = text, 1.0, None
    if not Path(rest).exists() and "*" in rest:
        rest, _, said = rest.rpartition("*")
        try:
            strength = float(said)
        except ValueError:
            raise InputError(
                f"--edit {text!r}: the strength {said!r} is not a number; write e.g. {rest or 'vec'}*4"
            ) from None
        if not -1e9 < strength < 1e9:
            raise InputError(f"--edit {text!r}: the strength must be a finite number")
    if not Path(rest).exists() and "#" in rest:
        rest, _, said = rest.rpartition("#")
        if not said.isdigit():
            raise InputError(f"--edit {text!r}: the feature {said!r} is not a number; write e.g. {rest}#3*4")
        feature = int(said)
    if not rest:
        raise InputError(f"--edit {text!r} names no path; give the folder of a saved edit")
    return Path(rest), feature, strength


def check_prompt(prompt: str) -> str:
    """Return the prompt, or raise InputError if there is nothing in it."""
    if not prompt.strip():
        raise InputError("the prompt is empty; give at least one word")
    return prompt


def one_list(given: Sequence[str] | None) -> list[str]:
    """Split repeated and comma-separated values of an option into one list."""
    return [part.strip() for text in given or () for part in _outside_brackets(text) if part.strip()]


def _outside_brackets(text: str) -> list[str]:
    """Split at commas, but not inside a selector such as `attn.z[head=1,2]`."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
