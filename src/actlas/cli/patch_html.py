"""Effects of patching as one HTML page that works offline: a heat map, the largest parts, the prompts."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.effects import Effects
    from actlas.core.measurement import Measurement

_LISTED = 40
_PROMPTS = 8
_MODES = {
    "denoise": "the activation of the clean run, written into the corrupted run (1: the behaviour is back)",
    "noise": "the activation of the corrupted run, written into the clean run (1: the behaviour is gone)",
    "resample": "the activation of another pair's clean prompt, written into the clean run (1: gone)",
    "mean": "the mean activation over all tokens, written into the clean run (1: gone)",
    "zero": "zero, written into the clean run (1: gone)",
}


def page(
    effects: Effects, pairs: PromptPairs, agreed: Measurement | None = None, edits: Sequence[str] = ()
) -> str:
    """Return the page.

    Args:
        effects: what patching found.
        pairs: the prompts.
        agreed: the agreement of estimates with exact effects, if it was measured.
        edits: descriptions of the edits that were installed.
    """
    data = json.dumps(_data(effects, pairs), ensure_ascii=False, allow_nan=False)
    template = files("actlas.cli").joinpath("templates/patch.html").read_text(encoding="utf-8")
    clean, corrupt = (float(x.mean()) for x in (effects.clean, effects.corrupt))
    notes = [*effects.notes]
    if agreed is not None:
        notes.append(
            f"Estimates from one gradient (attribution patching) rank the parts with a correlation of"
            f" {agreed.value:.2f} [{agreed.low:.2f}, {agreed.high:.2f}]; {agreed.note.split('; ')[-1]}."
        )
    if edits:
        notes.append(f"Edits installed: {'; '.join(edits)}.")
    metric = effects.metric.replace("_", " ")
    fields = {
        "TITLE": html.escape(f"{effects.model} on {effects.task}"),
        "WHAT": html.escape(
            f"{len(effects)} parts, each patched on {len(pairs)} pairs of prompts ({effects.method}). What is"
            f" written: {_MODES[effects.mode]}."
        ),
        "NUMBERS": html.escape(
            f"{metric}: {clean:.3f} on clean prompts, {corrupt:.3f} on corrupted ones; the model is right on"
            f" {pairs.accuracy:.0%} of the clean prompts. An effect is the share of that difference."
        ),
        "NOTES": "".join(f"<li>{html.escape(note)}</li>" for note in notes),
        # Inside a script element only "<" could end the data; escaped it is the same JSON.
        "DATA": data.replace("<", "\\u003c"),
    }
    return re.sub(r"@@([A-Z]+)@@", lambda found: fields[found[1]], template)


def _data(effects: Effects, pairs: PromptPairs) -> dict[str, Any]:
    from actlas.circuits.views import column_names, grid_of

    grid = grid_of(effects)
    top = effects.top(_LISTED)
    everything = {e.label: e for e in effects.intervals()} if grid is not None else {e.label: e for e in top}
    table = None
    if grid is not None:
        names = column_names(effects, pairs)
        labels = effects.labels
        table = {
            "layers": list(grid.layers),
            "columns": [names[c] for c in grid.columns],
            "cells": [[r, c, _record(everything[labels[i]])] for (r, c), i in grid.cells.items()],
        }
    return {
        "grid": table,
        "top": [_record(e) for e in top],
        "pairs": [
            {
                "clean": _tokens(pairs, "clean", i),
                "corrupt": _tokens(pairs, "corrupt", i),
                "answer": _token(pairs, int(pairs.answer_ids[i])),
                "wrong": _token(pairs, int(pairs.wrong_ids[i])),
            }
            for i in range(min(_PROMPTS, len(pairs)))
        ],
    }


def _record(effect: Any) -> dict[str, Any]:
    bounds = {k: v if v == v else None for k, v in (("low", effect.low), ("high", effect.high))}
    return {"part": effect.label, "value": effect.value, **bounds}


def _tokens(pairs: PromptPairs, side: str, row: int) -> list[list[Any]]:
    """Return (token, whether it differs) of one prompt, padding left out."""
    ids, mask = pairs.clean["input_ids"][row], pairs.clean["attention_mask"][row].bool()
    other = pairs.corrupt["input_ids"][row]
    shown = (ids if side == "clean" else other)[mask].tolist()
    return [[_token(pairs, i), bool(d)] for i, d in zip(shown, (ids != other)[mask].tolist(), strict=True)]


def _token(pairs: PromptPairs, token: int) -> str:
    return pairs.decode(token) if pairs.decode is not None else str(token)
