"""A circuit as a picture: one SVG, from which the page and the PNG are made.

Blocks run from the input at the bottom to the logits at the top; only blocks with a part of the circuit take
room. A head stands in the column of its number, as on a heat map, MLPs in a column of their own. An edge's
width and opacity follow the size of its score, its colour what it enters (query, key, value, MLP, logits);
edges that work against the answer are dashed.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actlas.circuits.graph import INPUT, LOGITS
from actlas.core.errors import FailureError

if TYPE_CHECKING:
    from actlas.circuits.circuit import Circuit
    from actlas.circuits.edge_attribution import Edge

COLOURS = {"q": "#7b3fa0", "k": "#c2571a", "v": "#1f6fb2", "mlp": "#5a6472", "logits": "#2b8a3e"}
NAMES = {
    "q": "into a query",
    "k": "into keys",
    "v": "into values",
    "mlp": "into an MLP",
    "logits": "into the logits",
}
DRAWN = 150
"""Edges that are drawn, the largest first: more are not readable."""
_RECEIVER = re.compile(r"^L(\d+)([HKV])(\d+)(?:\.q)?$")
_STEP_X, _STEP_Y, _WIDE, _HIGH, _LEFT, _TOP = 86, 60, 62, 22, 64, 66


@dataclass(frozen=True)
class Line:
    """One drawn edge: from a part to a part, and what it enters there."""

    source: str
    target: str
    kind: str
    edge: Edge


def lines_of(circuit: Circuit, most: int = DRAWN) -> list[Line]:
    """Return the edges to draw between parts; an edge into shared keys or values goes to each head of the
    group that is in the circuit."""
    per_group = circuit.graph.heads // circuit.graph.groups
    present = set(circuit.nodes)
    found = []
    for edge in circuit.edges[:most]:
        at = _RECEIVER.match(edge.target)
        if at is None:
            kind = "logits" if edge.target == LOGITS else "mlp"
            found.append(Line(edge.source, edge.target, kind, edge))
            continue
        block, letter, number = at[1], at[2], int(at[3])
        kind = "q" if letter == "H" else letter.lower()
        heads = [number] if kind == "q" else range(number * per_group, (number + 1) * per_group)
        for h in heads:
            if f"L{block}H{h}" in present:
                found.append(Line(edge.source, f"L{block}H{h}", kind, edge))
    return found


def layout(lines: list[Line]) -> tuple[dict[str, tuple[float, float]], list[tuple[str, float]], int]:
    """Return the place of every part, the rows' labels and places, and the number of columns.

    A row is a block, a column a head number that occurs, and MLPs stand in the last column, half a row up.
    """
    names = dict.fromkeys(n for line in lines for n in (line.source, line.target))
    found = {n: _place(n) for n in names if n not in (INPUT, LOGITS)}
    used = sorted({h for _, h in found.values() if h is not None})
    rows = sorted({b for b, _ in found.values()})
    columns = len(used) + 1
    places = {}
    for name, (block, h) in found.items():
        row = float(rows.index(block) + 1)
        places[name] = (float(used.index(h)), row) if h is not None else (columns - 1.0, row + 0.45)
    middle = (columns - 1) / 2
    places |= {n: (middle, 0.0 if n == INPUT else len(rows) + 1.3) for n in (INPUT, LOGITS) if n in names}
    return places, [(f"block {b}", float(rows.index(b) + 1)) for b in rows], columns


def svg(circuit: Circuit, most: int = DRAWN) -> str:
    """Return the picture as SVG text, with a tooltip on every part and edge."""
    lines = lines_of(circuit, most)
    places, labels, columns = layout(lines)
    rows = len(labels) + 2.3
    width = max(_LEFT + _STEP_X * columns + 24, 800)
    height = _TOP + _STEP_Y * rows + 40
    middle = {
        n: (_LEFT + _STEP_X * (x + 0.5), _TOP + _STEP_Y * (rows - r - 0.6)) for n, (x, r) in places.items()
    }
    largest = max(abs(line.edge.score) for line in lines) or 1.0
    drawn = min(most, len(circuit.edges))
    what = f"{len(circuit.nodes)} parts, {len(circuit.edges)} edges" + (
        f" (the {drawn} strongest are drawn)" if drawn < len(circuit.edges) else ""
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
        f' height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" role="img">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        _text(20, 28, f"Circuit of {circuit.model} on {circuit.task}", 16, bold=True),
        _text(20, 48, f"{what}, {circuit.method}{_score(circuit)}", 12, "#555555"),
    ]
    for label, r in labels:
        y = _TOP + _STEP_Y * (rows - r - 0.6)
        if label:
            out.append(_text(20, y + 4, label, 10, "#999999"))
            out.append(
                f'<line x1="{_LEFT}" x2="{width - 16:.0f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#f1f1f1"/>'
            )
    for line in sorted(lines, key=lambda e: abs(e.edge.score)):
        out.append(_curve(line, middle, abs(line.edge.score) / largest))
    losses = {m.group.get("part", ""): m.value for m in circuit.losses}
    for name, (x, y) in middle.items():
        out.append(_box(name, x, y, losses.get(name)))
    out += _legend(height)
    return "\n".join([*out, "</svg>"])


def png(circuit: Circuit, most: int = DRAWN) -> bytes:
    """Return the picture as PNG.

    Raises:
        FailureError: the picture could not be drawn.
    """
    import vl_convert

    try:
        return bytes(vl_convert.svg_to_png(svg(circuit, most), scale=2.0))
    except ValueError as error:
        raise FailureError(f"the circuit could not be drawn: {error}") from error


def _place(name: str) -> tuple[int, int | None]:
    """Return (block, head) of a part, (block, `None`) of an MLP."""
    if name.startswith("MLP"):
        return int(name.split()[1]), None
    block, number = name[1:].split("H")
    return int(block), int(number)


def _score(circuit: Circuit) -> str:
    found = next((m for m in circuit.scores if m.name == "circuit faithfulness"), None)
    if found is None:
        return ""
    bounds = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"; faithfulness {found.value:.2f}{bounds} on {found.n} held-out prompts"


def _curve(line: Line, middle: dict[str, tuple[float, float]], size: float) -> str:
    (x1, y1), (x2, y2) = middle[line.source], middle[line.target]
    y1, y2 = y1 - _HIGH / 2, y2 + _HIGH / 2
    bend = (y1 - y2) * 0.45
    side = min(60.0, 8 + abs(y1 - y2) * 0.12) if abs(x1 - x2) < 1 else 0.0  # around the parts between
    e = line.edge
    bounds = "" if e.low is None or e.high is None else f" [{e.low:+.3f}, {e.high:+.3f}]"
    said = f"{e.source} to {e.target}: {e.score:+.3f}{bounds}"
    dash = ' stroke-dasharray="5 3"' if e.score < 0 else ""
    return (
        f'<path class="edge" data-a="{_id(line.source)}" data-b="{_id(line.target)}" fill="none"'
        f' stroke="{COLOURS[line.kind]}" stroke-width="{0.8 + 6 * size**0.7:.2f}"'
        f' stroke-opacity="{0.2 + 0.7 * size**0.7:.2f}"'
        f'{dash} d="M{x1:.1f},{y1:.1f} C{x1 + side:.1f},{y1 - bend:.1f} '
        f'{x2 + side:.1f},{y2 + bend:.1f} {x2:.1f},{y2:.1f}">'
        f"<title>{html.escape(said)}</title></path>"
    )


def _box(name: str, x: float, y: float, loss: float | None) -> str:
    plain = name in (INPUT, LOGITS)
    fill = "#ffffff" if plain else "#eef1f4" if name.startswith("MLP") else "#fff6dd"
    border = "#222222" if loss is not None and abs(loss) >= 0.1 else "#9aa3ad"
    said = name if loss is None else f"{name}: without it the circuit loses {loss:+.2f}"
    return (
        f'<g class="part" data-name="{_id(name)}"><title>{html.escape(said)}</title>'
        f'<rect x="{x - _WIDE / 2:.1f}" y="{y - _HIGH / 2:.1f}" width="{_WIDE}" height="{_HIGH}"'
        f' rx="{3 if name.startswith("MLP") else 11}" fill="{fill}" stroke="{border}"'
        f' stroke-width="{1.8 if border == "#222222" else 1}"/>'
        f"{_text(x, y + 4, name, 11.5, centre=True)}</g>"
    )


def _legend(height: float) -> list[str]:
    out, x, y = [], 20.0, height - 18
    for kind, said in NAMES.items():
        out.append(_stroke(x, y, f'stroke="{COLOURS[kind]}" stroke-width="3"'))
        out.append(_text(x + 28, y, said, 11, "#555555"))
        x += 46 + 6.2 * len(said)
    out.append(_stroke(x, y, 'stroke="#888888" stroke-width="2" stroke-dasharray="5 3"'))
    out.append(_text(x + 28, y, "against the answer", 11, "#555555"))
    return out


def _stroke(x: float, y: float, style: str) -> str:
    return f'<line x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y - 4:.1f}" y2="{y - 4:.1f}" {style}/>'


def _text(
    x: float,
    y: float,
    said: str,
    size: float,
    colour: str = "#222222",
    *,
    bold: bool = False,
    centre: bool = False,
) -> str:
    more = (' font-weight="bold"' if bold else "") + (' text-anchor="middle"' if centre else "")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{more}>{html.escape(said)}</text>'
    )


def _id(name: str) -> str:
    return name.replace(" ", "-")
