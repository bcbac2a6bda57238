"""The Markdown view of a card, and its way back: rendering what was read gives the same text.

`render` writes front matter, the name, key numbers and one `##` heading a section; under a section come
the text, then `###` blocks: figures (as the sentence that describes them), tables, the numbers and the
notes. `parse` reads that, and makes the best of cards that were written by others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from actlas.core.measurement import Measurement
from actlas.report.content import (
    GLANCE,
    RESERVED_TITLES,
    Figure,
    Section,
    SectionResult,
    Table,
    Tile,
    paragraphs,
    plain,
    show_number,
)
from actlas.report.frontmatter import dump_metadata, split_metadata
from actlas.report.markup import escape_markdown, pipe_table, split_row, unescape_markdown

NUMBER_COLUMNS = ["Measure", "Group", "Value", "95% interval", "Unit", "n"]
_OPTIONAL = ("Under", "Beside", "Note")
_DASH = "–"


def render(
    name: str,
    summary: str,
    facts: Sequence[tuple[str, str]],
    tiles: Sequence[Tile],
    sections: Sequence[Section],
    metadata: dict[str, Any],
) -> str:
    """Return the card as Markdown with front matter."""
    lines = [f"# {escape_markdown(plain(name))}", ""]
    for paragraph in paragraphs(summary):
        lines += [escape_markdown(paragraph, line_start=True), ""]
    if facts or tiles:
        lines += [f"## {GLANCE}", ""]
    if facts:
        rows = [[plain(a), plain(b)] for a, b in facts]
        lines += ["### Facts", "", *pipe_table(["Fact", "Value"], rows), ""]
    if tiles:
        rows = [[plain(t.label), *_value_cells(t.measurement), plain(t.remark)] for t in tiles]
        lines += ["### Key numbers", ""]
        lines += [*pipe_table(["Number", "Value", "95% interval", "Unit", "n", "Remark"], rows), ""]
    for section in sections:
        lines += _section_lines(section)
    body = "\n".join(lines).rstrip("\n") + "\n"
    block = dump_metadata(metadata)
    return f"{block}\n{body}" if block else body


def _section_lines(section: Section) -> list[str]:
    result = section.result
    lines = [f"## {escape_markdown(section.title)}", "", f"<!-- section: {section.id} -->", ""]
    for paragraph in paragraphs(result.intro):
        lines += [escape_markdown(paragraph, line_start=True), ""]
    if plain(result.reason):
        lines += [f"*Not measured.* {escape_markdown(plain(result.reason))}", ""]
    for figure in result.figures:
        lines += [f"### {escape_markdown(figure.title)}", "", f"*Figure.* {escape_markdown(figure.alt)}", ""]
    for table in result.tables:
        lines += [f"### {escape_markdown(table.title)}", ""]
        lines += [*pipe_table(list(table.columns), [list(r) for r in table.rows]), ""]
        if table.note:
            lines += [f"*Note.* {escape_markdown(table.note)}", ""]
    if result.measurements:
        lines += ["### Numbers", "", *_number_table(result.measurements), ""]
    notes = [plain(n) for n in result.notes if plain(n)]
    if notes:
        lines += ["### Notes", "", *(f"- {escape_markdown(n, line_start=True)}" for n in notes), ""]
    return lines


def _number_table(measurements: Sequence[Measurement]) -> list[str]:
    extra = [
        column
        for column, used in zip(
            _OPTIONAL,
            (
                any(m.under for m in measurements),
                any(m.baseline is not None for m in measurements),
                any(plain(m.note) for m in measurements),
            ),
            strict=True,
        )
        if used
    ]
    rows = []
    for m in measurements:
        cells = [plain(m.name), _join_pairs(m.group.items()), *_value_cells(m)]
        more = {"Under": _join(m.under), "Beside": _baseline_cell(m.baseline), "Note": plain(m.note)}
        rows.append(cells + [more[c] for c in extra])
    return pipe_table(NUMBER_COLUMNS + extra, rows)


def _value_cells(m: Measurement) -> list[str]:
    value = _DASH if math.isnan(m.value) else show_number(m.value)
    return [value, interval_text(m), plain(m.unit), f"{m.n:,}"]


def interval_text(m: Measurement) -> str:
    """Return `"[low, high]"`, or an empty text where there is no interval."""
    if m.low is None or m.high is None or math.isnan(m.low) or math.isnan(m.high):
        return ""
    return f"[{show_number(m.low)}, {show_number(m.high)}]"


def _baseline_cell(m: Measurement | None) -> str:
    if m is None:
        return ""
    value, interval, unit, n = _value_cells(m)
    return _join([plain(m.name), value, interval, unit, n])


def _join(parts: Sequence[str]) -> str:
    return "; ".join(re.sub(r"([\\;=])", r"\\\1", plain(p)) for p in parts)


def _join_pairs(pairs: Any) -> str:
    return "; ".join("=".join(re.sub(r"([\\;=])", r"\\\1", plain(p)) for p in pair) for pair in pairs)


def _split(text: str, at: str) -> list[str]:
    """Split at a character that is not escaped; the pieces keep their escapes."""
    parts = [""]
    for token in re.findall(r"\\.|.", text):
        if token == at:
            parts.append("")
        else:
            parts[-1] += token
    return [p.strip() for p in parts]


def _unjoin(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


# Reading back.


def parse(text: str, where: str = "the card") -> dict[str, Any]:
    """Read a Markdown card into the arguments of `Card`.

    Args:
        text: the card.
        where: its name in error messages.

    Returns:
        `name`, `summary`, `facts`, `tiles`, `sections`, `metadata`.

    Raises:
        InputError: the front matter is not valid YAML.
    """
    metadata, body = split_metadata(text, where)
    name, summary = "", ""
    facts: list[tuple[str, str]] = []
    tiles: list[Tile] = []
    sections: list[Section] = []
    for level, title, lines in _chunks(body, 2):
        if level == 0 or (level == 1 and not name):
            name = name or title
            summary = "\n\n".join(filter(None, [summary, _text(lines)]))
        elif title == GLANCE:
            facts, tiles = _read_glance(lines)
        else:
            sections.append(_read_section(title, lines, {s.id for s in sections}))
    return {
        "name": name or "unnamed model",
        "summary": summary,
        "facts": tuple(facts),
        "tiles": tiles,
        "sections": sections,
        "metadata": metadata,
    }


def _chunks(text: str | list[str], deepest: int) -> Iterator[tuple[int, str, list[str]]]:
    """Yield (level, heading, lines) for each heading up to a level; text before the first has level 0."""
    level, title, fence = 0, "", ""
    lines: list[str] = []
    for line in text.splitlines() if isinstance(text, str) else text:
        mark = re.match(r"\s{0,3}(```+|~~~+)", line)
        if mark and (not fence or mark.group(1).startswith(fence)):
            fence = "" if fence else mark.group(1)
        heading = None if fence else re.match(r"(#{1,6})[ \t]+(.*)$", line)
        if heading and len(heading.group(1)) <= deepest:
            if title or any(x.strip() for x in lines):
                yield level, title, lines
            level, title, lines = len(heading.group(1)), plain(unescape_markdown(heading.group(2))), []
        else:
            lines.append(line)
    if title or any(x.strip() for x in lines):
        yield level, title, lines


def _text(lines: Sequence[str]) -> str:
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n\n".join(filter(None, (plain(unescape_markdown(b)) for b in blocks)))


def _read_glance(lines: list[str]) -> tuple[list[tuple[str, str]], list[Tile]]:
    facts: list[tuple[str, str]] = []
    tiles: list[Tile] = []
    for _, title, block in _chunks(lines, 3):
        _, rows, _ = _read_table(block)
        if title == "Facts":
            facts = [(row[0], row[1]) for row in rows if len(row) == 2]
        elif title == "Key numbers":
            for row in rows:
                if len(row) == 6:
                    m = _measurement(row[0], {}, row[1], row[2], row[3], row[4])
                    tiles.append(Tile(row[0], m, remark=row[5]))
    return facts, tiles


def _read_section(title: str, lines: list[str], taken: set[str]) -> Section:
    id = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    while id in taken:
        id += "-2"
    intro: list[str] = []
    reason = ""
    figures: list[Figure] = []
    tables: list[Table] = []
    measurements: list[Measurement] = []
    notes: list[str] = []
    for level, heading, block in _chunks(lines, 3):
        comment = re.compile(r"<!--\s*section:\s*([\w-]+)\s*-->")
        if level == 0:
            for line in block:
                found = comment.fullmatch(line.strip())
                id = found.group(1) if found else id
            kept = [x for x in block if not comment.fullmatch(x.strip())]
            said = [x for x in kept if x.startswith("*Not measured.* ")]
            reason = plain(unescape_markdown(said[0].removeprefix("*Not measured.* "))) if said else ""
            intro.append(_text([x for x in kept if x not in said]))
            continue
        first = next((x for x in block if x.strip()), "")
        columns, rows, rest = _read_table(block)
        if first.startswith("*Figure.* ") and heading not in RESERVED_TITLES:
            figures.append(Figure(heading, plain(unescape_markdown(first.removeprefix("*Figure.* ")))))
        elif heading == "Numbers" and columns[:6] == NUMBER_COLUMNS:
            measurements += [_read_number(columns, row) for row in rows]
        elif heading == "Notes" and all(x.startswith("- ") for x in block if x.strip()):
            notes += [plain(unescape_markdown(x[2:])) for x in block if x.strip()]
        elif columns and heading not in RESERVED_TITLES:
            note = _text([x.removeprefix("*Note.* ") for x in rest])
            even = tuple(tuple((row + [""] * len(columns))[: len(columns)]) for row in rows)
            tables.append(Table(heading, tuple(columns), even, note))
        else:
            intro.append("\n\n".join(filter(None, [heading, _text(block)])))
    whole = "\n\n".join(filter(None, intro))
    return Section(id, title, SectionResult(whole, measurements, figures, tables, notes, reason=reason))


def _read_table(lines: Sequence[str]) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns and rows of the first table (as plain text) and the other lines."""
    table: list[list[str]] = []
    rest: list[str] = []
    for line in lines:
        if line.lstrip().startswith("|") and not any(x.strip() for x in rest):
            table.append([plain(unescape_markdown(cell)) for cell in _cells(line)])
        else:
            rest.append(line)
    if len(table) < 2 or not all(re.fullmatch(r":?-+:?", cell) for cell in table[1]):
        return [], [], list(lines)
    return table[0], table[2:], rest


