"""What the model is: architecture, sizes, fingerprint, tokenizer, source, and who made it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actlas.core.measurement import Measurement
from actlas.report.content import NOT_PROVIDED, SectionResult, Table, Tile, plain
from actlas.report.registry import Context, section

if TYPE_CHECKING:
    from actlas.core.model import Model

KINDS = {
    "causal-lm": "causal language model",
    "encoder": "text encoder",
    "seq2seq": "sequence-to-sequence model",
    "image-classifier": "image classifier",
    "image-encoder": "image encoder",
    "image-text": "image-text model",
    "speech": "speech model",
    "module": "PyTorch module",
}


@section("identity", title="Model details", order=10, cost=0.3)
def identity(context: Context) -> SectionResult:
    """Read everything from the model itself; what only its author knows comes from the fill file."""
    model, fill = context.model, context.fill
    fingerprint = model.fingerprint.to_json()
    known = known_about(model)
    licence = fill.get("model_details", "license")
    if licence == NOT_PROVIDED and known.get("license"):
        licence = str(known["license"])
    parameters = count_parameters(model)
    facts = [
        ("Architecture", str(fingerprint["architecture"])),
        ("Kind", KINDS.get(model.kind, model.kind)),
        ("Parameters", f"{parameters['all']:,}"),
        *([("Blocks", f"{model.n_blocks} of width {model.d_model}")] if model.n_blocks else []),
        *([("Context", f"{model.context_length:,} tokens")] if model.context_length else []),
        ("Data type", str(model.dtype).removeprefix("torch.")),
        ("Licence", licence),
        ("Developer", fill.get("model_details", "developer")),
    ]
    context.shared["identity"] = {
        "facts": facts,
        "summary": summary_of(model, parameters["all"]),
        "fingerprint": fingerprint,
        "known": known,
    }
    rows = [(label, text) for label, text in _architecture(model, parameters) if text]
    details = [
        (label, licence if label == "Licence" else text)
        for label, text in fill.rows("model_details", skip=("tags",))
    ]
    number = Measurement("parameters", float(parameters["all"]), "count", 1)
    origin = source_of(model)
    source = f" It was loaded from {origin}." if origin else ""
    return SectionResult(
        intro=(
            "The first table is read from the model that was measured; the second holds what its author "
            f"wrote for this card.{source}"
        ),
        tables=[
            Table("Architecture", ("Field", "Value"), tuple(rows)),
            Table("Provenance", ("Field", "Answer"), tuple(details)),
        ],
        notes=_site_notes(model),
        tiles=[Tile("Parameters", number, show=short_count(parameters["all"]), rank=5)],
    )


def source_of(model: Model) -> str:
    """Return where the model came from; of a local path only its last part, not the user's folders."""
    if model.source in ("", "module"):
        return ""
    path = Path(model.source)
    return plain(f"local: {path.name}" if path.is_absolute() else model.source)


def summary_of(model: Model, parameters: int) -> str:
    """Return one sentence about the model."""
    kind = KINDS.get(model.kind, model.kind)
    text = (
        f"A {kind} with {short_count(parameters)} parameters"
        if kind[0] not in "aeiou"
        else (f"An {kind} with {short_count(parameters)} parameters")
    )
    if model.n_blocks:
        text += f": {model.n_blocks} blocks of width {model.d_model}"
        if model.n_heads:
            text += f", {model.n_heads} attention heads"
            if model.n_kv_heads and model.n_kv_heads != model.n_heads:
                text += f" that share {model.n_kv_heads} key-value heads"
    return text + "."


def count_parameters(model: Model) -> dict[str, int]:
    """Return the number of parameters: all, embeddings, buffers (a shared tensor counts once)."""
    from torch import nn

    tables = {id(m.weight): m.weight.numel() for m in model.module.modules() if isinstance(m, nn.Embedding)}
    return {
        "all": sum(p.numel() for p in model.module.parameters()),
        "embeddings": sum(tables.values()),
        "buffers": sum(b.numel() for b in model.module.buffers()),
    }


