"""Bad input ends with one line and status 2; nothing is half written, nothing stays installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import CONTEXT, Said, command, environment, spawn

Run = Callable[..., Said]


def test_unknown_model(actlas: Run, tmp_path: Path) -> None:
    for name in ("smollm3", str(tmp_path / "nothing"), str(tmp_path), ""):
        for arguments in (
            ["sites", name],
            ["generate", name, "hello"],
            ["card", name, "--out", tmp_path / "c"],
        ):
            actlas(*arguments).failed()
    assert "smollm2" in actlas("sites", "smollm3").failed()
    assert not (tmp_path / "c").exists()


def test_unknown_site(actlas: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat sat " * 40)
    for arguments in (
        ["sites", tiny, "blocks.1.resid_pst"],
        ["trace", tiny, "the", "--sites", "blocks.1.resid_pst"],
        ["calibrate", tiny, tmp_path / "t.txt", "--site", "blocks.1.resid_pst", "-o", tmp_path / "c"],
        ["fit", "pca", tiny, tmp_path / "t.txt", "--site", "blocks.1.resid_pst", "-o", tmp_path / "c"],
    ):
        assert "blocks.1.resid_post" in actlas(*arguments).failed()
    assert "blocks" in actlas("sites", tiny, "blocks.9.resid_post").failed()
    assert "not gated" in actlas("trace", tiny, "the", "--sites", "blocks.1.mlp.gate").failed()
    assert not (tmp_path / "c").exists()


def test_edit_for_another_model(actlas: Run, wider: str, vector: str) -> None:
    for arguments in (
        ["generate", wider, "the"],
        ["trace", wider, "the"],
        ["measure", wider, "parameters"],
    ):
        assert "made for another model" in actlas(*arguments, "--edit", vector).failed()


def test_artifacts_that_are_not_whole(actlas: Run, tiny: str, vector: str, tmp_path: Path) -> None:
    folder = Path(vector)
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = (folder / "tensors.safetensors").read_bytes()

    def said() -> str:
        return actlas("generate", tiny, "the", "--edit", vector).failed()

    (folder / "tensors.safetensors").write_bytes(tensors[:-5])
    assert "does not match its checksum" in said()
    (folder / "tensors.safetensors").write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
    assert "does not match its checksum" in said()
    (folder / "tensors.safetensors").unlink()
    assert "tensors.safetensors is missing" in said()
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(tensors)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {"../secret.safetensors": "0"}}))
    assert "outside its folder" in said()
    (folder / "manifest.json").write_text(json.dumps(manifest)[:-20])
    assert "not readable JSON" in said()
    (folder / "manifest.json").unlink()
    assert "not an Actlas artifact" in said()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("missing", "does not exist"),
        ("vec*much", "strength 'much' is not a number"),
        ("vec*nan", "finite"),
        ("vec*inf", "finite"),
        ("*4", "names no path"),
        ("vec#one*4", "feature 'one' is not a number"),
        ("vec#1*4", "has no features"),
    ],
)
def test_unreadable_edits(
    actlas: Run, tiny: str, vector: str, monkeypatch: pytest.MonkeyPatch, edit: str, said: str
) -> None:
    monkeypatch.chdir(Path(vector).parent)
    assert said in actlas("generate", tiny, "the", "--edit", edit).failed()


@pytest.mark.parametrize("prompt", ["", "   "])
@pytest.mark.parametrize("name", ["trace", "generate"])
def test_empty_prompt(actlas: Run, tiny: str, name: str, prompt: str) -> None:
    assert "prompt is empty" in actlas(name, tiny, prompt).failed()


def test_prompt_longer_than_the_context(actlas: Run, tiny: str) -> None:
    long = "the cat " * CONTEXT
    for arguments in (["trace", tiny, long], ["generate", tiny, long]):
        assert str(CONTEXT) in actlas(*arguments).failed()
    said = actlas("generate", tiny, "the", "--max-new-tokens", CONTEXT).failed()
    assert str(CONTEXT) in said


def test_text_that_is_not_utf8(actlas: Run, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\u00e9 ".encode("latin-1") * 50)
    target = tmp_path / "c"
    for arguments in (
        ["calibrate", tiny, file, "--site", "blocks.0.resid_post", "-o", target],
        ["fit", "pca", tiny, file, "--site", "blocks.0.resid_post", "-o", target],
        ["measure", tiny, "perplexity", "--data", file],
    ):
        assert "byte 0xe9 at offset 3" in actlas(*arguments).failed()
    file.write_text("")
    assert "is empty" in actlas("measure", tiny, "perplexity", "--data", file).failed()
    assert not target.exists()


def test_unknown_method_measure_option_and_section(actlas: Run, tiny: str, tmp_path: Path) -> None:
    assert "did you mean probe" in actlas("fit", "prob", tiny, "sentiment").failed()
    assert "did you mean perplexity" in actlas("measure", tiny, "perplexty").failed()
    assert "name a model" in actlas("measure").failed()
    site = ["--site", "blocks.0.resid_post", "-o", tmp_path / "o"]
    assert "KEY=VALUE" in actlas("fit", "probe", tiny, "sentiment", *site, "--option", "method").failed()
    assert (
        "did you mean method"
        in actlas("fit", "probe", tiny, "sentiment", *site, "--option", "metod=x").failed()
    )
    assert "fitted at a site" in actlas("fit", "probe", tiny, "sentiment", "-o", tmp_path / "o").failed()
    assert "needs data" in actlas("fit", "probe", tiny, *site).failed()
    assert "no section" in actlas("card", tiny, "--out", tmp_path / "o", "--sections", "secton").failed()
    assert "statistic" in actlas("calibrate", tiny, "prose", *site, "--stats", "momnts").failed()
    assert not (tmp_path / "o").exists()


def test_nobodys_folder_is_overwritten(actlas: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the cat sat on the mat")
    file = tmp_path / "file"
    file.write_text("x")
    for target in (tmp_path / "mine", file):
        for arguments in (
            ["calibrate", tiny, "prose", "--site", "embed", "-o", target],
            ["fit", "pca", tiny, "prose", "--site", "embed", "-o", target],
            ["trace", tiny, "the", "--save", target],
            ["card", tiny, "--out", target],
        ):
            actlas(*arguments).failed()
    assert "is a folder" in actlas("trace", tiny, "the", "--html", tmp_path / "mine").failed()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_bug_is_one_line_with_status_1_and_a_traceback_only_with_debug(
    actlas: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import actlas.models as room

    def broken(name: str) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(room, "load", broken)
    assert "RuntimeError: two lines (run it again with --debug" in actlas("sites", "x").failed(1)
    said = actlas("sites", "x", "--debug")
    assert (
        said.status == 1
        and "Traceback" in said.err
        and said.err.endswith("actlas: error: RuntimeError: two lines\n")
    )
    monkeypatch.setattr(room, "load", lambda name: (_ for _ in ()).throw(MemoryError()))
    assert "more memory" in actlas("sites", "x").failed(1)


def test_full_disk_is_a_failure(
    actlas: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    file = tmp_path / "out" / "lens.html"
    said = actlas("trace", tiny, "the", "--html", file)
    assert said.status == 1 and "the disk is full" in said.err and said.err.count("\n") == 1
    assert list(file.parent.iterdir()) == []


def listens_to_interrupts() -> None:
    """Give a child the usual Ctrl-C: a shell's background job, as on a CI machine, hands down a deaf one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(process: subprocess.Popen[str], ready: Callable[[], bool]) -> Said:
    """Send Ctrl-C as soon as the process is ready, and return how it ended."""
    end = time.monotonic() + 90
    while not ready():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return Said(process.returncode, out, err)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Windows differ")
