"""How complete and how consistent a model's folder is: its card, licence, weights, tokenizer, config.

    for m in audit("path/to/model"): print(m)

Source: *Deep Learning Model Reuse in the HuggingFace Community* (Taraghi et al. 2024) names what keeps
people from reusing models; each check here is one of these obstacles that a program can see. Nothing
is downloaded and no code of the folder is run; weights are read only as far as their headers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from actlas.core.errors import ActlasError, InputError
from actlas.core.measurement import Measurement
from actlas.report.content import plain
from actlas.report.folder import ModelFolder
from actlas.report.frontmatter import check_metadata, split_metadata
from actlas.report.headings import SECTIONS, Found, find_sections_of_card

FRONT_MATTER = ("license", "datasets", "language", "base_model", "model-index", "tags")
CARD_NAMES = ("README.md", "readme.md", "Readme.md", "card.md", "MODEL_CARD.md", "model_card.md", "README")
MAX_CHARACTERS = 2_000_000
TOLERANCE = 0.15
"""Declared and actual parameter counts may differ by rounding and by whether embeddings are counted."""

_LINK = re.compile(r"!?\[[^\[\]]{0,300}\]\(\s{0,4}<?([^()\s<>]{1,500})>?[^()]{0,200}\)")
_HTML_LINK = re.compile(r"""(?:src|href)\s{0,4}=\s{0,4}["']([^"'<>\s]{1,500})["']""", re.IGNORECASE)
_COUNT = re.compile(
    r"(?<![\w.,])(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)\s?(billion|million|thousand|b|m|k)?[\s-]{0,2}(?:trainable\s|total\s)?"
    r"parameters?\b",
    re.IGNORECASE,
)
_SIZE = {"billion": 1e9, "b": 1e9, "million": 1e6, "m": 1e6, "thousand": 1e3, "k": 1e3}
_CONTEXT = re.compile(
    r"context (?:length|window|size)\D{0,20}?(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)\s?(k\b)?", re.IGNORECASE
)


def audit(path: str | Path) -> list[Measurement]:
    """Check a model's documentation and files.

    Args:
        path: a folder with a model, a folder with a card, or a Markdown file.

    Returns:
        `"documentation completeness"` first (the mean over the nine sections and the six front-matter
        keys), then every single finding: 1 is present or consistent, 0 is not, `nan` could not be
        checked (the note says why); counts for links.

    Raises:
        InputError: the path does not exist, or holds neither a card nor a model.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder with a model or its card")
    folder = ModelFolder(path if path.is_dir() else path.parent)
    card = _card_file(path)
    if card is None and not folder.has_model:
        raise InputError(f"{path} holds no card (README.md) and no model (config.json, *.safetensors)")
    text, notes = _read(card)
    metadata: dict[str, Any] = {}
    readable = ""
    try:
        metadata, body = split_metadata(text, card.name if card else "the card")
    except ActlasError as error:
        readable, body = plain(error), _without_block(text)
    sections = find_sections_of_card(body)
    return [
        _completeness(sections, metadata, notes),
        *(_section(found) for found in sections.values()),
        *_front_matter(metadata, readable, bool(text)),
        _licence(metadata, folder),
        _links(body, folder.path, bool(text)),
        *_files(folder, body),
    ]


def completeness(text: str) -> float:
    """Return the completeness of a card's Markdown, between 0 and 1 (see `audit`)."""
    try:
        metadata, body = split_metadata(text)
    except ActlasError:
        metadata, body = {}, _without_block(text)
    return _completeness(find_sections_of_card(body), metadata, []).value


def _completeness(
    sections: Mapping[str, Found], metadata: Mapping[str, Any], notes: list[str]
) -> Measurement:
    there = [s for s in SECTIONS if sections[s].present]
    keys = [k for k in FRONT_MATTER if _filled(metadata.get(k))]
    missing = [s for s in SECTIONS if s not in there] + [k for k in FRONT_MATTER if k not in keys]
    total = len(SECTIONS) + len(FRONT_MATTER)
    said = [f"missing: {', '.join(missing)}"] if missing else ["nothing is missing"]
    return Measurement(
        "documentation completeness",
        (len(there) + len(keys)) / total,
        "fraction",
        total,
        better="higher",
        note="; ".join([*said, *notes]),
        details={"missing": missing, "sections": there, "front matter": keys},
    )


def _section(found: Found) -> Measurement:
    note = f"{found.words} words, {found.tables} tables"
    return _check("section present", found.present, note, group={"section": found.section})


def _front_matter(metadata: Mapping[str, Any], unreadable: str, has_card: bool) -> list[Measurement]:
    if not has_card:
        return [_check("front matter readable", None, "there is no card")]
    problems = check_metadata(metadata) if metadata else []
    out = [
        _check("front matter readable", not unreadable, unreadable or ("" if metadata else "there is none"))
    ]
    valid = None if unreadable or not metadata else not problems
    out.append(_check("front matter valid", valid, "; ".join(map(plain, problems[:3]))))
    return out + [
        _check("front matter key present", _filled(metadata.get(key)), "", group={"key": key})
        for key in FRONT_MATTER
    ]


