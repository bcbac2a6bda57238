"""How each number was made: factors, metrics, data, command, machine, time."""

from __future__ import annotations

from collections.abc import Sequence

from actlas.core.measurement import Measurement
from actlas.core.progress import format_seconds
from actlas.report.content import NOT_PROVIDED, DataUse, Section, SectionResult, Table, plain
from actlas.report.plots import Row, bars
from actlas.report.registry import Context, section

MOST_VALUES = 8


@section("methods", title="How each number was made", order=90, cost=0.1)
def methods(context: Context) -> SectionResult:
    """List what was measured on what, and everything needed to make the card again."""
    from actlas.report.build import provenance

    done: Sequence[Section] = context.shared.get("sections", ())
    measurements = [m for s in done for m in (*s.result.measurements, *s.result.details)]
    record = provenance(context)
    tables = [
        *_factors(context, measurements),
        *_metrics(context, measurements),
        *_data(context, [d for s in done for d in s.result.data]),
        _environment(record),
    ]
    timed = [(s.title, s.seconds) for s in done if s.seconds is not None and s.seconds >= 0.05]
    timed.insert(0, ("Loading the model", float(context.shared.get("load seconds", 0.0))))
    total = sum(seconds for _, seconds in timed)
    text = f"Seconds by section on this machine; {format_seconds(total)} in all, as the card was made."
    figures = [
        bars("Time by section", text, [Row(title, seconds) for title, seconds in timed], axis="seconds")
    ]
    intro = (
        f"Made on {record['made']} by `{plain(record['command']).replace('`', '')}` with seed "
        f"{record['seed']}. The same command with the same seed, versions and machine gives the same "
        "numbers, apart from times and memory. All intervals cover 95%: Wilson's for rates, a "
        "bootstrap over items for everything else."
    )
    notes = [f"Left out: {line}." for line in context.shared.get("left out", ())]
    failed = [s for s in done if s.result.reason]
    notes += [f"Not measured: {s.title}: {plain(s.result.reason)}" for s in failed]
    return SectionResult(intro=intro, figures=figures, tables=tables, notes=notes)


def _factors(context: Context, measurements: Sequence[Measurement]) -> list[Table]:
    values: dict[str, dict[str, None]] = {}
    for m in measurements:
        for key, value in m.group.items():
            values.setdefault(key, {})[value] = None
    rows = [("Measured: " + key, _some(list(found))) for key, found in values.items()]
    rows += list(context.fill.rows("factors"))
    return [Table("Factors", ("Factor", "Groups"), tuple(rows))]


def _metrics(context: Context, measurements: Sequence[Measurement]) -> list[Table]:
    from actlas.measure import measures

    known = measures()
    seen: dict[str, Measurement] = {}
    for m in measurements:
        seen.setdefault(m.name, m)
    rows = []
    for name, m in seen.items():
        about = known[name].summary if name in known else _ABOUT.get(name, "")
        rows.append((name, about or "see its section", m.unit, m.interval))
    tables = []
    if rows:
        tables.append(Table("Metrics", ("Measure", "What it says", "Unit", "Interval"), tuple(rows)))
    answers = context.fill.rows("metrics")
    if any(text != NOT_PROVIDED for _, text in answers) or not rows:
        tables.append(Table("Metrics, as the author says", ("Field", "Answer"), answers))
    return tables


_ABOUT = {
    "mean task-accuracy": "mean over tasks of the share of prompts answered rightly",
    "largest gap in task-accuracy": "difference between the best and the worst group of at least 30 prompts",
    "loss-per-token": "negative log-likelihood of a token",
}


def _data(context: Context, used: Sequence[DataUse]) -> list[Table]:
    rows = [(d.name, f"{d.n:,} {d.unit}", d.about or "see its section", d.sha256[:16]) for d in used]
    tables = []
    if rows:
        tables.append(
            Table(
                "Evaluation data",
                ("Data", "Size", "What it is", "SHA-256, first 16 digits"),
                tuple(dict.fromkeys(rows)),
            )
        )
    answers = context.fill.rows("evaluation_data")
    if any(text != NOT_PROVIDED for _, text in answers) or not rows:
        tables.append(Table("Evaluation data, as the author says", ("Field", "Answer"), answers))
    return tables


def _environment(record: dict[str, object]) -> Table:
    versions = record["versions"]
    assert isinstance(versions, dict)
    rows = [
        ("Command", plain(record["command"])),
        ("Seed", str(record["seed"])),
        ("Mode", "quick" if record["quick"] else "full"),
        ("Date", str(record["made"])),
        ("Machine", f"{record['processor']}, {record['machine']}, {record['threads']} threads"),
        ("Model on", f"{record['device']}, {record['dtype']}"),
        ("Python", str(record["python"])),
        *((name, str(version)) for name, version in versions.items()),
    ]
    return Table("Environment", ("Field", "Value"), tuple(rows))


def _some(values: list[str]) -> str:
    shown = ", ".join(values[:MOST_VALUES])
    return shown if len(values) <= MOST_VALUES else f"{shown} and {len(values) - MOST_VALUES} more"
