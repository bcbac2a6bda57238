"""The logit lens in a terminal: layers down, tokens across, shaded by probability.

The grid fits the terminal: a prompt with more tokens than fit shows its first token and its last ones. In
the last column stand the best next tokens with their probabilities. Without colour (or with only sixteen)
a shade character before each token says how probable it is.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from actlas.core.logit_lens import LogitLensTable

_CELL, _GAP = 10, 2  # columns of a token at most, shade and space included; columns of the gap
_MOST_LAYERS = 48
_SHADES = " ░▒▓█"
_LIGHT, _DARK = (222, 235, 247), (8, 81, 156)


def visible(token: str) -> str:
    """Return a token as it can be shown in a cell: spaces and line ends as signs."""
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", "·")
    return "".join(c if c.isprintable() else "�" for c in text) or "∅"


def columns_for(tokens: int, width: int, cell: int = _CELL) -> list[int | None]:
    """Return which positions get a cell, `None` for the gap; the last position has its own column.

    Args:
        tokens: how many there are.
        width: columns of the terminal that are left for cells.
        cell: columns of a cell.
    """
    others = tokens - 1
    if others * cell <= width:
        return list(range(others))
    fit = max((width - _GAP) // cell, 0)
    if fit < 3:
        return [None, *range(others - fit, others)]
    return [0, None, *range(others - fit + 1, others)]


def layers_for(count: int, most: int = _MOST_LAYERS) -> list[int]:
    """Return which layers get a row: all of them, or evenly spaced ones with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def draw_grid(table: LogitLensTable, console: Console) -> Text:
    """Return the grid as text with styles.

    Args:
        table: what the logit lens found.
        console: where it will be shown; says how wide it is and whether it has colours.
    """
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else 100
    colour = console.is_terminal and not console.no_color and console.color_system in ("256", "truecolor")
    labels = [label_of(site) for site in table.sites]
    label = max(map(len, [*labels, "layer"])) + 1
    best = [_best(table, layer) for layer in range(len(table.layers))]
    last = min(max(cell_len(text) for text in best) + 1, max(width // 2, 24))
    said = [*table.tokens, *(names[0] for layer in table.strings for names in layer)]
    cell = min(max(cell_len(visible(token)) for token in said) + 2, _CELL)
    shown = columns_for(len(table.tokens), width - label - last, cell)
    text = Text(no_wrap=True)
    text.append(set_cell_size("layer", label), "bold")
    for position in shown:
        token = " " if position is None else visible(table.tokens[position])
        size = _GAP if position is None else cell
        lead = "" if colour or position is None else " "
        text.append(set_cell_size(lead + _cut(token, size - 1 - len(lead)), size), "bold")
    text.append(f"after {_cut(visible(table.tokens[-1]), 20)}\n", "bold")
    rows = layers_for(len(table.layers))
    for layer in reversed(rows):
        text.append(set_cell_size(labels[layer], label), "dim")
        for position in shown:
            if position is None:
                text.append(set_cell_size("…", _GAP), "dim")
                continue
            p = float(table.layers[layer].probabilities[position][0])
            text.append_text(_shaded(visible(table.strings[layer][position][0]), p, cell - 1, colour))
            text.append(" ")
        p = float(table.layers[layer].probabilities[-1][0])
        text.append_text(_shaded(best[layer], p, last, colour, pad=False))
        text.append("\n")
    hidden = len(table.tokens) - 1 - sum(position is not None for position in shown)
    notes = [f"{len(table.tokens)} tokens"]
    if hidden:
        notes.append(f"{hidden} not shown (a wider terminal or --html shows more)")
    if len(rows) < len(labels):
        notes.append(f"{len(rows)} of {len(labels)} layers")
    scale = "shade: " + " ".join(
        f"{shade}{mark}" for shade, mark in zip("░▒▓█", ("2%", "10%", "30%", "60%"), strict=True)
    )
    text.append("; ".join([*notes, "darker is more probable" if colour else scale]), "dim")
    return text


def label_of(site: str) -> str:
    """Return the row's label: the block's number for a `resid_post`, else the site's name."""
    parts = site.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "resid_post" else site


def _best(table: LogitLensTable, layer: int) -> str:
    names = table.strings[layer][-1]
    shares = table.layers[layer].probabilities[-1].tolist()
    return "  ".join(f"{visible(n)} {share(p)}" for n, p in zip(names, shares, strict=True))


def share(p: float) -> str:
    """Return a probability as a short percentage."""
    return f"{p:.0%}" if p >= 0.0995 else f"{p:.1%}" if p >= 0.001 else "<0.1%"


def _shaded(token: str, p: float, size: int, colour: bool, pad: bool = True) -> Text:
    if not colour:
        level = sum(p >= bound for bound in (0.02, 0.1, 0.3, 0.6))
        token = f"{_SHADES[level]}{token}"
    said = _cut(token, size)
    said = set_cell_size(said, size) if pad else said
    if not colour:
        return Text(said)
    if p < 0.02:
        return Text(said, "dim")
    weight = min(p, 1.0) ** 0.6
    shade = tuple(round(a + (b - a) * weight) for a, b in zip(_LIGHT, _DARK, strict=True))
    ink = "#ffffff" if weight > 0.65 else "#000000"
    return Text(said, Style.parse(f"{ink} on rgb({shade[0]},{shade[1]},{shade[2]})"))


def _cut(text: str, size: int) -> str:
    """Cut text to so many columns, with an ellipsis where something is lost."""
    if cell_len(text) <= size:
        return text
    return set_cell_size(text, size - 1).rstrip() + "…"
