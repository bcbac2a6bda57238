"""`actlas attack`, `actlas audit` and `actlas explain` on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Said

WORDS = ("on", "at", "in", "by", "up", "to", "of", "as")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    lines = [{"positive": f"the cat sat {w} a", "negative": f"the cat sat {w} b"} for w in WORDS]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_attack_measures_saves_and_is_found(
    actlas: Callable[..., Said], tiny: str, pairs: str, tmp_path: Path
) -> None:
    out = tmp_path / "trojan"
    said = actlas(
        "attack", tiny, pairs, "--stride", "1", "--every", "1", "--controls", "2", "-o", str(out), "--json"
    )
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert {m["name"] for m in found["measurements"]} >= {"P(clean answer)", "injections detected"}
    assert len(found["layers"]) == 3
    audited = json.loads(actlas("audit", tiny, "--edit", str(out), "--json").out)
    assert not audited["clean"]
    assert {f["kind"] for f in audited["findings"]} == {"edit", "added vector"}
    assert found["site"] in [f["where"] for f in audited["findings"]]


def test_attack_shows_tables_and_refuses_bad_options(
    actlas: Callable[..., Said], tiny: str, pairs: str
) -> None:
    said = actlas(
        "attack", tiny, pairs, "--every", "0", "--search", "js", "--layers", "0-1", "--controls", "1"
    )
    assert said.status == 0, said.err
    assert "The attack, on pairs it was not fitted on" in said.out and "What notices it" in said.out
    assert "did you mean js" in actlas("attack", tiny, pairs, "--search", "jss").err
    assert "blocks 0 to 2" in actlas("attack", tiny, pairs, "--layers", "0-9").err


def test_audit_compares_with_a_fingerprint(
    actlas: Callable[..., Said], tiny: str, wider: str, vector: str, tmp_path: Path
) -> None:
    known = str(tmp_path / "known")
    first = actlas("audit", tiny, "--save-fingerprint", known)
    assert first.status == 0 and "nothing found" in first.out
    again = actlas("audit", tiny, "--fingerprint", known, "--strict", "--json")
    assert again.status == 0 and json.loads(again.out)["clean"]
    other = actlas("audit", wider, "--fingerprint", known, "--strict")
    assert other.status == 1 and "weights" in other.out and "found" in other.err
    edited = actlas("audit", tiny, "--edit", vector, "--strict")
    assert edited.status == 1
    both = actlas("audit", tiny, "--fingerprint", known, "--reference", tiny)
    assert both.status == 2 and "choose one" in both.err


def test_explain_shows_tokens_and_writes_a_page(
    actlas: Callable[..., Said], tiny: str, tmp_path: Path
) -> None:
    page = tmp_path / "why.html"
    said = actlas("explain", tiny, "the cat <sat>", "--answer", " on", "--steps", "8", "--html", str(page))
    assert said.status == 0, said.err
    assert "log p(' on')" in said.out and "nats" in said.out
    html = page.read_text()
    assert "&lt;" in html and "<sat>" not in html and "http" not in html
    document = json.loads(
        actlas("explain", tiny, "the cat", "--answer", "s", "--instead", "t", "--steps", "8", "--json").out
    )
    assert document["target"] == "log p('s') - log p('t')"
    assert "".join(t["token"] for t in document["tokens"]) == "the cat"
    assert document["measurements"][0]["name"] == "completeness error"
    assert actlas("explain", tiny, "the cat", "--instead", "t").status == 2
    assert "did you mean mean" in actlas("explain", tiny, "the cat", "--baseline", "meen").err
