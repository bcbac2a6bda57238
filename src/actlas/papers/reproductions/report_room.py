"""The report room, as a user finds it: by its public names.

Two papers have their method in `actlas.report`, which stands beside `papers` in the house, so that neither
may be built on the other. A reproduction does not build on the room that it tests; it opens it at run
time through its front door, as any user's script does.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def public(name: str) -> Any:
    """Return something that `actlas.report` offers under this name, e.g. `"evaluate"`."""
    return getattr(importlib.import_module("actlas.report"), name)


def completeness(text: bytes, folder: Path) -> tuple[float, set[str], str]:
    """Audit the text of a card with `actlas.report.audit`.

    Args:
        text: a card's Markdown as it lies on disk.
        folder: an empty folder to work in.

    Returns:
        The share of the nine sections that are present, their names, and the audit's note.
    """
    file = folder / "card.md"
    file.write_bytes(text)
    found = public("audit")(file)
    sections = [m for m in found if m.name == "section present"]
    present = {m.group["section"] for m in sections if m.value == 1}
    return (
        len(present) / len(sections),
        present,
        next(m.note for m in found if m.name == "documentation completeness"),
    )


def card_text(model: str, folder: Path, seed: int, fill: Mapping[str, Any] | None = None) -> bytes:
    """Make the quick card of a bundled model with `actlas.report.card` and return its Markdown."""
    public("card")(model, folder / "made", seed=seed, fill=fill)
    return (folder / "made" / "card.md").read_bytes()


def reads_back(evaluation: Any) -> bool:
    """Return whether a card with this evaluation is the same after Markdown was read back in."""
    content = importlib.import_module("actlas.report.content")
    result = content.SectionResult(measurements=evaluation.measurements, tables=[evaluation.table()])
    card = public("Card")(
        name="groups", sections=[content.Section("behaviour", "Behaviour by group", result)]
    )
    text = card.render("md")
    return bool(public("Card").from_markdown(text).render("md") == text)
