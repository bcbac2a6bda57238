"""`actlas harvest`: a store in one command, its JSON, and what is refused."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Said, command, environment

Run = Callable[..., Said]
SITE = "blocks.1.resid_post"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(
        "\n\n".join(f"{k} " + "the cat sat on the mat. and the dog ran. " * 20 for k in range(20))
    )
    return file


def test_harvest_and_again(actlas: Run, tiny: str, book: Path, tmp_path: Path) -> None:
    from actlas.models import load
    from actlas.store import Store

    out = tmp_path / "acts"
    given = ("harvest", tiny, book, "--site", f"{SITE},blocks.0.attn.z", "-o", out, "--rows", 500)
    said = actlas(*given, "--dtype", "int8", "--shard-rows", 128)
    assert said.status == 0 and said.err == "" and "500 rows (none massive) of book.txt, int8" in said.out
    store = Store(out, load(tiny))
    assert store.rows == 500 and store.sites == [SITE, "blocks.0.attn.z"] and store.dtype == "int8"
    again = actlas(*given, "--dtype", "int8", "--json").json
    assert again["rows"] == 500 and again["repaired"] == [] and again["shards"] == len(store.shards) >= 4
    (out / "shards" / "00001.safetensors").write_bytes(b"")
    assert "shard 00001" in actlas(*given, "--dtype", "int8").failed()
    assert actlas(*given, "--dtype", "int8", "--repair", "--json").json["repaired"] == ["00001"]
    assert store.verify() == {}


def test_a_command_that_is_killed_goes_on(actlas: Run, tiny: str, book: Path, tmp_path: Path) -> None:
    from actlas.store import Store

    def given(name: str) -> list[object]:
        return ["harvest", tiny, book, "--site", SITE, "-o", tmp_path / name, "--shard-rows", 64]

    assert actlas(*given("whole")).status == 0
    running = subprocess.Popen(
        command(*given("acts"), "--batch-tokens", "16"), env=environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "acts" / "shards" / "00002.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not Store(tmp_path / "acts").complete
    assert actlas(*given("acts"), "--batch-tokens", 16).status == 0
    found, whole = Store(tmp_path / "acts"), Store(tmp_path / "whole")
    assert found.complete and found.tokens.equals(whole.tokens)
    import torch

    torch.testing.assert_close(
        found.read(SITE, slice(None)), whole.read(SITE, slice(None)), atol=1e-2, rtol=1e-2
    )


def test_bad_input_ends_with_one_line(actlas: Run, tiny: str, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for arguments, said in (
        (("harvest", tiny, book, "--site", "blocks.1.resid_pots", "-o", out), "resid_post"),
        (("harvest", tiny, book, "--site", SITE, "-o", out, "--dtype", "int4"), "dtype is 'int4'"),
        (("harvest", tiny, book, "--site", SITE, "-o", book), "is not a store"),
        (("harvest", tiny, empty, "--site", SITE, "-o", out), "empty"),
        (("harvest", tiny, "prosa", "--site", SITE, "-o", out), "did you mean prose"),
        (("harvest", tiny, book, "--site", SITE, "-o", out, "--repair"), "does not exist"),
        (("harvest", tiny, book, "-o", out), "--site"),
    ):
        assert said in actlas(*arguments).failed()
    assert not out.exists() or not any(p.suffix == ".json" for p in out.iterdir())
