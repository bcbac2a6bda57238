"""What only the author of a model knows: the fields of a model card, read from a small YAML file.

The fields are those of *Model Cards for Model Reporting* (Mitchell et al. 2019, section 4). Nothing
is invented here: a field that the author left empty reads "not provided".

    template("card.fill.yaml")            # write the empty file, with a comment for each field
    load_fill("card.fill.yaml").get("intended_use", "primary_uses")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from actlas.core.artifact import atomic_write
from actlas.core.errors import InputError, did_you_mean
from actlas.report.content import NOT_PROVIDED, plain

MAX_BYTES = 200_000
MAX_DEPTH = 64

FIELDS: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "model_details": (
        "Model details",
        {
            "developer": ("Developer", "person or organisation that developed the model"),
            "date": ("Date", "when this version was made"),
            "version": ("Version", "which version this is and how it differs from others"),
            "type": ("Type", "kind of model, if the architecture alone does not say it"),
            "training": ("Training", "training algorithm, parameters, features, fairness constraints"),
            "paper": ("Paper", "title or link of the paper or page with more information"),
            "citation": ("Citation", "how to cite it"),
            "license": ("Licence", "SPDX name, e.g. apache-2.0"),
            "contact": ("Contact", "where to send questions"),
            "language": ("Languages", "ISO 639-1 codes, e.g. [en, fr]"),
            "base_model": ("Base model", "the model it was made from, if any"),
            "tags": ("Tags", "words for search"),
        },
    ),
    "intended_use": (
        "Intended use",
        {
            "primary_uses": ("Primary uses", "what it was made for"),
            "primary_users": ("Primary users", "who it was made for"),
            "out_of_scope": ("Out of scope", "uses it was not made for or should not be put to"),
        },
    ),
    "factors": (
        "Factors",
        {
            "relevant": (
                "Relevant factors",
                "groups, instruments, environments that may change how well it works",
            ),
            "evaluation": ("Evaluation factors", "which of these are reported, and why these"),
        },
    ),
    "metrics": (
        "Metrics",
        {
            "performance": ("Performance measures", "which measures matter for the intended use, and why"),
            "thresholds": ("Decision thresholds", "thresholds that were chosen, before looking at groups"),
            "uncertainty": ("Uncertainty", "how variation was estimated outside of this card"),
        },
    ),
    "evaluation_data": (
        "Evaluation data",
        {
            "datasets": ("Datasets", "data it was evaluated on outside of this card"),
            "motivation": ("Motivation", "why these"),
            "preprocessing": ("Preprocessing", "how they were prepared"),
        },
    ),
    "training_data": (
        "Training data",
        {
            "datasets": ("Datasets", "what it was trained on"),
            "motivation": ("Motivation", "why these"),
            "preprocessing": ("Preprocessing", "how they were prepared"),
            "distribution": ("Distribution over factors", "at least how the factors are distributed in it"),
            "sha256": ("Hash", "SHA-256 of the training data; measuring on the same data is then refused"),
        },
    ),
    "ethical_considerations": (
        "Ethical considerations",
        {
            "data": ("Sensitive data", "does it use or reveal sensitive data"),
            "human_life": ("Human life", "does it inform decisions central to human life"),
            "mitigations": ("Mitigations", "what was done about risks"),
            "risks": ("Risks and harms", "who could be harmed, how likely, how badly"),
            "sensitive_uses": ("Sensitive uses", "uses that are known to be fraught"),
        },
    ),
    "caveats": (
        "Caveats and recommendations",
        {
            "caveats": ("Caveats", "what was not tested, which groups are missing"),
            "recommendations": ("Recommendations", "what a user should do or add"),
        },
    ),
}
"""The fields by section: heading, then for each field its label and what belongs into it."""


@dataclass(frozen=True)
class Fill:
    """The author's answers: `values[section][field]` is a line of text or a list of lines."""

    values: Mapping[str, Mapping[str, str | tuple[str, ...]]] = field(default_factory=dict)

    def get(self, section: str, name: str) -> str:
        """Return the answer as one line, or "not provided"."""
        value = self.values.get(section, {}).get(name, "")
        return (value if isinstance(value, str) else "; ".join(value)) or NOT_PROVIDED

    def many(self, section: str, name: str) -> tuple[str, ...]:
        """Return the answer as a list, empty if it was not given."""
        value = self.values.get(section, {}).get(name, ())
        return ((value,) if value else ()) if isinstance(value, str) else value

    def rows(self, section: str, *, skip: tuple[str, ...] = ()) -> tuple[tuple[str, str], ...]:
        """Return (label, answer) of every field of a section."""
        return tuple(
            (label, self.get(section, name))
            for name, (label, _) in FIELDS[section][1].items()
            if name not in skip
        )

    def missing(self) -> list[str]:
        """Return the fields without an answer, as `"section.field"`."""
        return [
            f"{section}.{name}"
            for section, (_, fields) in FIELDS.items()
            for name in fields
            if self.get(section, name) == NOT_PROVIDED
        ]


