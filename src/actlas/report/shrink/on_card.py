"""What a card says about a model that was shrunk: the mix that was chosen, among all that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actlas.report.content import Figure, Table
from actlas.report.plots import spec_of
from actlas.report.shrink.plot import chart
from actlas.report.shrink.rows import Goal, Row


def frontier_figure(edits: Sequence[Any]) -> tuple[Figure | None, Table, str] | None:
    """Return the plot, the table and a sentence if one of these edits comes from a search, else `None`."""
    for edit in edits:
        for m in getattr(edit, "measurements", ()):
            if m.name == "shrink-quality" and "shrink" in m.details:
                return _shown(m.details["shrink"])
    return None


def _shown(record: dict[str, Any]) -> tuple[Figure | None, Table, str]:
    rows = [Row.from_json(r) for r in record["rows"]]
    goal = Goal(**{k: v for k, v in record["goal"].items() if k != "said"})
    chosen = next(r for r in rows if r.chosen)
    table = Table(
        "Mixes that were measured",
        (
            "Mix",
            "Runs in",
            "MB",
            record["quality"].capitalize() + ", x original",
            "95% interval",
            "Tokens/s",
            "x original",
        ),
        tuple(_cells(r) for r in sorted(rows, key=lambda r: r.rate or 0.0)),
        "Measured where the search ran, each in turn with the original; * is the mix of this card.",
    )
    said = (
        f"This model was shrunk from `{record['model']}` by `actlas shrink` ({record['goal']['said']}). "
        f"The mix `{chosen.name}` was chosen: {record['quality']} {chosen.quality:.4g} times the original's"
        + (f", {chosen.speed:.3g} times its speed" if chosen.speed is not None else "")
        + f", {chosen.bytes / 1e6:.3g} MB of weights."
    )
    drawn = chart(rows, goal, title="", quality=record["quality"], width="container", height=260)
    if drawn is None:
        return None, table, said
    text = "Change of quality and tokens a second of every mix that was measured; the diamond was chosen."
    return Figure("Quality against speed", text, spec_of(drawn), None, True), table, said


def _cells(row: Row) -> tuple[str, ...]:
    known = row.low is not None and row.high is not None and row.low != row.high
    return (
        row.name + (" *" if row.chosen else ""),
        row.runtime,
        f"{row.bytes / 1e6:.1f}",
        "" if row.quality is None else f"{row.quality:.4f}",
        f"{row.low:.4f} to {row.high:.4f}" if known else "",
        "" if row.rate is None else f"{row.rate:.1f}",
        "" if row.speed is None else f"{row.speed:.2f}",
    )
