"""A circuit as one HTML page that works offline: the graph, its scores, the size curve, parts and edges."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from actlas.circuits.draw import DRAWN, svg
from actlas.core.measurement import format_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from actlas.circuits.circuit import Circuit
    from actlas.core.measurement import Measurement

_EDGES = 60
_STYLE = """
body{font:15px/1.5 Helvetica,Arial,sans-serif;color:#222;margin:0 auto;max-width:1240px;padding:24px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:28px 0 8px}
table{border-collapse:collapse}td,th{padding:3px 14px 3px 0;text-align:left;border-bottom:1px solid #eee}
td.n{font-variant-numeric:tabular-nums}p.note{color:#555}.wide{overflow-x:auto}
.columns{display:flex;flex-wrap:wrap;gap:48px}.dim path.edge{stroke-opacity:.04!important}
.dim path.on{stroke-opacity:.95!important}g.part{cursor:pointer}
"""
_SCRIPT = """
const svg=document.querySelector('.wide svg');
document.querySelectorAll('g.part').forEach(g=>{
 g.addEventListener('mouseenter',()=>{svg.classList.add('dim');
  document.querySelectorAll('path.edge').forEach(p=>p.classList.toggle('on',
   p.dataset.a===g.dataset.name||p.dataset.b===g.dataset.name));});
 g.addEventListener('mouseleave',()=>svg.classList.remove('dim'));});
"""


def page(circuit: Circuit) -> str:
    """Return the page."""
    title = html.escape(f"Circuit of {circuit.model} on {circuit.task}")
    method = html.escape(circuit.method)
    notes = "".join(f'<p class="note">{html.escape(n)}</p>' for n in circuit.notes)
    edges = [
        [e.source, e.target, f"{e.score:+.3f}", _bounds(e.low, e.high, "+.3f")]
        for e in circuit.edges[:_EDGES]
    ]
    losses = [
        [m.group.get("part", ""), f"{m.value:+.3f}", _bounds(m.low, m.high, "+.3f")] for m in circuit.losses
    ]
    more = "" if len(circuit.edges) <= _EDGES else f", the {_EDGES} strongest of {len(circuit.edges)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p class="note">{len(circuit.nodes)} heads and MLPs, {len(circuit.edges)} edges, found by {method}.
Point at a part to see its edges, at an edge to see its score: the share of the difference between clean and
corrupted prompts that it carries, estimated.</p>
<div class="wide">{svg(circuit, DRAWN)}</div>
<h2>Is it the mechanism?</h2>
<p class="note">Exact runs on prompts whose right answers the search did not see.</p>
{_table(["measure", "value", "95% interval", "n", ""], [_score(m) for m in circuit.scores])}
{notes}
<h2>Size against faithfulness</h2>
{curve_svg(circuit.curve)}
<div class="columns"><div><h2>Parts: what the circuit loses without each</h2>
{_table(["part", "loss", "95% interval"], losses)}</div>
<div><h2>Edges{more}</h2>{_table(["from", "into", "score", "95% interval"], edges)}</div></div>
<script>{_SCRIPT}</script></body></html>
"""


def curve_svg(curve: Iterable[object]) -> str:
    """Return the size curve as SVG: faithfulness with its band, and random circuits of equal size."""
    import math

    rows = [dict(r) for r in curve]  # type: ignore[call-overload]
    if len(rows) < 2:
        return "<p>not measured</p>"
    width, height, left, top = 620, 300, 60, 16
    logs = [math.log10(r["edges"]) for r in rows]
    values = [r[k] for r in rows for k in ("low", "high", "random")] + [0.0, 1.0]
    bottom, highest = min(values), max(values)

    def x(v: float) -> float:
        return left + (v - logs[0]) / max(logs[-1] - logs[0], 1e-9) * (width - left - 20)

    def y(v: float) -> float:
        return top + (highest - v) / (highest - bottom) * (height - top - 46)

    def path(key: str) -> str:
        return " ".join(f"{x(a):.1f},{y(r[key]):.1f}" for a, r in zip(logs, rows, strict=True))

    band = path("low") + " " + " ".join(reversed(path("high").split()))
    grid = [v / 4 for v in range(math.ceil(bottom * 4), math.floor(highest * 4) + 1)]
    out = [
        f'<svg width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="11">'
    ]
    for v in grid:
        out.append(f'<line x1="{left}" x2="{width - 20}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#e6e6e6"/>')
        out.append(f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end" fill="#555">{v:g}</text>')
    out.append(f'<polygon points="{band}" fill="#1f6fb2" fill-opacity="0.18"/>')
    for key, colour in (("random", "#999999"), ("faithfulness", "#1f6fb2")):
        out.append(f'<polyline points="{path(key)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    last = -math.inf
    for a, r in zip(logs, rows, strict=True):
        said = f"{r['edges']:g} edges, {r['parts']:g} parts: {r['faithfulness']:.2f}"
        at = f'cx="{x(a):.1f}" cy="{y(r["faithfulness"]):.1f}"'
        out.append(f'<circle {at} r="3" fill="#1f6fb2"><title>{said}</title></circle>')
        if x(a) - last > 34:
            place = f'x="{x(a):.1f}" y="{height - 26}"'
            out.append(f'<text {place} text-anchor="middle" fill="#555">{r["edges"]:g}</text>')
            last = x(a)
    said = "edges (blue: the circuit, with its 95% interval; grey: one random circuit of equal size)"
    place = f'x="{(left + width) / 2:.0f}" y="{height - 8}"'
    out.append(f'<text {place} text-anchor="middle" fill="#555">{said}</text>')
    return "\n".join([*out, "</svg>"])


def _score(m: Measurement) -> list[str]:
    return [m.name, format_number(round(m.value, 3)), _bounds(m.low, m.high, ".3f"), str(m.n), m.note]


def _bounds(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="n">{html.escape(c)}</td>' for c in r) + "</tr>" for r in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
