"""The metadata block of `card.md`: what the Hugging Face Hub reads of a model card.

Groups and intervals do not fit into its flat `model-index`; they stay in `card.json`. The schema is
the one that `huggingface_hub.ModelCardData` reads: language, license, library_name, pipeline_tag,
tags and `model-index` with task, dataset and metrics for every result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.report.content import Section, plain
from actlas.report.fill import Fill, parse_yaml

PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
    "encoder": "feature-extraction",
    "image-classifier": "image-classification",
    "image-text": "zero-shot-image-classification",
    "speech": "automatic-speech-recognition",
}
DATA_KEYS = ("task", "domain", "images", "corpus", "pairs")
"""A measurement whose group is exactly one of these is a result on that data set."""

LICENSES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openmdw-1.0",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "grok2-community",
        "gemma",
        "unknown",
        "other",
    ]
)
"""Licence names that the Hub knows; anything else goes into `license_name` beside `license: other`."""

_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")


def build_metadata(
    name: str, kind: str, sections: Sequence[Section], fill: Fill, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the metadata of a card as a plain dictionary.

    Args:
        name: name of the model.
        kind: `Model.kind`.
        sections: the measured sections.
        fill: what the author wrote; it wins over `known`.
        known: `license`, `language`, `library_name` that the model itself tells.
    """
    known = known or {}
    data: dict[str, Any] = {}
    language = [word.lower() for word in fill.many("model_details", "language")] or list(
        known.get("language", ())
    )
    if language:
        data["language"] = language
    said = fill.many("model_details", "license")
    licence = (said[0] if said else str(known.get("license") or "")).strip()
    if licence.lower() in LICENSES:
        data["license"] = licence.lower()
    elif licence:
        data["license"] = "other"
        data["license_name"] = re.sub(r"[^a-z0-9.+-]+", "-", licence.lower()).strip("-") or "see-card"
    data["library_name"] = str(known.get("library_name") or "pytorch")
    if kind in PIPELINES:
        data["pipeline_tag"] = PIPELINES[kind]
    data["tags"] = list(dict.fromkeys(["actlas", "activation-card", *fill.many("model_details", "tags")]))
    base = [b for b in fill.many("model_details", "base_model") if _REPOSITORY.match(b)]
    if base:
        data["base_model"] = base[0] if len(base) == 1 else base
    datasets = [d for d in fill.many("training_data", "datasets") if _REPOSITORY.match(d)]
    if datasets:
        data["datasets"] = datasets
    results = _results(sections, PIPELINES.get(kind, "other"))
    if results:
        data["model-index"] = [{"name": name, "results": results}]
    return data


def _results(sections: Sequence[Section], task: str) -> list[dict[str, Any]]:
    by_data: dict[str, list[dict[str, Any]]] = {}
    for section in sections:
        for m in section.result.measurements:
            where = _data_of(m)
            if where is None or not math.isfinite(m.value):
                continue
            kind = re.sub(r"[^a-z0-9]+", "_", m.name.lower()).strip("_")
            metric = {"type": kind, "value": float(f"{m.value:.6g}"), "name": f"{m.name} ({m.unit})"}
            metrics = by_data.setdefault(where, [])
            if all(metric["name"] != other["name"] for other in metrics):
                metrics.append(metric)
    return [
        {
            "task": {"type": task},
            "dataset": {"type": re.sub(r"[^A-Za-z0-9_.-]+", "-", f"actlas-{where}"), "name": where},
            "metrics": metrics,
        }
        for where, metrics in by_data.items()
    ]


def _data_of(m: Measurement) -> str | None:
    if m.name.startswith(("largest gap", "change of")):
        return None
    keys = list(m.group)
    return m.group[keys[0]] if len(keys) == 1 and keys[0] in DATA_KEYS else None


def dump_metadata(data: Mapping[str, Any]) -> str:
    """Return the block with its `---` lines; an empty text if there is no metadata."""
    if not data:
        return ""
    text = yaml.safe_dump(_tidy(dict(data)), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---\n"


def _tidy(value: Any) -> Any:
    """Texts on one line without control characters, which YAML would read back differently."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain(k): _tidy(v) for k, v in value.items()}
    return [_tidy(v) for v in value] if isinstance(value, (list, tuple)) else value


def split_metadata(text: str, where: str = "the card") -> tuple[dict[str, Any], str]:
    """Split a card into its metadata and the rest.

    Returns:
        The metadata (empty if there is none) and the text after it.

    Raises:
        InputError: the block is not valid YAML, or not a mapping.
    """
    text = text.removeprefix("\ufeff")
    match = _BLOCK.match(text)
    if match is None:
        return {}, text
    data = parse_yaml(match.group(1), f"the front matter of {where}")
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InputError(
            f"the front matter of {where} must be `key: value` lines, not {plain(type(data).__name__)}"
        )
    return data, text[match.end() :]


def check_metadata(data: Mapping[str, Any]) -> list[str]:
    """Return what the Hub would refuse in this metadata, one line each; empty if it is fine."""
    wrong = []
    for key in ("library_name", "pipeline_tag", "license", "license_name", "license_link"):
        if key in data and not isinstance(data[key], str):
            wrong.append(f"{key} must be a text, not {data[key]!r}")
    if isinstance(data.get("license"), str) and data["license"] not in LICENSES:
        wrong.append(
            f"license {data['license']!r} is not one that the Hub knows; use `other` with license_name"
        )
    if data.get("license") == "other" and not data.get("license_name"):
        wrong.append("license `other` needs license_name")
    for key in ("language", "tags", "datasets", "base_model"):
        value = data.get(key)
        many = value if isinstance(value, list) else [] if value is None else [value]
        wrong += [
            f"{key} must hold texts, not {item!r}" for item in many if not isinstance(item, str) or not item
        ]
    if "model-index" in data:
        wrong += _check_index(data["model-index"])
    return wrong


def _check_index(index: Any) -> list[str]:
    if not isinstance(index, list) or not index:
        return ["model-index must be a list with one entry a model"]
    wrong = []
    for model in index:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model["name"]:
            wrong.append("model-index: every model needs a name")
            continue
        results = model.get("results")
        if not isinstance(results, list) or not results:
            wrong.append("model-index: every model needs a list of results")
            continue
        for number, result in enumerate(results, 1):
            wrong += [f"model-index, result {number}: {line}" for line in _check_result(result)]
    return wrong


def _check_result(result: Any) -> list[str]:
    if not isinstance(result, dict):
        return ["it must have task, dataset and metrics"]
    wrong = []
    for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
        value = result.get(part)
        wrong += [
            f"{part}.{key} is missing or not a text"
            for key in keys
            if not isinstance(value, dict) or not isinstance(value.get(key), str) or not value[key]
        ]
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*wrong, "metrics must be a list with at least one entry"]
    for metric in metrics:
        if (
            not isinstance(metric, dict)
            or not isinstance(metric.get("type"), str)
            or metric.get("value") is None
        ):
            wrong.append("every metric needs a type and a value")
    if "source" in result and (not isinstance(result["source"], dict) or not result["source"].get("url")):
        wrong.append("source needs a url")
    return wrong
