"""Artifacts are whole or absent, and never lose what was there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from actlas.core import artifact
from actlas.core.artifact import atomic_write, load_artifact, save_artifact, write_folder
from actlas.core.errors import ArtifactError, FailureError, InputError


def full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "t": torch.eye(3).T,
    }
    save_artifact(tmp_path / "x", "thing", {"n": 3}, tensors)
    manifest, again = load_artifact(tmp_path / "x", "thing")
    assert manifest["n"] == 3
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())
    with pytest.raises(ArtifactError, match="holds a thing, not a lens"):
        load_artifact(tmp_path / "x", "lens")


def test_a_full_disk_keeps_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_artifact(tmp_path / "x", "thing", {"n": 1}, {"a": torch.ones(3)})
    atomic_write(tmp_path / "f.txt", "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FailureError, match="the disk is full; free some space"):
        save_artifact(tmp_path / "x", "thing", {"n": 2}, {"a": torch.zeros(3)})
    with pytest.raises(FailureError, match="disk is full"):
        atomic_write(tmp_path / "f.txt", "new")
    manifest, tensors = load_artifact(tmp_path / "x")
    assert manifest["n"] == 1 and float(tensors["a"].sum()) == 3
    assert (tmp_path / "f.txt").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.txt", "x"]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(OSError(errno.EIO, "error"), FailureError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failed_swap_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, seen: type[BaseException]
) -> None:
    save_artifact(tmp_path / "x", "thing", {"n": 1})
    real, calls = os.rename, []

    def rename(a: object, b: object) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise raised
        real(a, b)  # type: ignore[arg-type]

    monkeypatch.setattr(artifact.os, "rename", rename)
    with pytest.raises(seen):
        save_artifact(tmp_path / "x", "thing", {"n": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert load_artifact(tmp_path / "x")[0]["n"] == 1


@pytest.mark.parametrize("name", ["../out.txt", "/etc/passwd", "a/../../out", "C:\\x", ""])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="outside its folder"):
        artifact.inside(tmp_path, name)


def test_links_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ArtifactError, match="link"):
        artifact.inside(tmp_path / "a", "link")


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not an Actlas artifact"):
        write_folder(tmp_path / "x", {"a": "b"})
    with pytest.raises(InputError, match="not plain data"):
        save_artifact(tmp_path / "y", "thing", {"f": object()})
    assert not (tmp_path / "y").exists()


def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    code = (
        "import sys; from actlas.core.artifact import write_folder\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    write_folder(sys.argv[1], {'manifest.json': str(n) * 1000, 'b': str(n) * 1000})\n"
    )
    target = tmp_path / "x"
    for pause in (0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code, str(target)])
        for _ in range(200):
            if target.exists():
                break
            time.sleep(0.05)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            assert (target / "manifest.json").read_text() == (target / "b").read_text()
