"""Artifacts: folders of safetensors and JSON that are whole or absent, and never executed.

An artifact is a folder with `manifest.json` (what it is, for which model, checksums of its files)
and, where it has tensors, `tensors.safetensors`. It is written to a temporary sibling and renamed,
so a killed process or a full disk leaves the old artifact, or none. Loading checks names, sizes and
SHA-256 before any tensor is made.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from actlas.core.errors import ArtifactError, FailureError, InputError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"


@contextmanager
def _plain_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn operating-system errors into one line that says what to do."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full; free some space and run it again",
            errno.EDQUOT: "the disk quota is used up; free some space and run it again",
            errno.EACCES: "permission denied; choose a folder you can write to",
            errno.EROFS: "the file system is read-only; choose another folder",
        }.get(error.errno or 0, error.strerror or str(error))
        raise FailureError(f"cannot {doing} {path}: {reason}") from error


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that readers see the old content or the new, never a part.

    Args:
        path: the file; its folder is made if needed.
        content: text (UTF-8) or bytes.

    Raises:
        FailureError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with _plain_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return path


def write_folder(path: str | Path, files: Mapping[str, str | bytes], marker: str = MANIFEST) -> Path:
    """Write a whole folder at once: all of its files are there afterwards, or nothing changed.

    Args:
        path: the folder. If it exists it must be empty or hold `marker` (an artifact of ours, which
            is replaced); anything else is refused, so that nobody's files are lost.
        files: content by relative name.
        marker: the file that tells an artifact from somebody's folder.

    Raises:
        InputError: `path` exists and is not an artifact.
        FailureError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists())):
        raise InputError(f"{path} exists and is not an Actlas artifact; give another name or remove it")
    with _plain_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            os.chmod(temporary, 0o755)
            for name, content in files.items():
                atomic_write(temporary / name, content)
            _swap_in(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return path


def _swap_in(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    previous = old / "previous"
    try:
        os.rename(path, previous)
        os.rename(temporary, path)
    except BaseException:  # also Ctrl-C between the two: the old one goes back
        if previous.exists() and not path.exists():
            os.rename(previous, path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def save_artifact(
    path: str | Path,
    kind: str,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a manifest and tensors as one artifact folder.

    Args:
        path: the folder to write.
        kind: what it is: `"edit"`, `"lens"`, `"calibration"`, ...
        manifest: JSON-able description; `kind`, `format` and checksums are added.
        tensors: tensors of any dtype; they are copied to the CPU and made contiguous.

    Raises:
        InputError: `path` is somebody else's folder, or the manifest is not JSON-able.
        FailureError: it could not be written.
    """
    from safetensors.torch import save

    files: dict[str, str | bytes] = {}
    if tensors:
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        files[TENSORS] = save(plain)
    sums = {name: _sha256(data) for name, data in files.items()}
    whole = {"kind": kind, "format": FORMAT, **manifest, "files": sums}
    try:
        files[MANIFEST] = json.dumps(whole, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"cannot save {kind} to {path}: its description is not plain data ({error})"
        ) from error
    return write_folder(path, files)


def load_artifact(path: str | Path, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load an artifact folder as data, after checking that it is whole and untampered.

    Args:
        path: the folder.
        kind: what it must be; `None` accepts any kind.

    Returns:
        The manifest and the tensors by name.

    Raises:
        ArtifactError: missing, truncated or changed files, names that leave the folder, another kind,
            or a format that is newer than this version of Actlas.
    """
    from safetensors.torch import load

    path = Path(path)
    manifest = _read_manifest(path)
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(f"{path} holds a {manifest['kind']}, not a {kind}")
    tensors: dict[str, Tensor] = {}
    for name, expected in manifest["files"].items():
        file = inside(path, name)
        if not file.is_file():
            raise ArtifactError(f"{path} is incomplete: {name} is missing; save or copy it again")
        data = file.read_bytes()
        if _sha256(data) != expected:
            raise ArtifactError(
                f"{file} does not match its checksum (truncated or changed); save or copy it again"
            )
        if name == TENSORS:
            try:
                tensors = load(data)
            except Exception as error:
                raise ArtifactError(f"{file} is not a safetensors file: {error}") from error
    return manifest, tensors


def inside(folder: Path, name: str) -> Path:
    """Return `folder/name`, refusing a name that would leave the folder.

    Raises:
        ArtifactError: absolute names, `..`, drive letters and links that point elsewhere.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not name:
        raise ArtifactError(f"{folder} names the file {name!r}, which is outside its folder; it was refused")
    whole = folder / name
    if not whole.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{whole} is a link to a place outside {folder}; it was refused")
    return whole


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; give the folder of a saved artifact")
    file = path / MANIFEST
    if not path.is_dir() or not file.is_file():
        raise ArtifactError(f"{path} is not an Actlas artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(
            f"{file} is not readable JSON ({error}); save or copy the artifact again"
        ) from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not isinstance(manifest.get("kind"), str):
        raise ArtifactError(f"{file} lacks the fields 'kind' and 'files'; it is not an Actlas artifact")
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest.get('format')}; this Actlas reads up to {FORMAT}: upgrade it"
        )
    checked: dict[str, Any] = manifest
    return checked


def _sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()
