"""Cutting text into documents of about a page.

Text is cut where people cut it: between paragraphs, between functions, and only when a single piece is
longer than a document may be, between sentences, lines or words. No character other than the white
space between pieces is lost.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

LEAST, TARGET, MOST = 500, 2000, 4000
_BREAKS = (re.compile(r"\n+"), re.compile(r"(?<=[.!?][\"')\]])\s+|(?<=[.!?])\s+"), re.compile(r"\s+"))


def paragraphs(text: str) -> list[str]:
    """Cut text into groups of whole paragraphs of about 2,000 and at most 4,000 characters.

    A paragraph ends at a blank line. A last group that is shorter than 500 characters joins the one
    before it where that fits.
    """
    pieces = (p for p in re.split(r"\n[ \t\r]*\n\s*?(?=\S|[ \t]+\S)", text) if p.strip())
    return list(gather((p.strip("\n") for p in pieces), "\n\n"))


def gather(pieces: Iterable[str], joint: str) -> Iterator[str]:
    """Join short pieces and cut long ones until each is about a document long.

    Args:
        pieces: text in order.
        joint: what stands between two joined pieces.
    """
    waiting = ""
    kept = ""
    for piece in (part for whole in pieces for part in cut(whole)):
        joined = f"{kept}{joint}{piece}" if kept else piece
        if kept and (len(joined) > MOST or len(kept) >= TARGET):
            if waiting:
                yield waiting
            waiting, kept = kept, piece
        else:
            kept = joined
    if waiting and kept and len(kept) < LEAST and len(waiting) + len(joint) + len(kept) <= MOST:
        yield f"{waiting}{joint}{kept}"
        return
    if waiting:
        yield waiting
    if kept:
        yield kept


def cut(text: str, most: int = MOST) -> list[str]:
    """Cut text that is longer than `most` at the last line, sentence or word end before the limit."""
    parts = []
    while len(text) > most:
        end = start = most
        for pattern in _BREAKS:
            places = [m for m in pattern.finditer(text, most // 2, most) if m.end() < most]
            if places:
                end, start = places[-1].start(), places[-1].end()
                break
        parts.append(text[:end])
        text = text[start:]
    return [*parts, text] if text.strip() else parts


def definitions(source: str) -> list[str]:
    """Cut Python source before top-level and class-level definitions and join up to document length.

    Decorators stay with what they decorate.

    Raises:
        SyntaxError: the source is not valid for this Python.
    """
    lines = source.splitlines(keepends=True)
    starts = {0}
    for node in ast.parse(source).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for item in (node, *inner):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([item.lineno, *(d.lineno for d in item.decorator_list)])
                starts.add(first - 1)
    edges = [*sorted(starts), len(lines)]
    pieces = ("".join(lines[a:b]) for a, b in pairwise(edges))
    return [text.strip("\n") for text in gather((p for p in pieces if p.strip()), "")]
