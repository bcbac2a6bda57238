"""Intended use and limits: what only the author can say, field by field, and what this card cannot."""

from __future__ import annotations

from actlas.report.content import SectionResult, Table
from actlas.report.fill import FIELDS
from actlas.report.registry import Context, section

SHOWN = ("intended_use", "training_data", "ethical_considerations", "caveats")


@section("use", title="Intended use and limits", order=20, cost=0.05)
def intended_use(context: Context) -> SectionResult:
    """Show the author's answers; an empty field reads "not provided"."""
    missing = [m for m in context.fill.missing() if m.partition(".")[0] in SHOWN]
    total = sum(len(FIELDS[name][1]) for name in SHOWN)
    intro = "These fields are written by the author of the card; nothing in them is measured or invented."
    if missing:
        intro += f" {len(missing)} of {total} are not provided; `actlas card --fill FILE` fills them in."
    tables = [Table(FIELDS[name][0], ("Field", "Answer"), context.fill.rows(name)) for name in SHOWN]
    return SectionResult(intro=intro, tables=tables, notes=_limits(context))


def _limits(context: Context) -> list[str]:
    """What every card of this kind leaves open, as far as the machine knows it."""
    notes = []
    if context.budget.quick:
        notes.append(
            "This is a quick card: small samples, wide intervals. The full card reads about ten times "
            "as much."
        )
    if context.model.kind in ("causal-lm", "encoder", "seq2seq"):
        notes.append(
            "The texts and prompts that were measured on are in English; other languages were not tested."
        )
    if context.model.kind == "causal-lm":
        notes.append("Safety, toxicity and factual reliability of generated text were not tested.")
    notes.append("One seed was used; intervals show sampling of items, not of training runs.")
    return notes
