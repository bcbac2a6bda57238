"""The numbers of docs/shrink.md are those of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import shrink_page


def test_the_page_is_what_the_stored_results_say() -> None:
    text = shrink_page.PAGE.read_text(encoding="utf-8")
    assert shrink_page.render(text) == text, "run python -m bench.shrink_page"


def test_tables_come_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink_page, "RESULTS", tmp_path)
    empty = "<!-- decode -->\nold 99.9\n<!-- end -->\nkept\n<!-- frontier -->\n<!-- end -->\n"
    nothing = shrink_page.render(empty)
    assert "Not measured yet" in nothing and "99.9" not in nothing and "\nkept\n" in nothing
    assert shrink_page.render(nothing) == nothing
    environment = {"processor": "P", "threads": 2, "versions": {"torch": "1", "transformers": "2"}}
    head = {"environment": environment, "command": "c", "when": "2026-01-02T03", "title": "T"}
    figure = {"unit": "tokens/s", "note": "", "most": None, "verdict": ""}
    figures = [
        {**figure, "what": "transformers, float32: tokens/s", "measured": 10.0},
        {**figure, "what": "llama.cpp, 4-bit: tokens/s", "measured": None, "note": "not installed"},
        {**figure, "what": "actlas, 4-bit: tokens/s", "measured": 125.0},
        {"what": "time", "unit": "x", "measured": 0.5, "most": 0.6, "verdict": "met", "note": ""},
    ]
    (tmp_path / "decode.json").write_text(json.dumps({**head, "figures": figures}))
    row = {
        "name": "q4",
        "runtime": "lean loop",
        "bytes": 5_000_000,
        "quality": 1.0042,
        "low": 1.0,
        "high": 1.01,
    }
    row |= {"touched": 1.0, "rate": 88.8, "speed": 9.87, "fits": True, "chosen": True, "frontier": False}
    found = {"rows": [row], "notes": ["a note"]}
    (tmp_path / "shrink.json").write_text(json.dumps({**head, "shrunk": found}))
    text = shrink_page.render(empty)
    assert "| actlas, 4-bit | 125.0 | 12.50 |" in text
    assert "| llama.cpp, 4-bit | - | not installed |" in text
    assert "* time: 0.5 (at most 0.6 was wanted: met)" in text
    assert "| q4 | lean loop | 5 | 1.0042 | 1.0000 to 1.0100 | 100% | 88.8 | 9.87 | chosen |" in text
    assert "* a note" in text and "`c`, 2026-01-02, P, 2 threads" in text
