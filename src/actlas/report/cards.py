"""A Card: what was measured about one model, as data, with its three views.

card = actlas.card("smollm2")         # measure and write card/
card.render("md"), card.render("html"), card.render("json")
Card.load("card").diff(Card.load("edited"))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from actlas.core.errors import ArtifactError, InputError
from actlas.core.measurement import Measurement
from actlas.report import markdown
from actlas.report.content import Section, Tile, plain
from actlas.report.difference import CardDiff, diff_cards
from actlas.report.evaluation import evaluate
from actlas.report.saving import MARKER, save_folder

FORMAT = 1
View = Literal["html", "md", "json"]


@dataclass
class Card:
    """A report made of measurements.

    Attributes:
        name: name of the model.
        kind: `Model.kind`; empty on a card that was read back from Markdown.
        summary: one line about the model.
        facts: short facts for the top, as (label, text).
        tiles: key numbers for the top.
        sections: the sections in order.
        metadata: front matter of the Markdown view.
        provenance: how it was made: command, seed, versions, machine, seconds.
        fingerprint: the model's fingerprint as plain data.
        under: descriptions of the edits that the card describes.
    """

    name: str
    kind: str = ""
    summary: str = ""
    facts: Sequence[tuple[str, str]] = ()
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    under: Sequence[str] = ()

    evaluate = staticmethod(evaluate)

    def __post_init__(self) -> None:
        self.name = plain(self.name) or "unnamed model"
        ids = [s.id for s in self.sections]
        if len(set(ids)) != len(ids):
            raise InputError(
                f"two sections of the card have the id {max(ids, key=ids.count)!r}; ids are unique"
            )

    @property
    def measurements(self) -> list[Measurement]:
        """All measurements of all sections, in order, those behind the plots included."""
        return [m for s in self.sections for m in (*s.result.measurements, *s.result.details)]

    @property
    def problems(self) -> list[str]:
        """Sections that could not be measured, with the reason."""
        return [f"{s.title}: {s.result.reason}" for s in self.sections if s.result.reason]

    def section(self, id: str) -> Section:
        """Return one section.

        Raises:
            InputError: the card has no section with this id.
        """
        for section in self.sections:
            if section.id == id:
                return section
        raise InputError(f"the card has no section {id!r}; it has {', '.join(s.id for s in self.sections)}")

    def render(self, view: View = "md") -> str:
        """Return the card as text.

        Args:
            view: `"html"` (one file that works offline), `"md"` (with front matter) or `"json"`.

        Raises:
            InputError: another view.
        """
        if view == "md":
            return markdown.render(
                self.name, self.summary, self.facts, self.tiles, self.sections, dict(self.metadata)
            )
        if view == "json":
            return (
                json.dumps(clean(self.to_json()), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
                + "\n"
            )
        if view == "html":
            from actlas.report.html import render_html

            return render_html(self)
        raise InputError(f"a card has no view {view!r}; choose html, md or json")

    def save(self, out: str | Path) -> Path:
        """Write `card.html`, `card.md` and `card.json` into a folder, all or none.

        Raises:
            InputError: the folder holds something else than a card.
            FailureError: it could not be written.
        """
        files = {"card.html": self.render("html"), "card.md": self.render("md"), MARKER: self.render("json")}
        return save_folder(out, files)

    def to_json(self) -> dict[str, Any]:
        """Return the card as a dictionary of plain data."""
        return {
            "kind": "card",
            "format": FORMAT,
            "model": {
                "name": self.name,
                "kind": self.kind,
                "summary": self.summary,
                "fingerprint": dict(self.fingerprint),
                "under": list(self.under),
            },
            "facts": [list(f) for f in self.facts],
            "tiles": [t.to_json() for t in self.tiles],
            "sections": [s.to_json() for s in self.sections],
            "metadata": dict(self.metadata),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Card:
        """Rebuild a card from `to_json`'s dictionary.

        Raises:
            ArtifactError: it is not a card, or of a newer format.
        """
        if not isinstance(record, Mapping) or record.get("kind") != "card":
            raise ArtifactError("this JSON is not a card; give the card.json that `actlas card` wrote")
        if not isinstance(record.get("format"), int) or record["format"] > FORMAT:
            raise ArtifactError(
                f"the card has format {record.get('format')}, and this Actlas reads up to {FORMAT}; "
                "upgrade Actlas"
            )
        try:
            model = record["model"]
            return cls(
                name=model["name"],
                kind=model.get("kind", ""),
                summary=model.get("summary", ""),
                facts=tuple((a, b) for a, b in record["facts"]),
                tiles=[Tile.from_json(t) for t in record["tiles"]],
                sections=[Section.from_json(s) for s in record["sections"]],
                metadata=record["metadata"],
                provenance=record["provenance"],
                fingerprint=model.get("fingerprint", {}),
                under=model.get("under", ()),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the card is damaged ({plain(repr(error))}); make it again") from error

    @classmethod
    def load(cls, path: str | Path) -> Card:
        """Read a card from its folder, its `card.json` or a `card.md`.

        Raises:
            ArtifactError: there is no card, or it is damaged.
        """
        path = Path(path)
        file = path / MARKER if path.is_dir() else path
        if not file.is_file():
            raise ArtifactError(f"{path} is not a card; give the folder that `actlas card` wrote")
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix.lower() in (".md", ".markdown"):
                return cls.from_markdown(text)
            return cls.from_json(json.loads(text))
        except UnicodeDecodeError as error:
            raise ArtifactError(
                f"{file} is not UTF-8 text (byte {error.start}); make the card again"
            ) from None
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{file} is not valid JSON ({error}); make the card again") from None

    @classmethod
    def from_markdown(cls, text: str) -> Card:
        """Read a card back from its Markdown view: `render("md")` of the result is the same text.

        Plots, seeds and per-item details are only in `card.json`. Cards by others are read as well as
        their headings allow.

        Raises:
            InputError: the front matter is not valid YAML.
        """
        return cls(**markdown.parse(text))

    def diff(self, other: Card) -> CardDiff:
        """Compare this card (before) with another (after), number by number."""
        return diff_cards(self, other)


def clean(value: Any) -> Any:
    """Return plain data in which NaN and infinities are `null`, numpy numbers are Python's, keys are text."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(v) for v in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
