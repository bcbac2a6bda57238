"""A damaged shard is found, named, and made again alone, with the same content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actlas.core.errors import ArtifactError, FingerprintError, InputError
from actlas.store import Store, repair
from tests.core.tiny import tiny

from .made import CORPUS, SITE, files_of, small


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _lie(path: Path) -> None:
    """Claim a far larger tensor in a header of the same length."""
    data = path.read_bytes()
    at = data.index(b'"shape":[') + 9
    path.write_bytes(data[:at] + b"9" + data[at + 1 :])


def _remove(path: Path) -> None:
    path.unlink()


def _garble(path: Path) -> None:
    path.write_text("{")


DAMAGES = [
    ("safetensors", _flip, "does not match its checksum", False),
    ("safetensors", _cut, "bytes instead of", True),
    ("safetensors", _lie, "does not match its checksum", True),
    ("safetensors", _remove, "is missing", True),
    ("parquet", _flip, "does not match its checksum", False),
    ("parquet", _cut, "bytes instead of", True),
]


@pytest.mark.parametrize(("kind", "damage", "said", "seen_when_read"), DAMAGES)
def test_a_damaged_shard_is_named_and_made_again(
    tmp_path: Path, kind: str, damage: Callable[[Path], None], said: str, seen_when_read: bool
) -> None:
    model = tiny()
    store = small(tmp_path / "acts", model)
    whole = files_of(store.path)
    damage(store.path / "shards" / f"00002.{kind}")
    if seen_when_read:
        with pytest.raises(ArtifactError, match="shard 00002 of .* is damaged.*--repair") as failed:
            Store(store.path).read(SITE, 0)
        assert "\n" not in str(failed.value)
    damaged = Store(store.path)
    found = damaged.verify()
    assert list(found) == ["00002"] and said in found["00002"]
    damaged.remake("00002", model, CORPUS)
    assert files_of(store.path) == whole and damaged.verify() == {}
    assert len(damaged.read(SITE, slice(None))) == store.rows


@pytest.mark.parametrize("damage", [_garble, _remove])
@pytest.mark.parametrize("shard", [0, 1, -1])
def test_a_lost_record_is_named_and_made_again(
    tmp_path: Path, damage: Callable[[Path], None], shard: int
) -> None:
    model = tiny()
    store = small(tmp_path / "acts", model)
    whole = files_of(store.path)
    name = store.shards[shard]
    damage(store.path / "shards" / f"{name}.json")
    with pytest.raises(ArtifactError, match=f"shard {name} of .* is damaged"):
        Store(store.path)
    assert repair(store.path, model, CORPUS) == [name]
    assert files_of(store.path) == whole and repair(store.path, model, CORPUS) == []


def test_a_harvest_that_finds_damage_names_it(tmp_path: Path) -> None:
    model = tiny()
    store = small(tmp_path / "acts", model)
    _cut(store.path / "shards" / "00001.safetensors")
    with pytest.raises(ArtifactError, match="shard 00001 of .* is damaged"):
        small(tmp_path / "acts", model)


def test_a_shard_is_made_again_only_from_what_it_was_made_from(tmp_path: Path) -> None:
    store = small(tmp_path / "acts")
    before = files_of(store.path)
    with pytest.raises(InputError, match="made from another text"):
        store.remake(3, tiny(), ["other", *CORPUS])
    with pytest.raises(InputError, match="has no shard 00077"):
        store.remake(77, tiny(), CORPUS)
    with pytest.raises(FingerprintError, match="another model"):
        store.remake(3, tiny("gpt2"), CORPUS)
    assert files_of(store.path) == before


def test_a_manifest_is_data_that_is_checked(tmp_path: Path) -> None:
    store = small(tmp_path / "acts")
    path = store.path / "manifest.json"
    good = json.loads(path.read_text())
    for change, said in (
        ({"kind": "lens"}, "holds a lens, not a store"),
        ({"format": 99}, "format 99"),
        ({"dtype": "fp8"}, "unreadable manifest|dtype"),
        ({"channels": None}, "unreadable manifest"),
        ({"channels": {SITE: 31}}, "is damaged"),
        ({"fingerprint": {}}, "fingerprint"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=said):
            Store(store.path).read(SITE, 0)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="not readable JSON"):
        Store(store.path)