def _licence(metadata: Mapping[str, Any], folder: ModelFolder) -> Measurement:
    named = metadata.get("license")
    if _filled(named):
        return _check("licence present", True, f"front matter says {plain(named)[:80]}")
    file = next((n for n in folder.names if re.match(r"(licen[cs]e|copying)(\.|$)", n, re.IGNORECASE)), None)
    return _check(
        "licence present", file is not None, f"file {file}" if file else "neither front matter nor a file"
    )


def _links(text: str, folder: Path, has_card: bool) -> Measurement:
    if not has_card:
        return Measurement("broken relative links", math.nan, "count", 0, note="there is no card")
    targets = list(dict.fromkeys(_LINK.findall(text) + _HTML_LINK.findall(text)))
    relative = [t for t in targets if not re.match(r"[a-z][a-z0-9+.-]*:|//|#|/", t, re.IGNORECASE)]
    broken = [t for t in relative if not _exists(folder, t)]
    note = "broken: " + ", ".join(plain(b) for b in broken[:5]) if broken else f"{len(relative)} checked"
    return Measurement(
        "broken relative links", float(len(broken)), "count", len(relative), better="lower", note=note,
        details={"broken": broken[:100]},
    )  # fmt: skip


def _exists(folder: Path, target: str) -> bool:
    name = unquote(re.split(r"[?#]", target, maxsplit=1)[0])
    try:
        whole = (folder / name).resolve()
        return not name or (whole.is_relative_to(folder.resolve()) and whole.exists())
    except (OSError, ValueError):
        return False


def _files(folder: ModelFolder, card: str) -> list[Measurement]:
    """Consistency of weights, tokenizer, config and what the card says."""
    if not folder.has_model:
        return []
    config, actual = folder.config, folder.parameters
    out = [_check("weights complete", *folder.weights_complete())]
    out.append(_check("weights without pickle", not folder.pickles, ", ".join(folder.pickles[:3])))
    out.append(_check("config readable", config is not None, folder.config_problem))
    out.append(_check("tokenizer fits config", *folder.tokenizer_fits()))
    out.append(_check("embedding fits config", *folder.embedding_fits()))
    out.append(_check("dtype fits config", *folder.dtype_fits()))
    declared = _declared(card)
    if actual is None or declared is None:
        why = "no parameter count could be read" if actual is None else "the card names no parameter count"
        out.append(_check("declared parameters fit weights", None, why))
    else:
        note = f"card {declared:,.0f}, weights {actual:,}"
        out.append(
            _check("declared parameters fit weights", abs(declared - actual) <= TOLERANCE * actual, note)
        )
    if actual is not None:
        out.append(Measurement("parameters in weights", float(actual), "count", 1))
    length = folder.context_length
    said = _said_context(card)
    if length is None or said is None:
        why = "the config sets no context length" if length is None else "the card names no context length"
        out.append(_check("declared context fits config", None, why))
    else:
        note = f"card {said:,.0f}, config {length:,}"
        out.append(_check("declared context fits config", abs(said - length) <= 0.03 * length, note))
    return out


def _declared(card: str) -> float | None:
    found = _COUNT.search(card)
    if found is None:
        return None
    value = float(found.group(1).replace(",", "")) * _SIZE.get((found.group(2) or "").lower(), 1.0)
    return value if value >= 1000 else None


def _said_context(card: str) -> float | None:
    found = _CONTEXT.search(card)
    if found is None:
        return None
    return float(found.group(1).replace(",", "")) * (1024 if found.group(2) else 1)


def _check(name: str, ok: bool | None, note: str, group: Mapping[str, str] | None = None) -> Measurement:
    value = math.nan if ok is None else float(ok)
    n = 0 if ok is None else 1
    return Measurement(name, value, "fraction", n, better="higher", note=plain(note), group=dict(group or {}))


def _filled(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_filled(v) for v in value)
    if isinstance(value, Mapping):
        return bool(value)
    text = str(value if value is not None else "").strip().lower()
    return (
        bool(text)
        and text not in ("unknown", "none", "todo", "tbd", "n/a", "not provided", "[]")
        and ("more information needed" not in text)
    )


def _card_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    return next((path / name for name in CARD_NAMES if (path / name).is_file()), None)


def _read(card: Path | None) -> tuple[str, list[str]]:
    """Return the text (bytes that are not UTF-8 replaced, at most 2 million characters) and notes."""
    if card is None:
        return "", ["there is no card"]
    notes = []
    with card.open("rb") as file:
        data = file.read(4 * MAX_CHARACTERS + 1)
    try:
        text = data[: 4 * MAX_CHARACTERS].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", errors="replace")
        if error.start < 4 * MAX_CHARACTERS - 4:
            notes.append(f"{card.name} is not UTF-8 text (byte {error.start})")
    if len(text) > MAX_CHARACTERS:
        notes.append(f"only the first {MAX_CHARACTERS:,} characters of {card.name} were read")
        text = text[:MAX_CHARACTERS]
    return text, notes


def _without_block(text: str) -> str:
    """The text after a front-matter block that could not be parsed."""
    parts = re.split(r"^---[ \t]*$", text.removeprefix("\ufeff"), maxsplit=2, flags=re.MULTILINE)
    return parts[2] if len(parts) == 3 and not parts[0].strip() else text
