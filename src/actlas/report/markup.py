"""Escaping: plain text (with `code` in backticks) into Markdown and HTML, and Markdown back.

`unescape_markdown(escape_markdown(text)) == text` for every text that went through `plain`.
"""

from __future__ import annotations

import html
import re

_SPECIAL = re.compile(r"[\\`*_\[\]~|]")
_ENTITY = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_BACK = re.compile(r"(`[^`]*`)|\\([!-/:-@\[-`{-~])|(&(?:amp|lt|gt);)")
_TOKEN = re.compile(r"(`[^`]*`|https?://[^\s`]+)")
_LEAD = re.compile(r"^(?:([#+\-=])|(\d{1,9})([.)]))")


def escape_markdown(text: str, *, line_start: bool = False) -> str:
    """Escape plain text for Markdown, except code spans and links.

    Args:
        text: one line that went through `plain`.
        line_start: whether it begins a line, where `#`, `-`, `+`, `=` and `1.` mean something.
    """
    out = []
    for piece in _TOKEN.split(text):
        if piece.startswith("`") and piece.endswith("`") and len(piece) > 1:
            out.append(piece)
        elif piece.startswith(("http://", "https://")):
            out.append(piece.replace("&", "&amp;"))
        else:
            piece = re.sub(r"[&<>]", lambda m: _ENTITY[m.group()], piece)
            out.append(_SPECIAL.sub(lambda m: "\\" + m.group(), piece))
    whole = "".join(out)
    if line_start:
        whole = _LEAD.sub(lambda m: f"\\{m.group(1)}" if m.group(1) else f"{m.group(2)}\\{m.group(3)}", whole)
    return whole


def unescape_markdown(text: str) -> str:
    """Undo `escape_markdown`; code spans are left alone."""

    def back(match: re.Match[str]) -> str:
        code, character, entity = match.groups()
        return code or character or html.unescape(entity)

    return _BACK.sub(back, text)


def to_html(text: str) -> str:
    """Escape plain text for HTML; code spans become `<code>`, web addresses become links."""
    out = []
    for piece in _TOKEN.split(text):
        if piece.startswith("`") and piece.endswith("`") and len(piece) > 1:
            out.append(f"<code>{html.escape(piece[1:-1])}</code>")
        elif piece.startswith(("http://", "https://")):
            end = len(piece.rstrip(".,;:!?)"))
            link = html.escape(piece[:end])
            out.append(
                f'<a href="{link}" rel="noopener noreferrer nofollow">{link}</a>{html.escape(piece[end:])}'
            )
        else:
            out.append(html.escape(piece))
    return "".join(out)


_CELL = re.compile(r"\\.|`[^`|]*`|\||[^\\`|]+|.")


def split_row(line: str) -> list[str]:
    """Split a Markdown table row at its unescaped bars; cells come back stripped, still escaped."""
    cells = [""]
    for token in _CELL.findall(line.strip()):
        if token == "|":
            cells.append("")
        else:
            cells[-1] += token
    if cells and not cells[0].strip():
        cells = cells[1:]
    if cells and not cells[-1].strip():
        cells = cells[:-1]
    return [cell.strip() for cell in cells]


def pipe_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table of plain-text cells."""
    lines = ["| " + " | ".join(escape_markdown(c) for c in columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(escape_markdown(c) or " " for c in row) + " |" for row in rows]
