"""Writing a card's folder: whole or not at all, one writer at a time, nobody's files lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from actlas.core.artifact import write_folder
from actlas.core.errors import FailureError, InputError

MARKER = "card.json"
OWN_FILES = frozenset(("card.html", "card.md", MARKER))


def check_target(out: str | Path) -> Path:
    """Refuse a folder that a card may not be written to, before minutes of measuring.

    Raises:
        InputError: it is a file, or a folder that holds something else than a card.
        FailureError: nothing can be written there.
    """
    path = Path(out)
    if path.exists():
        if not path.is_dir():
            raise InputError(f"{path} is a file; give the name of a folder for the card")
        foreign = sorted({p.name for p in path.iterdir()} - OWN_FILES)
        if foreign:
            raise InputError(f"{path} holds {foreign[0]!r}, which is no part of a card; give another folder")
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise FailureError(f"cannot write {path}: {above} cannot be written to; choose another folder")
    return path


def save_folder(out: str | Path, files: Mapping[str, str | bytes]) -> Path:
    """Replace the folder by one that holds exactly these files.

    Two processes that write one folder take turns, so the last one's card stays, whole.

    Raises:
        InputError: see `check_target`.
        FailureError: the disk is full or the folder cannot be written.
    """
    path = Path(out).absolute()
    check_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailureError(f"cannot write {path}: {error.strerror or error}") from error
    with _turn(path.parent):
        check_target(path)
        return write_folder(path, files, marker=MARKER)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; where there are no locks (Windows, some network disks), go on without."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
