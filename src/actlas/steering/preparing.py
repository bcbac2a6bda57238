"""What `fit_steer` needs before it chooses: candidate layers, directions with their control, and prose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actlas.core.contrast import Contrast, Readings, Where, read_contrast
from actlas.core.direction import Direction
from actlas.core.errors import InputError
from actlas.steering.directions import fit_directions, fit_readings
from actlas.steering.fits import FitInfo

if TYPE_CHECKING:
    from actlas.core.model import Model

_CANDIDATES = 10
_PROSE, _PROSE_TOKENS = 16, 48


def fitted(
    model: Model,
    fit: Contrast,
    sites: Any,
    info: FitInfo,
    position: Where,
    options: dict[str, Any],
    seed: int,
) -> tuple[dict[str, Direction], Callable[[Sequence[str]], dict[str, Direction]]]:
    """Return the directions, and what gives those of pairs whose sides were swapped at random."""
    if info.data == "texts":
        swapped = fit.shuffled(seed)
        given = {"method": info.name, **options}
        return fit_directions(model, fit, sites, **given), lambda names: fit_directions(
            model, swapped, list(names), **given
        )
    readings = read_contrast(model, fit, sites, position=position)
    about: dict[str, Any] = {"fingerprint": model.fingerprint, "data": fit.hash}

    def made(rows: Readings) -> Direction:
        return replace(fit_readings(rows, method=info.name, y=fit.y, **options), **about)

    return {name: made(rows) for name, rows in readings.items()}, lambda names: {
        name: made(_swapped(readings[name], fit, seed)) for name in names
    }


def _swapped(rows: Readings, fit: Contrast, seed: int) -> Readings:
    """Return the activations of `fit.shuffled(seed)`, whose sides are swapped in half of the pairs."""
    new = fit.shuffled(seed).positive
    swap = torch.tensor([p != q for p, q in zip(fit.positive, new, strict=True)]).unsqueeze(1)
    positive = torch.where(swap, rows.negative, rows.positive)
    return replace(rows, positive=positive, negative=torch.where(swap, rows.positive, rows.negative))


def candidate_layers(model: Model) -> list[str]:
    """Return up to 10 layers, evenly spaced between a fifth and four fifths of the depth."""
    if model.tower is None:
        raise InputError(f"{model.name} has no named layers; give a site, e.g. module:layers.3.output")
    n = model.tower.n_blocks
    low, high = n // 5, max(n // 5, min(n - 1, round(0.8 * n)))
    count = min(_CANDIDATES, high - low + 1)
    return [f"blocks.{b}.resid_post" for b in sorted({round(b) for b in np.linspace(low, high, count)})]


def openings(model: Model, documents: Any) -> list[str]:
    """Return the beginnings of some documents, each of at most a few dozen tokens."""
    most = min(_PROSE_TOKENS, model.context_length or _PROSE_TOKENS)
    found: list[str] = []
    for document in documents:
        text = document.text[: 4 * most]
        while len(model.tokenizer(text, verbose=False)["input_ids"]) > most:
            text = text[: len(text) * 3 // 4]
        if len(text.split()) > 3:
            found.append(text)
        if len(found) == _PROSE:
            break
    if not found:
        raise InputError("the bundled prose gives no text for this tokenizer")
    return found
