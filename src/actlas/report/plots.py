"""The kinds of plot on a card, as Vega-Lite specifications made with Altair.

Colours are CSS variables (`var(--s1)`), so a plot follows the page's light and dark theme; widths are
the container's, so it fits a phone. Every builder returns a `Figure` with the plotted numbers as a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from actlas.core.measurement import Measurement
from actlas.report.content import Figure, Table, show_number

STEP = 24
"""Height of one row of a dot or bar plot, in pixels."""


@dataclass(frozen=True)
class Row:
    """One row of a dot or bar plot.

    Attributes:
        label: what it is, at the axis.
        value, low, high: the number and its interval.
        series: what it is coloured by; empty for none.
        n: number of items behind it.
        reference: a number to compare with (guessing, the plain model), drawn as a tick.
        block: rows of one block stand together; the label of the block is its first row's.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    series: str = ""
    n: int = 0
    reference: float | None = None

    @classmethod
    def of(cls, m: Measurement, label: str, *, series: str = "", reference: float | None = None) -> Row:
        """Make a row from a measurement."""
        return cls(label, m.value, m.low, m.high, series, m.n, reference)


def dots(
    title: str,
    alt_text: str,
    rows: Sequence[Row],
    *,
    axis: str,
    domain: tuple[float, float] | None = None,
    reference: str = "",
    log: bool = False,
    percent: bool = False,
    wide: bool = False,
) -> Figure:
    """Return a dot plot with intervals: one row a label.

    Args:
        title, alt_text: see `Figure`.
        rows: in the order of the plot.
        axis: title of the axis, with the unit.
        domain: range of the axis; the data's by default.
        reference: what the ticks mean, e.g. `"guessing"`.
        log: logarithmic axis.
        percent: show fractions as per cent.
        wide: let it take the whole width.
    """
    kept = [r for r in rows if math.isfinite(r.value)]
    values = [_record(r) for r in kept]
    labels = list(dict.fromkeys(r.label for r in kept))
    series = list(dict.fromkeys(r.series for r in kept if r.series))
    scale: dict[str, Any] = {"nice": True, **({"type": "log"} if log else {"zero": False})}
    if domain:
        scale["domain"] = list(domain)
    x_axis = alt.Axis(title=axis, **({"format": "%"} if percent else {}))
    y = alt.Y("label:N", sort=labels, title=None, axis=alt.Axis(labelLimit=250))
    base = alt.Chart(alt.Data(values=values)).encode(y=y)
    tip = _tooltip(bool(series), bool(reference), percent)
    offset: dict[str, Any] = {}
    color: dict[str, Any] = {}
    if series:
        offset = {"yOffset": alt.YOffset("series:N", sort=series)}
        color = {"color": alt.Color("series:N", sort=series, title=None, legend=alt.Legend(orient="top"))}
    rule = base.mark_rule(strokeWidth=2, opacity=0.55).encode(
        x=alt.X("low:Q", scale=alt.Scale(**scale), axis=x_axis), x2="high:Q", tooltip=tip, **offset, **color
    )
    point = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("value:Q", scale=alt.Scale(**scale), axis=x_axis), tooltip=tip, **offset, **color
    )
    layers: list[Any] = [rule, point]
    if reference:
        tick = base.mark_tick(thickness=2, size=STEP * 0.6, color="var(--muted)").encode(
            x=alt.X("reference:Q", scale=alt.Scale(**scale), axis=x_axis), tooltip=tip
        )
        layers.insert(0, tick)
    step = STEP * max(1.0, 0.8 * len(series))
    chart = alt.layer(*layers).properties(width="container", height=max(60, round(step * len(labels))))
    return Figure(title, alt_text, spec_of(chart), _table(title, kept, reference), wide)


def bars(
    title: str, alt_text: str, rows: Sequence[Row], *, axis: str, percent: bool = False, wide: bool = False
) -> Figure:
    """Return horizontal bars from zero: one row a label, stacked by series if there are any."""
    kept = [r for r in rows if math.isfinite(r.value)]
    labels = list(dict.fromkeys(r.label for r in kept))
    series = list(dict.fromkeys(r.series for r in kept if r.series))
    color: dict[str, Any] = {}
    if series:
        color = {"color": alt.Color("series:N", sort=series, title=None, legend=alt.Legend(orient="top"))}
    chart = (
        alt.Chart(alt.Data(values=[_record(r) for r in kept]))
        .mark_bar(height=STEP * 0.55, cornerRadiusEnd=2)
        .encode(
            x=alt.X("value:Q", axis=alt.Axis(title=axis, **({"format": "%"} if percent else {}))),
            y=alt.Y("label:N", sort=labels, title=None, axis=alt.Axis(labelLimit=250)),
            tooltip=_tooltip(bool(series), False, percent),
            **color,
        )
        .properties(width="container", height=max(60, STEP * len(labels)))
    )
    return Figure(title, alt_text, spec_of(chart), _table(title, kept, ""), wide)


