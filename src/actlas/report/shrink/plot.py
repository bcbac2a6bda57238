"""The frontier as a plot: quality against tokens a second, with the intervals and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actlas.report.shrink.rows import ORIGINAL, Goal, Row

_COLOURS = {"original": "#777777", "f32": "#1f77b4", "q8": "#2a9d4a", "q4": "#d1495b"}
_MORE = ("#8d5fd3", "#e08e0b", "#0b8a8f", "#b0578d")


def chart(
    rows: Sequence[Row],
    goal: Goal,
    *,
    title: str = "Quality against speed",
    quality: str = "perplexity",
    width: Any = 560,
    height: int = 320,
) -> Any | None:
    """Return an Altair chart of measured rows, or `None` if fewer than two have a speed and a quality.

    The line joins the mixes than which no other is both faster and better; the dashed line is the budget.
    """
    import altair as alt

    values = [_value(row) for row in rows if row.rate and row.quality is not None]
    if len(values) < 2:
        return None
    said = (
        "rise of the perplexity, %" if quality == "perplexity" else "change of the embeddings (1 - cosine), %"
    )
    x = alt.X(
        "rate:Q", title="tokens a second (log scale)", scale=alt.Scale(type="log", nice=False, padding=30)
    )
    groups = list(dict.fromkeys(v["group"] for v in values))
    spare = iter(_MORE * len(groups))
    colours = [_COLOURS.get(g) or next(spare) for g in groups]
    color = alt.Color(
        "group:N",
        title="weights",
        sort=groups,
        scale=alt.Scale(domain=groups, range=colours),
        legend=alt.Legend(orient="top", symbolOpacity=1),
    )
    base = alt.Chart(alt.Data(values=values)).encode(x=x)
    tips = [
        alt.Tooltip("name:N", title="mix"),
        alt.Tooltip("rate:Q", title="tokens/s", format=".1f"),
        alt.Tooltip("speed:Q", title="x original", format=".2f"),
        alt.Tooltip("rise:Q", title=said, format=".2f"),
        alt.Tooltip("megabytes:Q", title="MB of weights", format=".0f"),
    ]
    line = (
        base.transform_filter("datum.frontier")
        .mark_line(color="#999999", strokeWidth=1.5, interpolate="step-after")
        .encode(y=alt.Y("rise:Q", title=said), order=alt.Order("rate:Q"))
    )
    bars = base.mark_rule(strokeWidth=2, opacity=0.5).encode(
        y=alt.Y("low:Q", title=said), y2="high:Q", color=color
    )
    dots = base.mark_point(filled=True, opacity=1).encode(
        y=alt.Y("rise:Q", title=said),
        color=color,
        size=alt.Size("chosen:N", scale=alt.Scale(domain=[False, True], range=[70, 230]), legend=None),
        shape=alt.Shape(
            "chosen:N", scale=alt.Scale(domain=[False, True], range=["circle", "diamond"]), legend=None
        ),
        tooltip=tips,
    )
    names = base.mark_text(align="left", dx=9, dy=-9, fontSize=11).encode(
        y="rise:Q", text="label:N", color=color
    )
    layers: list[Any] = [line, bars, dots, names]
    if goal.keep is not None and goal.keep > 0:
        layers.insert(
            0,
            alt.Chart(alt.Data(values=[{"y": 100 * goal.keep}]))
            .mark_rule(strokeDash=[5, 4], color="#777777")
            .encode(y="y:Q"),
        )
    under = [
        "diamond: chosen; dashed: the budget; bars: 95% intervals; percentages: weights skipped;",
        "line: no mix is both faster and better",
    ]
    return alt.layer(*layers).properties(
        title=alt.Title(title, subtitle=under, anchor="start"), width=width, height=height
    )


def _value(row: Row) -> dict[str, Any]:
    assert row.quality is not None and row.rate is not None
    rise = 100 * (row.quality - 1)
    return {
        "name": f"{row.name} ({row.runtime})",
        "label": f"{row.skipped:.0%}" if row.skipped else row.name,
        "group": ORIGINAL if row.name == ORIGINAL else row.weights,
        "rate": row.rate,
        "speed": row.speed,
        "rise": rise,
        "low": rise if row.low is None else 100 * (row.low - 1),
        "high": rise if row.high is None else 100 * (row.high - 1),
        "megabytes": row.bytes / 1e6,
        "chosen": row.chosen,
        "frontier": row.frontier,
    }
