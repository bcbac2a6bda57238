"""What a card is made of: sections with text, measurements, figures, tables and notes.

Everything here is plain data: it goes to JSON and back, and the HTML and Markdown pages are two
views of it. Text is plain text in which backticks mark `code`; it is escaped where it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement, format_number

NOT_PROVIDED = "not provided"
GLANCE = "At a glance"
RESERVED_TITLES = ("Numbers", "Notes")
"""Headings that the Markdown view uses itself; a table or figure may not be called so."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_URL = re.compile(r"https?://[^\s`]+")


def plain(text: object) -> str:
    """Return text on one line: no control characters, single spaces, balanced backticks."""
    line = " ".join(_CONTROL.sub(" ", str(text)).split())
    parts = line.split("`")
    if len(parts) % 2 == 0 or any(not code.strip() or "|" in code or "\\" in code for code in parts[1::2]):
        line = "'".join(parts)
    for url in _URL.findall(line):
        safe = url
        for bad, code in (("\\", "%5C"), ("|", "%7C"), ("<", "%3C"), (">", "%3E"), ('"', "%22")):
            safe = safe.replace(bad, code)
        line = line.replace(url, safe)
    return line


def paragraphs(text: str) -> list[str]:
    """Split text at blank lines; each paragraph becomes one line."""
    return [line for line in (plain(p) for p in re.split(r"\n\s*\n", str(text))) if line]


def show_number(x: float) -> str:
    """Format a number so that reading it back and formatting it again gives the same text."""
    text = format_number(x)
    for _ in range(3):
        again = format_number(float(text.replace(",", "")))
        if again == text:
            break
        text = again
    return text


@dataclass(frozen=True)
class Table:
    """A small table of text.

    Attributes:
        title: a heading of a few words.
        columns: column names.
        rows: cells as text; every row as long as `columns`.
        note: a line under the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", plain(self.title))
        object.__setattr__(self, "columns", tuple(plain(c) for c in self.columns))
        object.__setattr__(self, "rows", tuple(tuple(plain(c) for c in row) for row in self.rows))
        object.__setattr__(self, "note", plain(self.note))
        if not self.title or self.title in RESERVED_TITLES:
            raise InputError(f"a table cannot be called {self.title!r}; choose another title")
        if not self.columns or any(len(row) != len(self.columns) for row in self.rows):
            raise InputError(f"table {self.title!r}: every row needs {len(self.columns)} cells, one a column")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [list(r) for r in self.rows],
            "note": self.note,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Table:
        """Rebuild a table from `to_json`'s dictionary."""
        rows = tuple(tuple(r) for r in record["rows"])
        return cls(record["title"], tuple(record["columns"]), rows, record.get("note", ""))


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        title: a heading of a few words.
        alt: one or two sentences that say what the plot shows, for people who cannot see it.
        spec: the Vega-Lite specification; empty on a card that was read back from Markdown.
        table: the plotted numbers, shown on request.
        wide: whether it takes the whole width of the page.
    """

    title: str
    alt: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    table: Table | None = None
    wide: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", plain(self.title))
        object.__setattr__(self, "alt", plain(self.alt))
        if not self.title or not self.alt or self.title in RESERVED_TITLES:
            raise InputError(f"a figure needs a title and a sentence of text for it, not {self.title!r}")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "title": self.title,
            "alt": self.alt,
            "spec": dict(self.spec),
            "table": None if self.table is None else self.table.to_json(),
            "wide": self.wide,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Figure:
        """Rebuild a figure from `to_json`'s dictionary."""
        table = record.get("table")
        return cls(
            record["title"],
            record["alt"],
            record.get("spec") or {},
            None if table is None else Table.from_json(table),
            bool(record.get("wide")),
        )


@dataclass(frozen=True)
class Tile:
    """One key number for the top of the card: a measurement with a short label.

    Attributes:
        label: what it is, in two to four words.
        measurement: the number.
        show: text to show instead of the formatted value, e.g. `"135 M"`.
        remark: a short line under it, e.g. `"chance 0.50"`.
        rank: its place among all tiles; small comes first.
    """

    label: str
    measurement: Measurement
    show: str = ""
    remark: str = ""
    rank: int = 50

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "label": self.label,
            "measurement": self.measurement.to_json(),
            "show": self.show,
            "remark": self.remark,
            "rank": self.rank,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Tile:
        """Rebuild a tile from `to_json`'s dictionary."""
        return cls(
            record["label"],
            Measurement.from_json(record["measurement"]),
            record.get("show", ""),
            record.get("remark", ""),
            int(record.get("rank", 50)),
        )


@dataclass(frozen=True)
class DataUse:
    """Data that a section measured on, for the list at the end of the card.

    Attributes:
        name: what it is called, e.g. `"ioi"` or `"prose"`.
        n: how many items were used.
        unit: what an item is: `"prompts"`, `"documents"`, `"images"`.
        sha256: hash of the items' content.
        about: where it comes from.
    """

    name: str
    n: int
    unit: str
    sha256: str = ""
    about: str = ""


@dataclass(frozen=True)
class SectionResult:
    """What one section has to say.

    Attributes:
        intro: one or two paragraphs of plain text (blank line between them).
        measurements: the section's numbers.
        details: numbers behind the plots (layer by layer, say): only in `card.json`.
        figures, tables: shown in this order.
        notes: what a reader must know.
        tiles: key numbers for the top of the card.
        data: what was measured on.
        reason: why the section could not be measured; empty if it was.
    """

    intro: str = ""
    measurements: Sequence[Measurement] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    data: Sequence[DataUse] = ()
    reason: str = ""
    details: Sequence[Measurement] = ()


@dataclass(frozen=True)
class Section:
    """A section as it stands on a card.

    Attributes:
        id: short name, used in links.
        title: the heading.
        result: what it says.
        seconds: how long it took to measure; `None` if unknown.
    """

    id: str
    title: str
    result: SectionResult
    seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", plain(self.title) or self.id)
        if not re.fullmatch(r"[\w-]+", self.id) or self.title == GLANCE:
            raise InputError(f"a section cannot have the id {self.id!r} and the title {self.title!r}")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        r = self.result
        return {
            "id": self.id,
            "title": self.title,
            "seconds": self.seconds,
            "reason": r.reason,
            "intro": r.intro,
            "measurements": [m.to_json() for m in r.measurements],
            "details": [m.to_json() for m in r.details],
            "figures": [f.to_json() for f in r.figures],
            "tables": [t.to_json() for t in r.tables],
            "notes": list(r.notes),
            "data": [vars(d) for d in r.data],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Section:
        """Rebuild a section from `to_json`'s dictionary."""
        result = SectionResult(
            intro=record.get("intro", ""),
            measurements=[Measurement.from_json(m) for m in record.get("measurements", ())],
            figures=[Figure.from_json(f) for f in record.get("figures", ())],
            tables=[Table.from_json(t) for t in record.get("tables", ())],
            notes=list(record.get("notes", ())),
            data=[DataUse(**d) for d in record.get("data", ())],
            reason=record.get("reason", ""),
            details=[Measurement.from_json(m) for m in record.get("details", ())],
        )
        return cls(record["id"], record["title"], result, record.get("seconds"))
