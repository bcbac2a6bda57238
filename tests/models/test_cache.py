"""The cache: what a load accepts, what it makes again, and who may write."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from actlas.core.errors import FailureError
from actlas.models import cache

ORIGIN = {"wheel": "tiny-model", "version": "1.0", "sha256": "0" * 64, "recipe": 1}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "deep" / "config").write_bytes(b"{}")
    cache.seal(folder, ORIGIN)
    return folder


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("ACTLAS_CACHE", raising=False)
    assert cache.cache_folder() == tmp_path / "actlas"
    monkeypatch.setenv("ACTLAS_CACHE", str(tmp_path / "mine"))
    assert cache.cache_folder() == tmp_path / "mine"


def test_a_sealed_folder_is_accepted_for_its_origin_only(sealed: Path) -> None:
    assert cache.fault(sealed, ORIGIN) is None
    assert cache.fault(sealed, ORIGIN, thorough=True) is None
    assert "another version" in str(cache.fault(sealed, {**ORIGIN, "recipe": 2}))


def test_what_is_missing_shorter_or_changed_is_a_fault(sealed: Path) -> None:
    (sealed / "weights").write_bytes(b"1234")
    assert "4 bytes instead of 5" in str(cache.fault(sealed, ORIGIN))
    (sealed / "weights").write_bytes(b"12346")
    assert "checksum" in str(cache.fault(sealed, ORIGIN))
    (sealed / "deep" / "config").unlink()
    (sealed / "weights").write_bytes(b"12345")
    assert "missing" in str(cache.fault(sealed, ORIGIN))
    assert "missing" in str(cache.fault(sealed.parent / "nothing", ORIGIN))


def test_a_change_that_hides_its_time_is_found_by_the_thorough_check(sealed: Path) -> None:
    weights = sealed / "weights"
    before = weights.stat()
    weights.write_bytes(b"54321")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.fault(sealed, ORIGIN) is None
    assert "checksum" in str(cache.fault(sealed, ORIGIN, thorough=True))


def test_a_copied_cache_is_checked_once_and_then_accepted_at_once(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(sealed / "weights", ns=(1, 1))
    assert cache.fault(sealed, ORIGIN) is None
    monkeypatch.setattr(cache, "sha256_of", lambda path: pytest.fail(f"{path} was read again"))
    assert cache.fault(sealed, ORIGIN) is None


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_seal_cannot_name_files_outside_its_folder(sealed: Path, name: str) -> None:
    seal = json.loads((sealed / cache.SEAL).read_text())
    seal["files"][name] = {"size": 1, "mtime_ns": 1, "sha256": "0"}
    (sealed / cache.SEAL).write_text(json.dumps(seal))
    assert "outside" in str(cache.fault(sealed, ORIGIN))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "origin": {}, "files": 3}'])
def test_an_unreadable_seal_is_a_fault_and_no_crash(sealed: Path, text: str) -> None:
    (sealed / cache.SEAL).write_text(text)
    assert cache.fault(sealed, ORIGIN) is not None


def test_one_holder_of_the_lock_at_a_time_and_the_other_says_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, order = [], []
    real = cache.progress
    monkeypatch.setattr(cache, "progress", lambda what, **rest: said.append(what) or real(what, **rest))
    held, release = threading.Event(), threading.Event()

    def first() -> None:
        with cache.locked(tmp_path / "tiny", "tiny") as alone:
            order.append(("first", alone))
            held.set()
            release.wait(10)
            order.append(("first ends", True))

    def second() -> None:
        with cache.locked(tmp_path / "tiny", "tiny") as alone:
            order.append(("second", alone))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert held.wait(10)
    threads[1].start()
    while not said:
        threads[1].join(0.01)
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == [("first", True), ("first ends", True), ("second", True)]
    assert said == ["another process is preparing tiny, waiting for it"]


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(FailureError, match="ACTLAS_CACHE") as caught,
        cache.locked(tmp_path / "file" / "x", "x"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_without_real_locks_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    new, old = tmp_path / ".tiny.work-new", tmp_path / ".tiny.work-old"
    new.mkdir()
    old.mkdir()
    os.utime(old, (1, 1))
    with cache.workplace(folder, alone=False):
        assert new.exists() and not old.exists()
    with cache.workplace(folder, alone=True) as work:
        assert not new.exists() and work.is_dir()
    assert not work.exists()
