"""What a command prints: text and tables for people, or one JSON document for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from actlas.core.measurement import Measurement

_WIDE = 400  # columns of a table that goes to a file or a pipe: nothing is wrapped or cut there


class Output:
    """Standard output of one command.

    Args:
        json: print only `document`, as JSON, when the command is done; text and tables are dropped.
    """

    def __init__(self, json: bool) -> None:
        self.json = json
        self.document: Any = {}
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """A rich console on standard output (imported only here: it costs a tenth of a second)."""
        if self._console is None:
            from rich.console import Console

            width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE
            self._console = Console(width=width, highlight=False, soft_wrap=False)
        return self._console

    def say(self, *lines: str) -> None:
        """Print lines of text for a person."""
        if not self.json:
            for line in lines:
                print(line)

    def draw(self, renderable: Any) -> None:
        """Print something that rich can draw, without spaces at the ends of lines."""
        if self.json:
            return
        with self.console.capture() as captured:
            self.console.print(renderable)
        print("\n".join(line.rstrip() for line in captured.get().strip("\n").split("\n")))

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        right: Sequence[str] = (),
        title: str = "",
    ) -> None:
        """Print a table; on a terminal it is wrapped to fit.

        Args:
            columns: headings.
            rows: cells, turned into text.
            right: headings of the columns that are aligned to the right.
            title: a line above it.
        """
        if self.json:
            return
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.draw(table)

    def measurements(self, found: Sequence[Measurement], title: str = "") -> None:
        """Print measurements as a table: name, group, value, interval, unit, n, note."""
        if self.json or not found:
            return
        from actlas.core.measurement import format_number

        grouped, noted = any(m.group for m in found), any(m.note for m in found)
        columns = ["measure", *(["group"] if grouped else []), "value", "95% interval", "unit", "n"]
        rows = []
        for m in found:
            group = [", ".join(f"{k}={v}" for k, v in m.group.items())] if grouped else []
            value = "-" if math.isnan(m.value) else format_number(m.value)
            cells = [m.name, *group, value, interval(m), m.unit, f"{m.n:,}"]
            rows.append([*cells, m.note] if noted else cells)
        self.table([*columns, *(["note"] if noted else [])], rows, right=("value", "n"), title=title)

    def finish(self) -> None:
        """Print the JSON document, if that was asked for."""
        if self.json:
            plain_ascii = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
            text = json.dumps(plain(self.document), indent=2, ensure_ascii=plain_ascii, allow_nan=False)
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def interval(m: Measurement) -> str:
    """Return `"[1.2, 3.4]"`, or an empty string for a value without an interval."""
    if m.low is None or m.high is None:
        return ""
    from actlas.core.measurement import format_number

    return f"[{format_number(m.low)}, {format_number(m.high)}]"


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: NaN and infinity become `null`, tensors lists, paths text.

    What knows its own JSON (`to_json`: measurements, edits, cards) is asked for it.
    """
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Set):
        return sorted((plain(v) for v in value), key=str)
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    return str(value)
