"""`card(...)`: measure a model and write its card.

    card("smollm2")                                  # card/card.html, card.md, card.json
    card(model, "out", edits=[vector * 4])           # before and after, per group

Sections run one after the other on one model, with the card's edits installed. One that cannot be
measured is shown with its reason and the others go on. Files are written at the very end, all at once,
so an interrupted run leaves no half-written card.
"""

from __future__ import annotations

import contextlib
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actlas.core.errors import ActlasError, InputError
from actlas.core.progress import progress
from actlas.report.budget import Budget, budget_for
from actlas.report.cards import Card, clean
from actlas.report.content import Section, SectionResult, plain
from actlas.report.fill import Fill, load_fill
from actlas.report.frontmatter import build_metadata
from actlas.report.registry import Context, SectionInfo, find_sections
from actlas.report.saving import check_target

if TYPE_CHECKING:
    from torch import nn

    from actlas.core.edit import Edit
    from actlas.core.model import Model

DEFAULT_MODEL = "smollm2"


def card(
    model: Model | nn.Module | str | Path | None = None,
    out: str | Path | None = "card",
    *,
    quick: bool = True,
    seed: int = 0,
    fill: str | Path | Mapping[str, Any] | Fill | None = None,
    sections: Sequence[str] | None = None,
    edits: Sequence[Edit] = (),
    budget: Budget | None = None,
    example: Any = None,
    force: bool = False,
    command: str = "",
    debug: bool = False,
) -> Card:
    """Measure a model and write `card.html`, `card.md` and `card.json` into a folder.

    Args:
        model: a Model, an `nn.Module`, a bundled name, a hub name or a folder; `None` is `smollm2`.
        out: the folder to write, or `None` to write nothing. An older card in it is replaced.
        quick: about two minutes for 135 million parameters on two cores, or about ten times as long.
        seed: of every random choice.
        fill: what only the author knows: the path of a YAML file (see `template`), or a dictionary.
        sections: ids of the sections to measure; `None` is all that make sense for the model.
        edits: the card describes the model with these edits, and what they change per group.
        budget: instead of the planned one.
        example: an input (tensor, tuple, dictionary) for a module that is neither for text nor images.
        force: measure also on data whose hash the fill file gives as training data, and say so.
        command: how the card was asked for, for the record; by default this Python call.
        debug: let unexpected errors of a section through instead of noting them on the card.

    Raises:
        InputError: unknown model or section, bad fill file, a folder that holds something else.
        FailureError: the card could not be written (disk full, no permission).
    """
    if out is not None:
        check_target(out)
    answers = load_fill(fill)
    chosen = find_sections(list(sections) if sections is not None else None)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a whole number from 0, not {seed!r}")
    start = time.perf_counter()
    loaded = _load(model)
    load_seconds = time.perf_counter() - start
    context = Context(
        model=loaded,
        budget=budget or budget_for(_parameters(loaded), quick=quick),
        seed=seed,
        fill=answers,
        edits=tuple(edits),
        command=command or _call(model, out, quick, seed, fill, sections, edits),
        example=example,
        force=force,
    )
    context.shared["load seconds"] = load_seconds
    fits = [s for s in chosen if s.applies_to(loaded.kind)]
    context.shared["left out"] = [
        f"{s.title}: makes no sense for a model of kind `{loaded.kind}`" for s in chosen if s not in fits
    ]
    made: list[Section] = []
    context.shared["sections"] = made
    with _untouched(loaded), _edited(loaded, tuple(edits)):
        with progress(f"card of {loaded.name}", total=sum(s.cost for s in fits)) as advance:
            for info in fits:
                advance(0, note=info.title)
                made.append(_run(info, context, debug))
                advance(info.cost, note=info.title)
    result = _assemble(context, made, time.perf_counter() - start)
    if out is not None:
        result.save(out)
    return result