def lines(
    title: str,
    alt_text: str,
    series: Mapping[str, Sequence[tuple[float, float, float | None, float | None]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    log_x: bool = False,
    percent: bool = False,
    percent_x: bool = False,
    domain: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    names: Mapping[float, str] | None = None,
    points: bool = True,
    connect: bool = True,
    wide: bool = False,
    height: int = 190,
) -> Figure:
    """Return lines with bands for the intervals, and the nearest value under the pointer.

    Args:
        title, alt_text: see `Figure`.
        series: for each line, its points as (x, y, low, high).
        x, y: titles of the axes, with units.
        log, log_x: logarithmic axes (values of 0 and below are left out).
        percent, percent_x: show fractions as per cent.
        domain: range of the y axis.
        marks: (x, label) of dashed vertical lines.
        names: what each x is called, for the pointer and the table.
        points: draw a point at each value.
        connect: join the points of a line; otherwise each has an interval of its own.
        wide: let it take the whole width.
        height: in pixels.
    """
    values = []
    for name, points_of in series.items():
        for a, b, low, high in points_of:
            if not math.isfinite(b) or (log and b <= 0) or (log_x and a <= 0):
                continue
            known = low is not None and high is not None and (not log or low > 0)
            row = {"x": a, "value": b, "low": low if known else b, "high": high if known else b}
            alone = len(points_of) == 1 or not connect
            values.append({**row, "series": name, "name": (names or {}).get(a, ""), "alone": alone})
    y_scale: dict[str, Any] = {"padding": 8, "nice": False} if log else {"zero": False, "nice": True}
    if domain:
        y_scale["domain"] = list(domain)
    if log:
        y_scale["type"] = "log"
    x_scale = alt.Scale(nice=False, padding=5, **({"type": "log"} if log_x else {"zero": False}))
    x_axis = alt.Axis(title=x, **({"format": "%"} if percent_x else {}))
    y_format = {"format": "%"} if percent else {"format": "~g"} if log else {}
    x_enc = alt.X("x:Q", scale=x_scale, axis=x_axis)
    y_axis = alt.Axis(title=y, **y_format)
    several = len(series) > 1
    color: dict[str, Any] = {}
    if several:
        legend = alt.Legend(orient="top", columns=3 if wide else 2)
        color = {"color": alt.Color("series:N", sort=list(series), title=None, legend=legend)}
    base = alt.Chart(alt.Data(values=values)).encode(x=x_enc, **color)
    y_enc = alt.Y("value:Q", scale=alt.Scale(**y_scale), axis=y_axis)
    band = base.mark_area(opacity=0.18).encode(
        y=alt.Y("low:Q", scale=alt.Scale(**y_scale), axis=y_axis), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=2).encode(y=y_enc)
    number = alt.Tooltip("value:Q", title=y, format=".1%" if percent else ".4~g")
    near = alt.selection_point(nearest=True, on="pointerover", fields=["x"], empty=False, clear="pointerout")
    tips = [alt.Tooltip("x:Q", title=x, format=".0%" if percent_x else "~g"), number]
    if names:
        tips.insert(1, alt.Tooltip("name:N"))
    if several:
        tips.insert(0, alt.Tooltip("series:N", title="line"))
    dot = base.mark_point(filled=True, size=36).encode(
        y=y_enc,
        tooltip=tips,
        opacity=alt.condition(near, alt.value(1), alt.value(0.75 if points else 0)),
        size=alt.condition(near, alt.value(100), alt.value(26 if connect else 50)),
    )
    bar = (
        base.transform_filter("datum.alone")
        .mark_rule(opacity=0.35)
        .encode(y=alt.Y("low:Q", scale=alt.Scale(**y_scale), axis=y_axis), y2="high:Q")
    )
    lone = [bar] if any(v["alone"] for v in values) else []
    layers: list[Any] = [*((band, line) if connect else ()), *lone, dot.add_params(near)]
    if marks:
        mark_data = alt.Data(values=[{"x": a, "label": label} for a, label in marks])
        layers.insert(
            0,
            alt.Chart(mark_data)
            .mark_rule(strokeDash=[4, 3], color="var(--muted)")
            .encode(x=x_enc, tooltip=alt.Tooltip("label:N", title="at")),
        )
    chart = alt.layer(*layers).properties(width="container", height=height)
    return Figure(title, alt_text, spec_of(chart), _wide_table(title, x, y, values, bool(names)), wide)


def heat(
    title: str,
    alt_text: str,
    cells: Sequence[tuple[int, int, float]],
    *,
    x: str,
    y: str,
    value: str,
    percent: bool = False,
    wide: bool = True,
) -> Figure:
    """Return a heat map of (x, y, value) cells; the shade is the value's share of the largest."""
    kept = [(a, b, c) for a, b, c in cells if math.isfinite(c)]
    rows = len({b for _, b, _ in kept})
    chart = (
        alt.Chart(alt.Data(values=[{"x": a, "y": b, "value": c} for a, b, c in kept]))
        .mark_rect(color="var(--s1)")
        .encode(
            x=alt.X("x:O", axis=alt.Axis(title=x, labelAngle=0, labelOverlap=True)),
            y=alt.Y("y:O", axis=alt.Axis(title=y)),
            opacity=alt.Opacity(
                "value:Q",
                scale=alt.Scale(range=[0.02, 1]),
                legend=alt.Legend(
                    title=value, orient="top", columns=6, **({"format": "%"} if percent else {})
                ),
            ),
            tooltip=[
                alt.Tooltip("x:O", title=x),
                alt.Tooltip("y:O", title=y),
                alt.Tooltip("value:Q", title=value, format=".1%" if percent else ".4~g"),
            ],
        )
        .properties(width="container", height=min(420, max(80, 16 * rows)))
    )
    values = [{"x": float(a), "value": c, "series": f"{y} {b}", "name": ""} for a, b, c in kept]
    return Figure(title, alt_text, spec_of(chart), _wide_table(title, x, value, values, False), wide)


def spec_of(chart: Any) -> dict[str, Any]:
    """Return the chart as a plain Vega-Lite dictionary without Altair's own theme."""
    spec: dict[str, Any] = chart.to_dict()
    spec.pop("config", None)
    return spec


def _wide_table(title: str, x: str, y: str, values: Sequence[Mapping[str, Any]], named: bool) -> Table | None:
    """One row an x, one column a line."""
    series = list(dict.fromkeys(str(v["series"]) for v in values))
    cells: dict[float, dict[str, str]] = {}
    called: dict[float, str] = {}
    for v in values:
        cells.setdefault(float(v["x"]), {})[str(v["series"])] = show_number(float(v["value"]))
        called[float(v["x"])] = str(v["name"])
    if not cells:
        return None
    columns = (x, *(["name"] if named else []), *(series if len(series) > 1 else [y]))
    rows = [
        (show_number(a), *([called[a]] if named else []), *(by_line.get(s, "") for s in series))
        for a, by_line in sorted(cells.items())
    ]
    return Table(f"{title}: data", columns, tuple(rows))


def _record(r: Row) -> dict[str, Any]:
    known = r.low is not None and r.high is not None and math.isfinite(r.low) and math.isfinite(r.high)
    return {
        "label": r.label,
        "value": r.value,
        "low": r.low if known else r.value,
        "high": r.high if known else r.value,
        "series": r.series,
        "n": r.n,
        "reference": r.reference,
    }


def _tooltip(series: bool, reference: bool, percent: bool) -> list[Any]:
    form = ".1%" if percent else ".4~g"
    tips: list[Any] = [alt.Tooltip("label:N", title="what")]
    if series:
        tips.append(alt.Tooltip("series:N", title="of"))
    tips += [
        alt.Tooltip("value:Q", format=form),
        alt.Tooltip("low:Q", title="95% from", format=form),
        alt.Tooltip("high:Q", title="to", format=form),
        alt.Tooltip("n:Q", title="n", format=","),
    ]
    if reference:
        tips.append(alt.Tooltip("reference:Q", title="reference", format=form))
    return tips


def _table(title: str, rows: Sequence[Row], reference: str) -> Table | None:
    if not rows:
        return None
    has_series = any(r.series for r in rows)
    has_interval = any(r.low is not None for r in rows)
    has_n = any(r.n for r in rows)
    columns = ["What", *(["Of"] if has_series else []), "Value", *(["95% interval"] if has_interval else [])]
    columns += ["n"] if has_n else []
    columns += [reference.capitalize()] if reference else []
    cells = []
    for r in rows:
        row = [r.label, *([r.series] if has_series else []), show_number(r.value)]
        if has_interval:
            known = r.low is not None and r.high is not None
            row.append(f"{show_number(r.low or 0.0)} to {show_number(r.high or 0.0)}" if known else "")
        row += [f"{r.n:,}"] if has_n else []
        if reference:
            row.append("" if r.reference is None else show_number(r.reference))
        cells.append(tuple(row))
    return Table(f"{title}: data", tuple(columns), tuple(cells))
