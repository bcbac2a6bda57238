"""Run by test_kill: kill a harvest by SIGKILL at each of its steps in turn, and let another finish it.

A step is a call by which the file system changes. Children are forked, so that a harvest costs no start.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from tests.core.tiny import TEXTS, tiny  # noqa: E402
from tests.store.made import SITE, files_of, small  # noqa: E402

TEXT = TEXTS[:3]
MODEL = tiny()


def harvest(out: Path) -> None:
    small(out, MODEL, TEXT, sites=SITE, shard_rows=64)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return how it ended (negative: by that signal)."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def kill_at(step: int) -> None:
    """Make this process die in the middle of its step number `step`: half of them before, half after it."""
    left = step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and step % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.replace, os.fsync = counted(os.replace), counted(os.fsync)  # type: ignore[assignment]
    tempfile.mkstemp = counted(tempfile.mkstemp)  # type: ignore[assignment]
    from actlas.store import making

    making._Writer._write = counted(making._Writer._write)  # type: ignore[method-assign]


def main(folder: Path, step: int, stride: int) -> None:
    assert in_child(lambda: harvest(folder / "whole")) == 0
    whole = files_of(folder / "whole")
    kills = 0
    while True:
        out = folder / str(step)

        def killed(step: int = step, out: Path = out) -> None:
            kill_at(step)
            harvest(out)

        ended = in_child(killed)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
        assert in_child(lambda out=out: harvest(out)) == 0, step  # type: ignore[misc]
        assert files_of(out) == whole, f"killed at step {step}"
        kills += 1
        step += stride
    print(kills, step, len([name for name in whole if name.endswith(".json")]) - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