def _run(info: SectionInfo, context: Context, debug: bool) -> Section:
    start = time.perf_counter()
    try:
        result = info.function(context)
        drawn = [f for f in result.figures if f.table is not None]  # a plot without data is left out
        result = replace(result, figures=drawn)
    except ActlasError as error:
        result = SectionResult(reason=plain(error))
    except MemoryError:
        result = SectionResult(reason="it needs more memory than there is")
    except Exception as error:
        if debug:
            raise
        result = SectionResult(
            reason=f"unexpected {type(error).__name__}: {plain(error)[:200]} (see it with debug)"
        )
    return Section(info.id, info.title, result, round(time.perf_counter() - start, 2))


def _load(model: Model | nn.Module | str | Path | None) -> Model:
    if hasattr(model, "fingerprint") and hasattr(model, "module"):
        return model  # type: ignore[return-value]
    from actlas.models import load

    return load(DEFAULT_MODEL if model is None else model)


def _parameters(model: Model) -> int:
    return sum(p.numel() for p in model.module.parameters())


@contextlib.contextmanager
def _untouched(model: Model) -> Iterator[None]:
    """Measure in eval mode and without gradients, and leave the module as it was found."""
    import torch

    training = [m for m in model.module.modules() if m.training]
    model.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _edited(model: Model, edits: tuple[Edit, ...]) -> Iterator[None]:
    if not edits:
        yield
        return
    with model.edit(*edits):
        yield


def _assemble(context: Context, sections: list[Section], seconds: float) -> Card:
    from actlas.report.sections.identity import summary_of

    model = context.model
    identity: Mapping[str, Any] = context.shared.get("identity", {})
    tiles = sorted((t for s in sections for t in s.result.tiles), key=lambda t: t.rank)
    known = identity.get("known", {})
    return Card(
        name=model.name,
        kind=model.kind,
        summary=identity.get("summary") or summary_of(model, _parameters(model)),
        facts=tuple(identity.get("facts", ())),
        tiles=[replace(t, label=plain(t.label), remark=plain(t.remark), show=plain(t.show)) for t in tiles],
        sections=sections,
        metadata=build_metadata(model.name, model.kind, sections, context.fill, known),
        provenance=clean({**provenance(context), "seconds": round(seconds, 1)}),
        fingerprint=clean(identity.get("fingerprint", {})),
        under=[e.describe() for e in context.edits],
    )


def provenance(context: Context) -> dict[str, Any]:
    """Return how the card is made: command, seed, budget, versions and machine."""
    import importlib.metadata

    import torch

    versions = {}
    for package in ("actlas", "torch", "transformers", "tokenizers", "numpy", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": context.command,
        "seed": context.seed,
        "quick": context.budget.quick,
        "budget": vars(context.budget),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": str(context.model.device),
        "dtype": str(context.model.dtype).removeprefix("torch."),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return plain(line.partition(":")[2])
    return plain(platform.processor()) or "unknown"


def _call(
    model: Any,
    out: Any,
    quick: bool,
    seed: int,
    fill: Any,
    sections: Sequence[str] | None,
    edits: Sequence[Any],
) -> str:
    """The command that asks for the same card: the command line that ran, or the Python call."""
    if Path(sys.argv[0]).name == "actlas":
        return shlex.join(["actlas", *sys.argv[1:]])
    name = (
        repr(model) if isinstance(model, (str, type(None))) else getattr(model, "name", type(model).__name__)
    )
    parts = [str(name)]
    if out is not None:
        parts.append(f"out={str(out)!r}")
    if not quick:
        parts.append("quick=False")
    if seed:
        parts.append(f"seed={seed}")
    if fill is not None:
        parts.append(f"fill={str(fill)!r}" if isinstance(fill, (str, Path)) else "fill=...")
    if sections is not None:
        parts.append(f"sections={list(sections)!r}")
    if edits:
        parts.append("edits=[...]")
    return f"actlas.card({', '.join(parts)})"
