"""`python -m bench.shrink_page`: write the numbers and the plot of docs/shrink.md from stored results.

Text between `<!-- name -->` and `<!-- end -->` is replaced by what `name` renders, from
`results/shrink.json` (`python -m bench shrink`) and `results/decode.json` (`python -m bench decode`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench.harness import RESULTS, ROOT

PAGE = ROOT / "docs" / "shrink.md"
PLOT = ROOT / "docs" / "images" / "shrink-frontier.svg"
_PART = re.compile(r"<!-- ([a-z]+) -->\n.*?<!-- end -->", re.DOTALL)


def _stored(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = "| " + " | ".join(columns) + " |"
    rule = "| " + " | ".join("---" if i == 0 else "---:" for i in range(len(columns))) + " |"
    return [head, rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _where(record: dict[str, Any]) -> str:
    e = record["environment"]
    busy = f", load average {e['load_average'][0]:g} at the end" if e.get("load_average") else ""
    return (
        f"`{record['command']}`, {record['when'][:10]}, {e['processor']}, {e['threads']} threads{busy}, "
        f"torch {e['versions']['torch']}, transformers {e['versions']['transformers']}."
    )


def frontier() -> list[str]:
    """Return the table of what the search measured."""
    record = _stored("shrink")
    if record is None:
        return ["Not measured yet: `python -m bench shrink`."]
    found = record["shrunk"]
    rows = []
    for r in sorted(found["rows"], key=lambda r: r["rate"] or 0.0):
        marks = (
            ["chosen"] * r["chosen"] + ["frontier"] * r["frontier"] + ["over the budget"] * (not r["fits"])
        )
        interval = "" if r["low"] in (None, r["high"]) else f"{r['low']:.4f} to {r['high']:.4f}"
        rows.append(
            [
                r["name"],
                r["runtime"],
                f"{r['bytes'] / 1e6:.0f}",
                f"{r['quality']:.4f}",
                interval,
                f"{r['touched']:.0%}",
                f"{r['rate']:.1f}",
                f"{r['speed']:.2f}",
                ", ".join(marks),
            ]
        )
    columns = (
        "mix",
        "runs in",
        "MB",
        "perplexity x",
        "95% interval",
        "weights read",
        "tokens/s",
        "x original",
        "",
    )
    return [
        *_table(columns, rows),
        "",
        *(f"* {note}" for note in found["notes"]),
        "",
        f"Made by {_where(record)}",
    ]


def decode() -> list[str]:
    """Return the table against llama.cpp, transformers and torch.compile."""
    record = _stored("decode")
    if record is None:
        return ["Not measured yet: `python -m bench decode`."]
    rates = [f for f in record["figures"] if f["unit"] == "tokens/s"]
    base = next(f["measured"] for f in rates if f["what"].startswith("transformers, float32"))
    rows = [
        [
            f["what"].removesuffix(": tokens/s"),
            "-" if f["measured"] is None else f"{f['measured']:.1f}",
            f["note"] if f["measured"] is None else f"{f['measured'] / base:.2f}",
        ]
        for f in rates
    ]
    others = [f for f in record["figures"] if f["unit"] != "tokens/s" and f["measured"] is not None]
    said = [
        f"* {f['what']}: {f['measured']:.3g}"
        + ("" if f["most"] is None else f" (at most {f['most']:.3g} was wanted: {f['verdict']})")
        for f in others
    ]
    columns = ("variant", "tokens/s", "x transformers")
    return [*_table(columns, rows), "", *said, "", f"{record['title']}. Made by {_where(record)}"]


PARTS: dict[str, Callable[[], list[str]]] = {"frontier": frontier, "decode": decode}


def render(text: str) -> str:
    """Return the page with its parts from the stored results."""

    def part(found: re.Match[str]) -> str:
        lines = PARTS[found[1]]()
        return "\n".join([f"<!-- {found[1]} -->", "", *lines, "", "<!-- end -->"])

    return _PART.sub(part, text)


def plot() -> None:
    """Draw the frontier of the stored result."""
    from actlas.report.shrink import Goal, Row
    from actlas.report.shrink.plot import chart

    record = _stored("shrink")
    if record is None:
        return
    found = record["shrunk"]
    rows = [Row.from_json(r) for r in found["rows"]]
    goal = Goal(**{k: v for k, v in found["goal"].items() if k != "said"})
    drawn = chart(rows, goal, title=f"{found['model']}: quality against speed", quality=found["quality"])
    if drawn is not None:
        drawn.save(str(PLOT))


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    plot()
    sys.stdout.write(f"wrote {PAGE} and {PLOT}\n")