def _cells(line: str) -> list[str]:
    """Cells of a row that `pipe_table` wrote: an empty cell is kept, also the last one."""
    inner = line.strip()
    return split_row(inner if inner.startswith("|") else "| " + inner)


def _read_number(columns: list[str], row: list[str]) -> Measurement:
    cell = dict(zip(columns, row + [""] * len(columns), strict=False))
    group = {}
    for pair in _split(cell["Group"], ";"):
        key, value = [*_split(pair, "="), ""][:2]
        if key:
            group[_unjoin(key)] = _unjoin(value)
    under = tuple(_unjoin(p) for p in _split(cell.get("Under", ""), ";") if p)
    baseline = None
    parts = [_unjoin(p) for p in _split(cell.get("Beside", ""), ";")]
    if len(parts) == 5:
        baseline = _measurement(parts[0], {}, *parts[1:])
    m = _measurement(cell["Measure"], group, cell["Value"], cell["95% interval"], cell["Unit"], cell["n"])
    return Measurement(
        m.name, m.value, m.unit, m.n, m.low, m.high, m.interval, None, under, group, None,
        cell.get("Note", ""), baseline,
    )  # fmt: skip


def _measurement(
    name: str, group: dict[str, str], value: str, interval: str, unit: str, n: str
) -> Measurement:
    bounds = re.fullmatch(r"\[(\S+), (\S+)\]", interval)
    low, high = (_number(bounds.group(1)), _number(bounds.group(2))) if bounds else (None, None)
    whole = _number(n)
    count = int(whole) if math.isfinite(whole) else 0
    how = "as printed" if bounds else "exact"
    return Measurement(name, _number(value), unit, count, low, high, how, group=group)


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return math.nan
