"""A harvest that is killed at any moment goes on, to the same files as one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actlas.store import making
from tests.core.tiny import tiny

from .made import files_of, small

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("first", "stride"), [(3, 9), pytest.param(1, 1, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_sigkill_at_a_step(tmp_path: Path, first: int, stride: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.store.kill_and_go_on", str(tmp_path), str(first), str(stride)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills, steps, shards = map(int, done.stdout.split())
    assert shards == 3 and steps > 10 * shards and kills >= (steps - first) // stride >= 5


def test_an_interrupted_harvest_leaves_whole_shards_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    whole = files_of(small(tmp_path / "whole", model).path)
    replace, calls = os.replace, 0

    def interrupted(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        replace(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(making.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "acts", model)
    monkeypatch.undo()
    left = files_of(tmp_path / "acts")
    assert not [name for name in left if name.endswith(making.TEMPORARY)]
    small(tmp_path / "acts", model)
    assert files_of(tmp_path / "acts") == whole


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from actlas.core.errors import FailureError

    model = tiny()
    whole = files_of(small(tmp_path / "whole", model).path)
    write = making._Writer._write
    calls = 0

    def full(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(making._Writer, "_write", full)
    with pytest.raises(FailureError, match="the disk is full; free some space and run it again"):
        small(tmp_path / "acts", model)
    monkeypatch.undo()
    small(tmp_path / "acts", model)
    assert files_of(tmp_path / "acts") == whole
