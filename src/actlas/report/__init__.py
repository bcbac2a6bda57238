"""Reports: cards made of measurements, disaggregated evaluation, and audits of models' documentation.

from actlas.report import card, evaluate, audit, explain_output, doctor
card("smollm2")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actlas.report.auditing import audit
    from actlas.report.build import card
    from actlas.report.cards import Card
    from actlas.report.content import DataUse, Figure, SectionResult, Table, Tile
    from actlas.report.diagnosis import doctor
    from actlas.report.evaluation import Evaluation, changes, evaluate
    from actlas.report.fill import load_fill, template
    from actlas.report.outputs import explain_output
    from actlas.report.registry import Context, known_sections, section

__all__ = [
    "Card",
    "Context",
    "DataUse",
    "Evaluation",
    "Figure",
    "SectionResult",
    "Table",
    "Tile",
    "audit",
    "card",
    "changes",
    "doctor",
    "evaluate",
    "explain_output",
    "load_fill",
    "section",
    "known_sections",
    "template",
]

_HOMES = {
    "Card": "actlas.report.cards",
    "Context": "actlas.report.registry",
    "DataUse": "actlas.report.content",
    "Evaluation": "actlas.report.evaluation",
    "Figure": "actlas.report.content",
    "SectionResult": "actlas.report.content",
    "Table": "actlas.report.content",
    "Tile": "actlas.report.content",
    "audit": "actlas.report.auditing",
    "card": "actlas.report.build",
    "changes": "actlas.report.evaluation",
    "doctor": "actlas.report.diagnosis",
    "evaluate": "actlas.report.evaluation",
    "explain_output": "actlas.report.outputs",
    "load_fill": "actlas.report.fill",
    "section": "actlas.report.registry",
    "known_sections": "actlas.report.registry",
    "template": "actlas.report.fill",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
