"""The cache of prepared models: a folder per model that is whole or absent, shared between processes.

    <cache>/models/smollm2/            what a load reads; it appears by one rename
    <cache>/models/.smollm2.lock       held by the process that prepares the model
    <cache>/models/.smollm2.work-...   what a process is working in; left behind only by a kill

A sealed folder holds `actlas-model.json`: which wheel it came from, and size, time stamp and SHA-256 of
each file. A load compares sizes and time stamps, which costs microseconds; where a time stamp differs
(a copied cache) the SHA-256 decides. What fails is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from actlas.core.artifact import atomic_write, inside
from actlas.core.errors import ArtifactError, FailureError
from actlas.core.progress import progress

SEAL = "actlas-model.json"
_FORMAT = 1
_POLL = 0.1
_DAY = 86_400.0
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Return the cache: `ACTLAS_CACHE`, or `actlas` in this platform's cache folder of the user."""
    chosen = os.environ.get("ACTLAS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "actlas"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "actlas" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "actlas"


def seal(folder: Path, origin: dict[str, Any]) -> None:
    """Write a folder's files to disk and describe them in its `actlas-model.json`.

    Args:
        folder: the folder, complete except for the seal.
        origin: where its content comes from; a load asks for exactly this.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        path.chmod(0o644)
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {**_stamp(path), "sha256": sha256_of(path)}
    _write_seal(folder, {"format": _FORMAT, "origin": origin, "files": files})


def fault(folder: Path, origin: dict[str, Any], *, thorough: bool = False) -> str | None:
    """Say in a few words why `folder` cannot be used, or return `None` if it can.

    Args:
        folder: a sealed folder, or none.
        origin: what it must come from.
        thorough: compare every SHA-256 even where size and time stamp agree.
    """
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if sealed["format"] != _FORMAT or sealed["origin"] != origin:
            return "it was made by another version"
        moved = False
        for name, known in sealed["files"].items():
            path = inside(folder, name)
            found = _stamp(path)
            if found["size"] != known["size"]:
                return f"{name} has {found['size']:,} bytes instead of {known['size']:,}"
            if thorough or found != {key: known[key] for key in found}:
                if sha256_of(path) != known["sha256"]:
                    return f"{name} does not match its checksum"
                moved = moved or found != {key: known[key] for key in found}
                known.update(found)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name if error.filename else 'a file'} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArtifactError) as error:
        return f"its description is unreadable ({error})"
    if moved:
        with suppress(FailureError):  # a read-only cache is checked by checksum each time
            _write_seal(folder, sealed)
    return None


@contextmanager
def locked(folder: Path, what: str) -> Iterator[bool]:
    """Hold the lock of one cache folder; wait, and say so, while another process holds it.

    The operating system releases the lock when its holder ends, however it ends. Yields whether the
    lock is real: some network file systems have none, and there only the final rename keeps order.
    """
    file = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+b")
    except OSError as error:
        raise cache_failure(folder, error) from error
    with handle:
        if (lock := _try_lock(handle)) == "taken":
            with progress(f"another process is preparing {what}, waiting for it", unit="checks") as advance:
                while (lock := _try_lock(handle)) == "taken":
                    advance()
                    time.sleep(_POLL)
        try:
            yield lock == "held"
        finally:
            if lock == "held":
                _unlock(handle)


@contextmanager
def workplace(folder: Path, alone: bool) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to work in; it, and what killed processes left, is removed.

    Args:
        folder: the cache folder that is being made.
        alone: whether the caller holds a real lock, so that whatever is found belongs to nobody;
            otherwise only what was left more than a day ago is removed.
    """
    for left in [*folder.parent.glob(f".{folder.name}.work-*"), *folder.parent.glob(f".{folder.name}.old-*")]:
        if alone or time.time() - left.stat().st_mtime > _DAY:
            shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.work-", dir=folder.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(made: Path, folder: Path) -> None:
    """Put a sealed folder in its place by one rename; an older one at that place is moved away first."""
    made.chmod(0o755)
    withdraw(folder)
    try:
        os.rename(made, folder)
    except OSError:
        if not (folder / SEAL).is_file():  # otherwise a process that this one could not lock out was first
            raise
    _sync(folder.parent)


def withdraw(folder: Path) -> None:
    """Remove a cache folder so that nobody sees a part of it."""
    if not folder.exists():
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    os.rename(folder, old / folder.name)
    shutil.rmtree(old, ignore_errors=True)


def cache_failure(folder: Path, error: OSError) -> FailureError:
    """Return the one line for a cache that cannot be written."""
    reason = error.strerror or str(error)
    return FailureError(
        f"cannot write {folder}: {reason}; free some space, or set ACTLAS_CACHE to a folder you can write to"
    )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def size_of(folder: Path) -> int:
    """Return how many bytes a folder's files take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _write_seal(folder: Path, content: dict[str, Any]) -> None:
    atomic_write(folder / SEAL, json.dumps(content, indent=1) + "\n")


def _sync(path: Path) -> None:
    """Make what was written survive a power failure; folders cannot be synced on Windows."""
    if path.is_dir() and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: IO[bytes]) -> str:
        handle.seek(0)
        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return "taken"
        return "held"

    def _unlock(handle: IO[bytes]) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import errno
    import fcntl

    def _try_lock(handle: IO[bytes]) -> str:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return "taken" if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else "impossible"
        return "held"

    def _unlock(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)