def short_count(n: int) -> str:
    """Return `"134.5 M"` for 134,515,008."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.4g} {letter}"
    return str(n)


def known_about(model: Model) -> dict[str, Any]:
    """Return licence, languages and library that are known without asking the author."""
    homes = {c.__module__.partition(".")[0] for c in type(model.module).__mro__}
    library = "transformers" if "transformers" in homes else "pytorch"
    known: dict[str, Any] = {"library_name": library}
    from actlas.models import bundled

    entry = bundled().get(model.name)
    for field, names in {"license": ("license", "licence"), "language": ("language", "languages")}.items():
        for name in names:
            value = getattr(entry, name, None)
            if value:
                known[field] = (value,) if field == "language" and isinstance(value, str) else value
    return known


def _architecture(model: Model, parameters: dict[str, int]) -> list[tuple[str, str]]:
    fingerprint = model.fingerprint
    config = model.config

    def number(value: int | None) -> str:
        return f"{value:,}" if isinstance(value, int) else ""

    heads = number(model.n_heads)
    if model.n_kv_heads and model.n_kv_heads != model.n_heads:
        heads += f" query, {model.n_kv_heads} key-value"
    tied = getattr(config, "tie_word_embeddings", None) if model.vocab_size else None
    tokenizer = type(model.tokenizer).__name__ if model.tokenizer is not None else ""
    if tokenizer:
        tokenizer += f", {len(model.tokenizer):,} entries"
    return [
        ("Class", fingerprint.architecture),
        ("Family", model.layout.family if model.layout else "none known: sites are `module:` paths"),
        ("Parameters", f"{parameters['all']:,}"),
        ("of these in embeddings", number(parameters["embeddings"] or None)),
        ("Buffers", number(parameters["buffers"] or None)),
        ("Blocks", number(model.n_blocks)),
        ("Width", number(model.d_model)),
        ("Attention heads", heads),
        ("Head width", number(model.head_dim)),
        ("MLP width", number(model.d_mlp)),
        ("Activation function", str(_activation(config) or "")),
        ("Vocabulary", number(model.vocab_size)),
        (
            "Output tied to embedding",
            {True: "yes", False: "no"}.get(tied, "") if isinstance(tied, bool) else "",
        ),
        ("Context length", f"{model.context_length:,} tokens" if model.context_length else ""),
        ("Classes", number(_classes(model))),
        ("Tokenizer", tokenizer),
        ("Data type, device", f"{str(model.dtype).removeprefix('torch.')}, {model.device}"),
        ("Source", source_of(model)),
        ("Fingerprint of shapes", fingerprint.shapes[:16]),
        ("Fingerprint of tokenizer", (fingerprint.tokenizer or "")[:16]),
        ("Library", _library(model)),
    ]


def _activation(config: Any) -> Any:
    for name in ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return value
    return None


def _classes(model: Model) -> int | None:
    labels = getattr(model.config, "id2label", None)
    return len(labels) if model.kind == "image-classifier" and labels else None


def _library(model: Model) -> str:
    package = type(model.module).__module__.partition(".")[0]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package if package not in ("__main__", "builtins") else ""


def _site_notes(model: Model) -> list[str]:
    if model.layout is None:
        return ["No layout is known for this architecture: activations are read through `module:` sites."]
    sites = model.sites()
    absent = [s for s in sites if s.absent]
    notes = [f"{len(sites) - len(absent):,} canonical sites can be read and edited (`actlas sites`)."]
    reasons: dict[str, dict[str, None]] = {}
    for site in absent:
        reasons.setdefault(plain(site.absent), {})[site.kind] = None
    for reason, kinds in reasons.items():
        notes.append(f"Absent here: {', '.join(f'`{kind}`' for kind in kinds)} ({reason}).")
    return notes
