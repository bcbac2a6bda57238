"""The HTML view of a card: one file with everything inside, that works without a network.

Vega, Vega-Lite and vega-embed are inlined once and draw every plot; without scripts a static SVG is
shown instead. A content security policy forbids the page to load anything. All text is escaped.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import TYPE_CHECKING, Any

from actlas.core.errors import FailureError
from actlas.core.measurement import Measurement
from actlas.report.content import NOT_PROVIDED, Figure, Tile, paragraphs, plain, show_number
from actlas.report.markup import to_html

if TYPE_CHECKING:
    from actlas.report.cards import Card

OPEN_ROWS = 12
"""A table of numbers with more rows than this starts folded."""
STATIC_WIDTH = 520
STATIC_BYTES = 120_000
"""A static plot larger than this is left out; the table of its numbers stands in."""

_FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CHART_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": _FONT,
    "autosize": {"type": "fit-x", "contains": "padding"},
    "padding": 2,
    "view": {"stroke": "transparent"},
    "mark": {"color": "var(--s1)"},
    "rule": {"color": "var(--s1)"},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11.5,
        "domainColor": "var(--rule-strong)",
        "tickColor": "var(--rule-strong)",
        "gridColor": "var(--rule)",
        "titlePadding": 8,
        "labelPadding": 5,
        "labelOverlap": "greedy",
    },
    "axisX": {"tickCount": 5},
    "axisQuantitative": {"tickCount": 5},
    "axisY": {"grid": True, "ticks": False, "domain": False},
    "legend": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 11.5,
        "titleFontSize": 11.5,
        "symbolSize": 70,
        "symbolType": "circle",
        "symbolOpacity": 1,
        "symbolStrokeWidth": 0,
        "columns": 3,
        "columnPadding": 14,
        "labelLimit": 220,
    },
    "range": {"category": [f"var(--s{i})" for i in range(1, 7)]},
}


def render_html(card: Card) -> str:
    """Return the card as one HTML page.

    Raises:
        FailureError: Jinja2 or vl-convert are not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise FailureError(
            f"the HTML card needs {error.name}; install it with: pip install {error.name}"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    import markupsafe

    environment.filters |= {
        "text": lambda t: markupsafe.Markup(to_html(plain(t))),
        "paragraphs": paragraphs,
        "number": show_number,
        "value": value_text,
        "interval": interval_text,
        "group": group_text,
    }
    # Vega puts the description on the plot for screen readers, in place of the page's own label.
    charts = [
        {**f.spec, "description": f"{f.title}. {f.alt}"}
        for s in card.sections
        for f in s.result.figures
        if f.spec
    ]
    return environment.get_template("card.html.j2").render(
        card=card,
        css=markupsafe.Markup(_asset("card.css")),
        script=markupsafe.Markup(_asset("card.js")),
        bundle=markupsafe.Markup(_script_safe(javascript_bundle())) if charts else "",
        charts=markupsafe.Markup(script_json({"config": CHART_CONFIG, "specs": charts})),
        tiles=[tile_view(t) for t in card.tiles],
        static_svg=lambda figure: markupsafe.Markup(static_svg(figure)),
        not_provided=NOT_PROVIDED,
        open_rows=OPEN_ROWS,
        missing=lambda cell: cell == NOT_PROVIDED,
    )


def tile_view(tile: Tile) -> dict[str, Any]:
    """Return what the template shows of a tile; fractions get a small interval bar."""
    m = tile.measurement
    known = m.low is not None and m.high is not None
    fraction = m.unit == "fraction" and math.isfinite(m.value)
    bar = None
    if fraction and 0 <= m.value <= 1:
        low, high = (m.low, m.high) if m.low is not None and m.high is not None else (m.value, m.value)
        bar = {
            "left": round(100 * max(0.0, low), 2),
            "width": round(100 * max(0.004, min(1.0, high) - max(0.0, low)), 2),
            "at": round(100 * m.value, 2),
            "chance": round(100 * float(m.details["chance"]), 2) if "chance" in m.details else None,
        }
    return {
        "label": tile.label,
        "value": tile.show or (f"{100 * m.value:.3g}" if fraction else value_text(m)),
        "unit": "" if tile.show else ("%" if fraction else m.unit if m.unit != "count" else ""),
        "interval": _tile_interval(m, fraction) if known else "",
        "n": m.n,
        "exact": m.interval == "exact" or not known,
        "remark": tile.remark,
        "bar": bar,
    }


def _tile_interval(m: Measurement, fraction: bool) -> str:
    assert m.low is not None and m.high is not None
    if fraction:
        return f"{100 * m.low:.3g} to {100 * m.high:.3g} %"
    return f"{show_number(m.low)} to {show_number(m.high)}"


def value_text(m: Measurement) -> str:
    """Return the value as text; an en dash where there is none."""
    return "–" if math.isnan(m.value) else show_number(m.value)


def interval_text(m: Measurement) -> str:
    """Return `"low to high"` or an empty text."""
    if m.low is None or m.high is None or math.isnan(m.low) or math.isnan(m.high):
        return ""
    return f"{show_number(m.low)} to {show_number(m.high)}"


def group_text(m: Measurement) -> str:
    """Return the group as `"task ioi, template ABBA"`."""
    return ", ".join(f"{plain(k)} {plain(v)}" for k, v in m.group.items())


@functools.cache
def javascript_bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script (about 0.9 MB).

    Raises:
        FailureError: vl-convert is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise FailureError("plots need vl-convert; install it with: pip install vl-convert-python") from None
    bundle: Any = vl_convert.javascript_bundle  # the snippet has a default that the stubs lack
    return str(bundle())


def static_svg(figure: Figure) -> str:
    """Return the plot as SVG for readers without scripts; empty if it cannot be drawn or is too large."""
    if not figure.spec:
        return ""
    import vl_convert

    spec = {**figure.spec, "width": STATIC_WIDTH}
    config = {**CHART_CONFIG, "autosize": {"type": "fit-x", "contains": "padding"}}
    try:
        svg = str(vl_convert.vegalite_to_svg(spec, config=config))
    except ValueError:
        return ""
    return svg if svg.startswith("<svg") and "<script" not in svg and len(svg) <= STATIC_BYTES else ""


def script_json(value: Any) -> str:
    """Return JSON that may stand inside a `<script>` element."""
    from actlas.report.cards import clean

    text = json.dumps(clean(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for bad, good in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028"),
                      ("\u2029", "\\u2029")):  # fmt: skip
        text = text.replace(bad, good)
    return text


def _script_safe(source: str) -> str:
    """A script element ends at the first `</script`, also inside a string."""
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("actlas.report") / "templates" / name).read_text(encoding="utf-8")
