"""Audit: is something between this model and its weights, and what does it do?

    report = audit(model)                                    # or audit(model, reference=known)
    report.clean
    report.findings                                          # what, where, in words
    report.changes[0].vector                                 # a vector that is added to the stream

Three looks that miss different things:

| look | finds | misses |
| --- | --- | --- |
| `inventory` | hooks, swapped methods, parametrisations, foreign modules and tensors | changed weights |
| `reexecution` | what is added to the stream on the given texts | changed weights; absent triggers |
| `fingerprint` | any change of weights, edits or hooks | nothing, but it needs a known good state |

Edits that are meant to be there are named in `allowed`.

Source: Wang and Shu 2023, "Backdoor Activation Attack", proposes a model checker; the looks are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actlas.core.edit import Edit
from actlas.core.errors import ModelError
from actlas.core.measurement import Measurement
from actlas.measure.statistics import rate_measurement
from actlas.security.fingerprint import StateFingerprint, differences, fingerprint
from actlas.security.inventory import Finding, inventory
from actlas.security.reexecution import Change, reexecute

if TYPE_CHECKING:
    from actlas.core.model import Model

TEXTS = (
    "The committee met on Tuesday to discuss the new bridge over the river.",
    "Q: What is the capital of France?\nA:",
    "def add(a, b):\n    return a + b",
)


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        findings: everything that changes or could change what the model computes.
        changes: what is added to the stream, one entry a place.
        measurements: how much was looked at.
        notes: what could not be looked at, and why.
    """

    findings: tuple[Finding, ...]
    changes: tuple[Change, ...]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "clean": self.clean,
            "findings": [f.to_json() for f in self.findings],
            "measurements": [m.to_json() for m in self.measurements],
            "notes": list(self.notes),
        }


def audit(
    model: Model,
    reference: StateFingerprint | Model | None = None,
    *,
    texts: Sequence[Any] | Any = TEXTS,
    allowed: Sequence[Edit] = (),
) -> AuditReport:
    """Look for whatever changes a model's activations.

    Args:
        model: the model as it runs now; it is left as it is.
        reference: a fingerprint of its known good state, or a model known to be good.
        texts: inputs for the re-execution; for a model that reads no text, its inputs.
        allowed: installed edits that are meant to be there: they are taken out for the audit, and all
            others stay.

    Raises:
        InputError: inputs that the model cannot read.
    """
    with ExitStack() as stack:
        if allowed:
            known = {id(part) for edit in allowed for part in edit.parts()}
            rest = [edit for edit in model.installed if id(edit) not in known]
            stack.enter_context(model.without_edits())
            if rest:
                stack.enter_context(model.edit(*rest))
        return _audit(model, reference, texts)


def _audit(model: Model, reference: StateFingerprint | Model | None, texts: Any) -> AuditReport:
    findings = inventory(model)
    notes = []
    measurements = [
        Measurement("modules inspected", sum(1 for _ in model.module.modules()), "count", 1),
    ]
    changes: list[Change] = []
    try:
        if model.tokenizer is None and texts is TEXTS:
            raise ModelError(f"{model.name} has no tokenizer; give inputs that it reads")
        given = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, tuple) else texts
        changes = reexecute(model, model.encode(given, truncate=True))
        parts = (
            sum(t.n_blocks + bool(t.norm) + bool(t.unembed) for t in model.layout.towers)
            if model.layout
            else 0
        )
        places = len({c.site for c in changes})
        measurements.append(
            rate_measurement(
                "parts changed",
                [1] * min(places, parts) + [0] * max(parts - places, 0),
                better="lower",
                note="blocks, final norm and head, run again without hooks",
            )
        )
        measurements.append(
            Measurement(
                "largest change",
                max((c.relative for c in changes), default=0.0),
                "of the median norm",
                parts,
                better="lower",
            )
        )
    except ModelError as error:
        notes.append(f"not run again: {error}")
    findings += [change.finding() for change in changes]
    if reference is not None:
        known = reference if isinstance(reference, StateFingerprint) else fingerprint(reference)
        different = differences(known, fingerprint(model))
        listed = {f.said for f in findings}
        said = [d for d in different if d.removeprefix("edit installed: ") not in listed]
        findings += [Finding("weights", "", d) for d in said if d.startswith(("tensor", "architecture"))]
        findings += [Finding("edit", "", d) for d in said if d.startswith("edit gone")]
        measurements.append(
            Measurement("differences from the reference", len(different), "count", len(known.tensors))
        )
    else:
        notes.append("weights were not compared: give a reference (a fingerprint, or the original model)")
    return AuditReport(tuple(findings), tuple(changes), tuple(measurements), tuple(notes))