def test_ctrl_c_leaves_one_line_and_no_half_written_output(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    book = tmp_path / "in" / "book.txt"
    book.write_text("\n\n".join(f"{k} the cat sat on the mat and the dog ran" for k in range(60_000)))
    log = (tmp_path / "in" / "log").open("w+")
    target = tmp_path / "out" / "cal"
    target.parent.mkdir()
    arguments = ["calibrate", tiny, book, "--site", "blocks.*.mlp.act", "--batch-tokens", "64", "-o", target]
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment(ACTLAS_PROGRESS="1"),
        preexec_fn=listens_to_interrupts,
    )
    said = interrupted(process, lambda: bool(Path(log.name).read_text()))  # the first line of progress
    assert said.status == 130 and said.out == ""
    lines = Path(log.name).read_text().splitlines()
    assert lines[-1] == "actlas: interrupted; nothing was left half written"
    assert all("Traceback" not in line for line in lines)
    assert list(target.parent.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Windows differ")
def test_ctrl_c_during_a_card(tmp_path: Path) -> None:
    flag, target = tmp_path / "flag", tmp_path / "out" / "card"
    target.parent.mkdir()
    code = (
        "import pathlib, sys, time, actlas.models as room\n"
        "room.load = lambda name: (pathlib.Path(sys.argv.pop()).touch(), time.sleep(60))\n"
        "from actlas.cli.main import main\n"
        "sys.exit(main(sys.argv[1:-1]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "card", "--out", str(target), str(flag)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=listens_to_interrupts,
    )  # fmt: skip
    said = interrupted(process, flag.exists)
    assert said.status == 130 and said.out == ""
    assert said.err == "actlas: interrupted; nothing was left half written\n"
    assert list(target.parent.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of POSIX")
def test_a_reader_that_stops_early_is_no_error() -> None:
    process = subprocess.Popen(
        command("papers", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=listens_to_interrupts,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.wait(60)
    assert said == "" and process.returncode == 141


def test_a_process_of_its_own_ends_with_the_status_and_the_line(tiny: str) -> None:
    assert "smollm3" in spawn("sites", "smollm3").failed()
    assert "prompt is empty" in spawn("generate", tiny, "").failed()
    done = spawn("sites", tiny, "embed", "--json")
    assert done.status == 0 and done.err == "" and done.json["sites"][0]["name"] == "embed"
