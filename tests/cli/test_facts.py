"""Facts and questions on the command line: fit, measure, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FACTS = [
    {
        "prompt": "the cat sat on",
        "target": " fog",
        "locality": ["the dog ran"],
        "paraphrases": ["a cat sat on"],
    },
    {"prompt": "the house", "target": " ran", "locality": ["and the mat"]},
]


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write(tmp_path / "edits.jsonl", FACTS)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_facts_are_written_saved_and_measured(actlas, tiny: str, facts: Path, tmp_path: Path) -> None:
    out = tmp_path / "memory"
    options = ("--site", "blocks.1.mlp.out", "--steps", 5, "--contexts", 1, "--json")
    made = actlas("fit", "wise", tiny, facts, "--shards", 2, *options, "-o", out).json
    assert made["saved"] == str(out) and "DualMemory at blocks.1.mlp.act" in made["about"]
    names = ["reliability", "target-nll", "generality", "locality", "locality-kl"]
    assert [m["name"] for m in made["measurements"]] == names
    found = actlas("measure", tiny, "editing", "--data", facts, "--edit", out, "--json").json
    rows = [r for r in found["comparison"]["rows"] if r["measurement"]["name"] == "target-nll"]
    assert [r["variant"] for r in rows] == ["base", "edited"] and rows[1]["measurement"]["n"] == 2
    said = actlas("generate", tiny, "the cat sat on", "--edit", out, "--json", "--max-new-tokens", 3)
    assert said.status == 0


def test_two_tunings_are_merged(actlas, tiny: str, facts: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        options = ("--last-layers", 1, "--epochs", 1, "--lr", "1e-3", "--seed", seed, "--json")
        assert actlas("fit", "behaviour-tune", tiny, facts, *options, "-o", tmp_path / name).status == 0
    sources = json.dumps([str(tmp_path / "a"), str(tmp_path / "b")])
    merged = actlas(
        "fit", "merge", tiny, "--sources", sources, "--density", 0.5, "-o", tmp_path / "m", "--json"
    )
    assert "ties of 2, density 0.5" in merged.json["about"]


def test_questions_of_ones_own_are_asked(actlas, tiny: str, tmp_path: Path) -> None:
    asked = [{"question": "cat", "options": ["the mat", "a dog"], "kind": k} for k in ("self", "control")]
    file = write(tmp_path / "q.jsonl", asked)
    found = actlas("measure", tiny, "self-report", "--data", file, "--json").json["measurements"]
    assert [m["name"] for m in found][:2] == ["self-report", "self-report-control"]


def test_a_bad_file_is_one_line(actlas, tiny: str, tmp_path: Path) -> None:
    assert "is no file" in actlas("fit", "wise", tiny, tmp_path / "none.jsonl").failed()
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    assert "line 1: an edit request needs a target" in actlas("fit", "rome", tiny, bad).failed()
    assert "JSONL with prompt and target" in actlas("fit", "wise", tiny).failed()
    assert "give them, e.g. --data" in actlas("measure", tiny, "editing").failed()
