"""Text forms of the catalogue and of reproductions: terminal, Markdown lab pages, `docs/papers.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from actlas.core.artifact import atomic_write
from actlas.core.measurement import Measurement, format_number
from actlas.core.progress import format_seconds
from actlas.papers.catalogue import papers
from actlas.papers.reproduction import RULE, Check, Plot, Reproduction, stored

_MARKS = {True: "yes", False: "no", None: "open"}


def plain(result: Reproduction) -> str:
    """Return a reproduction for the terminal."""
    lines = [
        f"{result.slug}: {result.title}",
        f"claim      {result.claim}",
        f"criterion  {result.criterion}",
        "",
        "measured",
        *(f"  {row}" for row in _columns(_rows(result.measured))),
        "",
        "checks",
        *(
            f"  [{_MARKS[c.passed]:>4}] {c.name}{' (central)' if c.central else ''}: {c.said}"
            for c in result.checks
        ),
        "",
        f"verdict    {result.verdict}: {result.headline}",
        f"note       {result.note}",
        f"made by    {result.command}, {result.date}, {format_seconds(result.seconds)}, {_machine(result)}",
    ]
    return "\n".join(lines)


def page(result: Reproduction, images: Iterable[str] = ()) -> str:
    """Return a reproduction's lab page as Markdown.

    Args:
        result: the reproduction.
        images: relative links of its plots, in the order of `result.plots`.
    """
    settings = ", ".join(f"{k} = {v}" for k, v in result.settings.items())
    lines = [
        f"# {_cell(result.title)}",
        "",
        f"`{result.slug}` · **{result.verdict}**: {result.headline}",
        "",
        f"**Claim tested.** {result.claim}",
        "",
        f"**Criterion, fixed before the run.** {result.criterion}",
        "",
        "## Checks",
        "",
        *_table(("question", "central", "answer", "numbers"), [_check_row(c) for c in result.checks]),
        "",
    ]
    for plot, link in zip(result.plots, images, strict=False):
        lines += [f"![{plot.title}]({link})", ""]
    lines += [
        "## Measured",
        "",
        *_table(
            ("what", "value", "95% interval", "unit", "n", "control or baseline"), _rows(result.measured)
        ),
        "",
        "## How to read it",
        "",
        result.note,
        "",
        "## How it was made",
        "",
        f"`{result.command}` on {result.date}, {format_seconds(result.seconds)}; {_machine(result)}.",
        f"Settings: {settings}.",
        "",
        f"Verdicts follow one rule: {RULE}.",
        "",
    ]
    return "\n".join(lines)


def overview() -> str:
    """Return `docs/papers.md`: every paper with its status, claim, result and command."""
    every = papers()
    done = [p for p in every if p.status == "reproduced"]
    lines = [
        "# Papers",
        "",
        f"Actlas rests on {len(every)} papers; {len(done)} of them have a reproduction so far.",
        "This page is written by `python -m actlas.papers` from `papers.json` and the stored results.",
        "",
        "Each reproduction has a criterion that is fixed in code before the run. Its verdict follows:",
        f"{RULE}.",
        "",
        "## Reproduced",
        "",
    ]
    rows = []
    for p in done:
        slug = f"[{p.slug}](papers/{p.slug}.md)" if p.stored else p.slug
        rows.append((slug, _cell(p.title), p.room, p.claim, p.result or "no stored result", f"`{p.command}`"))
    lines += [*_table(("slug", "title", "room", "claim", "result", "command"), rows), "", "## All", ""]
    table = [(str(p.number), p.slug, _cell(p.title), p.room, p.status, p.claim, p.verdict) for p in every]
    lines += [*_table(("", "slug", "title", "room", "status", "claim", "verdict"), table), ""]
    return "\n".join(lines)


def render_docs(folder: str | Path = "docs", plots: bool = True) -> list[Path]:
    """Write `papers.md` and one lab page per stored result.

    Args:
        folder: the documentation's folder.
        plots: also draw the plots as SVG (needs altair and vl-convert-python).

    Returns:
        The files written.
    """
    from actlas.papers.prompt_only_page import prompt_only_page

    folder = Path(folder)
    written = [
        atomic_write(folder / "papers.md", overview()),
        atomic_write(folder / "prompt-only.md", prompt_only_page()),
    ]
    for p in papers(status="reproduced"):
        result = stored(p.slug)
        if result is None:
            continue
        links = []
        for i, plot in enumerate(result.plots, start=1):
            links.append(f"{p.slug}-{i}.svg")
            if plots:
                written.append(atomic_write(folder / "papers" / links[-1], draw(plot)))
        written.append(atomic_write(folder / "papers" / f"{p.slug}.md", page(result, links)))
    return written


def draw(plot: Plot) -> str:
    """Return a plot as SVG text, drawn offline."""
    import altair as alt
    import vl_convert

    fields = dict.fromkeys([plot.x, plot.y, *([plot.color] if plot.color else [])])
    names = {column: f"c{i}" for i, column in enumerate(fields)}  # Vega parses names: dots, quotes, brackets

    def axis(column: str, letter: str) -> alt.X | alt.Y:
        numbers = all(isinstance(r[column], (int, float)) for r in plot.rows)
        log = letter in plot.log
        scale = alt.Scale(type="log", nice=False, padding=8) if log else alt.Scale(zero=False)
        kind = alt.X if letter == "x" else alt.Y
        if not numbers:
            return kind(names[column], type="nominal", title=column, sort=None)
        ticks = alt.Axis(tickCount=5) if log else alt.Axis()
        return kind(names[column], type="quantitative", title=column, scale=scale, axis=ticks)

    rows = [{names[c]: row[c] for c in fields} for row in plot.rows]
    chart = alt.Chart(alt.Data(values=rows), title=plot.title, width=420, height=220)
    marked = {
        "line": chart.mark_line(point=True),
        "point": chart.mark_circle(size=60),
        "bar": chart.mark_bar(),
    }[plot.mark]
    channels = [axis(plot.x, "x"), axis(plot.y, "y")]
    if plot.color:
        channels.append(alt.Color(names[plot.color], type="nominal", title=plot.color, sort=None))
    return str(vl_convert.vegalite_to_svg(marked.encode(*channels).to_dict()))


def _rows(measured: list[Measurement]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for m in measured:
        name = m.name + "".join(f", {k} {v}" for k, v in m.group.items())
        value = "not available" if m.value != m.value else format_number(m.value)
        interval = (
            "" if m.low is None or m.high is None else f"{format_number(m.low)} to {format_number(m.high)}"
        )
        beside = ""
        if m.baseline is not None:
            beside = f"{m.baseline.note or m.baseline.name}: {format_number(m.baseline.value)}"
        rows.append((name, value, interval, m.unit, f"{m.n:,}", beside or m.note))
    return rows


def _check_row(check: Check) -> tuple[str, ...]:
    return (check.name, "yes" if check.central else "", _MARKS[check.passed], check.said)


def _table(head: tuple[str, ...], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(_cell(c) for c in cells) + " |"

    return [line(head), line("---" for _ in head), *(line(row) for row in rows)]


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max((len(r[i]) for r in rows), default=0) for i in range(5)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[5]]).rstrip() for r in rows]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _machine(result: Reproduction) -> str:
    e = result.environment
    versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items())
    threads = f", {e['threads']} torch thread{'' if e['threads'] == 1 else 's'}" if e["threads"] else ""
    return f"{e['processor']}, {e['cpus']} CPUs{threads}, Python {e['python']}, {versions}"