def load_fill(source: str | Path | Mapping[str, Any] | Fill | None) -> Fill:
    """Read a fill file.

    Args:
        source: path of a YAML file, the same as a dictionary, a `Fill`, or `None` for nothing filled.

    Raises:
        InputError: the file is missing, not UTF-8, over 200 kB or not plain YAML; a section or field
            is unknown; a value is not text, a number, a date or a list of these.
    """
    if source is None:
        return Fill()
    if isinstance(source, Fill):
        return source
    if isinstance(source, Mapping):
        return Fill(_checked(source, "fill"))
    path = Path(source)
    return Fill(_checked(read_yaml(path), str(path)))


def read_yaml(path: Path) -> Any:
    """Load a small YAML file safely (no objects are constructed, aliases are refused).

    Raises:
        InputError: it cannot be read; one line that says why and where.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; write an empty one with actlas.report.template({str(path)!r})"
        )
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} has {len(data):,} bytes; a fill file has at most {MAX_BYTES:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text with the safe loader; aliases (which can blow up in memory), deep nesting and long
    texts (which take very long) are refused.

    Raises:
        InputError: malformed YAML, with line and column.
    """
    if len(text) > MAX_BYTES:
        raise InputError(f"{where} has {len(text):,} characters of YAML; at most {MAX_BYTES:,} are read")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{where} uses YAML aliases (*name); write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(f"{where} nests deeper than {MAX_DEPTH} levels of YAML")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise InputError(f"{where} is not valid YAML{at}: {plain(error.problem or 'malformed')}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{where} is not valid YAML: {plain(error)[:200]}") from None


def template(path: str | Path | None = None) -> str:
    """Return the empty fill file with a comment for each field; write it too if `path` is given.

    Raises:
        InputError: `path` exists already (a filled file is never overwritten).
        FailureError: it cannot be written.
    """
    lines = [
        "# What only you know about this model, for `actlas card --fill FILE`.",
        '# Leave a field empty and the card says "not provided". Text, or a list of texts.',
    ]
    for section, (heading, fields) in FIELDS.items():
        lines += ["", f"{section}:  # {heading}"]
        lines += [f"  {name}:  # {about}" for name, (_, about) in fields.items()]
    text = "\n".join(lines) + "\n"
    if path is not None:
        if Path(path).exists():
            raise InputError(f"{path} exists already; give another name, or fill it in as it is")
        atomic_write(path, text)
    return text


def _checked(raw: Any, where: str) -> dict[str, dict[str, str | tuple[str, ...]]]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise InputError(
            f"{where} must hold sections with fields, not {type(raw).__name__}; see the template"
        )
    values: dict[str, dict[str, str | tuple[str, ...]]] = {}
    for section, fields in raw.items():
        if section not in FIELDS:
            hint = did_you_mean(str(section), FIELDS) or "; known: " + ", ".join(FIELDS)
            raise InputError(f"{where}: there is no section {plain(section)!r}{hint}")
        if fields is None:
            continue
        if not isinstance(fields, Mapping):
            raise InputError(f"{where}: {section} must hold fields, not {plain(fields)[:40]!r}")
        values[section] = {}
        for name, value in fields.items():
            known = FIELDS[section][1]
            if name not in known:
                hint = did_you_mean(str(name), known) or "; known: " + ", ".join(known)
                raise InputError(f"{where}: {section} has no field {plain(name)!r}{hint}")
            values[section][name] = _text(value, f"{where}: {section}.{name}")
    return values


def _text(value: Any, where: str) -> str | tuple[str, ...]:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, (list, tuple, Mapping)) or v is None for v in value):
            raise InputError(f"{where} must be a text or a list of texts")
        return tuple(line for line in (_word(v) for v in value) if line)
    if isinstance(value, Mapping):
        raise InputError(f"{where} must be a text or a list of texts, not a mapping")
    return _word(value)


def _word(value: Any) -> str:
    """YAML reads an unquoted `no` (Norwegian) as false and a date as a date."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(value)
