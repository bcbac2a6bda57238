"""What changed between two cards: of two versions of a model, or of a model before and after an edit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actlas.core.measurement import Measurement
from actlas.report.content import show_number

if TYPE_CHECKING:
    from actlas.report.cards import Card


@dataclass(frozen=True)
class Change:
    """One number on two cards.

    Attributes:
        section: id of the section.
        before, after: the measurements; `None` where a card has none.
        difference: after minus before; `nan` if it cannot be computed.
        apart: whether the two 95% intervals do not overlap; `None` without intervals. Overlap is not
            proof of no difference: a paired comparison (`actlas.compare`) sees smaller effects.
    """

    section: str
    before: Measurement | None
    after: Measurement | None

    @property
    def measurement(self) -> Measurement:
        """Whichever of the two there is, the later first."""
        found = self.after if self.after is not None else self.before
        assert found is not None
        return found

    @property
    def difference(self) -> float:
        if self.before is None or self.after is None:
            return math.nan
        return self.after.value - self.before.value

    @property
    def apart(self) -> bool | None:
        a, b = self.before, self.after
        if a is None or b is None or a.low is None or a.high is None or b.low is None or b.high is None:
            return None
        return b.low > a.high or b.high < a.low

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"`, `"changed"`, `"same"`, `"within noise"`, `"added"` or `"removed"`."""
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        step = self.difference
        if not math.isfinite(step):
            both = math.isnan(self.before.value) and math.isnan(self.after.value)
            return "same" if both else "changed"
        if step == 0:
            return "same"
        if self.apart is False:
            return "within noise"
        if self.measurement.better is None:
            return "changed"
        return "better" if (step > 0) == (self.measurement.better == "higher") else "worse"


@dataclass(frozen=True)
class CardDiff:
    """The differences between two cards.

    Attributes:
        before, after: names of the two.
        facts: facts that differ, as (label, before, after).
        changes: every number of either card.
    """

    before: str
    after: str
    facts: tuple[tuple[str, str, str], ...]
    changes: tuple[Change, ...]

    def changed(self) -> list[Change]:
        """Return the numbers that differ by more than their intervals, or that only one card has."""
        return [c for c in self.changes if c.verdict not in ("same", "within noise")]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "before": self.before,
            "after": self.after,
            "facts": [list(f) for f in self.facts],
            "changes": [
                {
                    "section": c.section,
                    "name": c.measurement.name,
                    "group": dict(c.measurement.group),
                    "unit": c.measurement.unit,
                    "before": None if c.before is None else c.before.to_json(),
                    "after": None if c.after is None else c.after.to_json(),
                    "difference": c.difference if math.isfinite(c.difference) else None,
                    "verdict": c.verdict,
                }
                for c in self.changes
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.before} -> {self.after}"]
        lines += [f"  {label}: {a or '-'} -> {b or '-'}" for label, a, b in self.facts]
        for c in self.changed():
            m = c.measurement
            where = "".join(f" {k}={v}" for k, v in m.group.items())
            a = "-" if c.before is None else show_number(c.before.value)
            b = "-" if c.after is None else show_number(c.after.value)
            lines.append(f"  {c.verdict}: {m.name}{where}: {a} -> {b} {m.unit}".rstrip())
        same = len(self.changes) - len(self.changed())
        return "\n".join([*lines, f"  {same} numbers are the same or within noise"])


def diff_cards(before: Card, after: Card) -> CardDiff:
    """Pair the numbers of two cards by section, name and group; edits may differ."""
    facts = []
    a_facts, b_facts = dict(before.facts), dict(after.facts)
    for label in {**a_facts, **b_facts}:
        a, b = a_facts.get(label, ""), b_facts.get(label, "")
        if a != b:
            facts.append((label, a, b))
    first, second = _by_key(before), _by_key(after)
    changes = [Change(key[0], first.get(key), second.get(key)) for key in {**first, **second}]
    return CardDiff(before.name, after.name, tuple(facts), tuple(changes))


def _by_key(card: Card) -> dict[tuple[Any, ...], Measurement]:
    """A name that occurs twice in one section and group is told apart by its place."""
    out: dict[tuple[Any, ...], Measurement] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for section in card.sections:
        for m in (*section.result.measurements, *section.result.details):
            key = (section.id, m.name, tuple(sorted(m.group.items())))
            seen[key] = seen.get(key, 0) + 1
            out[key + (seen[key],)] = m
    return out
