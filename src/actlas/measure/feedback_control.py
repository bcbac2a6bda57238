"""The control task of neurofeedback: does a sentence's activation move when the model is asked to move it?

After some scored examples the user asks for a sentence with score q. Explicit: the model writes one; its
activation is read where it was written, and once more with the sentence alone, which says whether the
words or only the context moved it. Implicit: a fixed sentence is put in the model's mouth, the same for
both requests. Everything is run a second time with flipped labels, so that what the digit itself does
cancels. The effect is Cohen's d between the scores when high and when low activation was asked for,

    d = (mean of high - mean of low) / sqrt((variance of high + variance of low) / 2)

and its precision the size of d along the axis over the mean size of d along principal components. Their
difference is the effect minus its control: what a request moves in any direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.intervals import bootstrap_statistic
from actlas.core.measurement import Measurement
from actlas.core.pca import PCA
from actlas.measure.feedback_axes import Array, Axis
from actlas.measure.feedback_chat import Chat, Dialogue
from actlas.measure.samples import missing


def control(
    chat: Chat,
    texts: Sequence[str],
    labels: NDArray[np.int64],
    axis: Axis,
    sequences: Sequence[tuple[int, ...]],
    *,
    task: str,
    components: PCA | None = None,
    tokens: int = 16,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[Measurement]:
    """Return the effect of asking for high against low activation, with intervals.

    Args:
        chat: renders and runs dialogues.
        texts: sentences.
        labels: 1 for each sentence whose score is high.
        axis: along which activations are read.
        sequences: for each repetition the numbers of the example sentences; the last one is the fixed
            sentence of the implicit task and is not shown.
        task: `"explicit"` or `"implicit"`.
        components: principal components of the site, for the precision.
        tokens, temperature: of what the model writes (explicit).
        seed: of sampling and bootstrap.
    """
    asked = [(flip, high) for flip in (0, 1) for high in (1, 0)]
    made: list[Dialogue] = []
    said: list[str] = []
    for sequence in sequences:
        shown = [texts[i] for i in sequence[:-1]]
        for flip, high in asked:
            scores = [int(labels[i]) ^ flip for i in sequence[:-1]]
            fixed = texts[sequence[-1]] if task == "implicit" else None
            made.append(chat.render(shown, scores, imitate=high ^ flip, last=fixed))
    if task == "explicit":
        said = chat.say(made, tokens, temperature, seed)
        number = 0
        for sequence in sequences:
            shown = [texts[i] for i in sequence[:-1]]
            for flip, high in asked:
                scores = [int(labels[i]) ^ flip for i in sequence[:-1]]
                made[number] = chat.render(shown, scores, imitate=high ^ flip, last=said[number] or ".")
                number += 1
    spoke = np.array([bool(s) for s in said] or [True] * len(made)).reshape(len(sequences), 2, 2)
    group = {"task": task, "axis": axis.name, "examples": str(len(sequences[0]) - 1)}

    def effect(name: str, x: torch.Tensor) -> list[Measurement]:
        scores = [axis.read(x)[:, None]]
        if components is not None:
            scores.append(components.encode(x.float()).double().numpy())
        values = np.concatenate(scores, 1).reshape(len(sequences), 2, 2, -1)
        values = np.where(spoke[..., None], values, np.nan)
        return _effects(name, values[:, :, 0], values[:, :, 1], group, seed)

    out = effect(f"{task} control", chat.read(made, axis.site))
    if task == "explicit":
        alone = chat.alone([s or "." for s in said], axis.site)
        out += effect("explicit control, sentence alone", alone)[:1]
    return out


def _effects(name: str, high: Array, low: Array, group: dict[str, str], seed: int) -> list[Measurement]:
    """Return Cohen's d of the first column, and its precision against the others; `[n, flips, k]`."""
    n = len(high)
    lost = int(np.isnan(high[..., 0]).sum() + np.isnan(low[..., 0]).sum())
    note = f"{lost} empty answers left out" if lost else ""
    sizes = cohens_d(np.ones((1, n)), high, low)[0]
    if not np.isfinite(sizes[0]):
        return [missing(name, "Cohen's d", note or "fewer than two answers, or all alike", group=group)]
    bounds = bootstrap_statistic(lambda c: cohens_d(c, high, low)[:, 0], n, seed=seed)
    out = [_measurement(name, sizes[0], "Cohen's d", n, bounds, group, seed, note)]
    if high.shape[-1] > 1:
        for what, unit, combine in (
            ("precision", "ratio", lambda d: np.abs(d[:, 0]) / np.abs(d[:, 1:]).mean(1)),
            ("above components", "Cohen's d", lambda d: d[:, 0] - np.abs(d[:, 1:]).mean(1)),
        ):
            bounds = bootstrap_statistic(lambda c, f=combine: f(cohens_d(c, high, low)), n, seed=seed)  # type: ignore[misc]
            value = float(combine(sizes[None])[0])
            out.append(_measurement(f"{name} {what}", value, unit, n, bounds, group, seed, note))
    return out


def cohens_d(counts: Array, high: Array, low: Array) -> Array:
    """Return Cohen's d for each way to draw repetitions, `[draws, k]`.

    Args:
        counts: how often each repetition is drawn, `[draws, n]`.
        high, low: scores, `[n, flips, k]`; NaN where there is none. The sum of squares is divided by
            the number of scores less one.
    """
    sides = []
    for x in (high, low):
        known = ~np.isnan(x)
        filled = np.where(known, x, 0.0)
        total = counts @ known.sum(1)
        mean = (counts @ filled.sum(1)) / np.maximum(total, 1)
        square = (counts @ (filled**2).sum(1)) / np.maximum(total, 1)
        variance = np.maximum(square - mean**2, 0) * total / np.maximum(total - 1, 1)
        sides.append((mean, np.where(total > 1, variance, np.nan)))
    (up, a), (down, b) = sides
    spread = np.sqrt((a + b) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        d: Array = np.where(spread > 0, (up - down) / spread, np.nan)
    return d


def _measurement(
    name: str,
    value: float,
    unit: str,
    n: int,
    bounds: tuple[float, float],
    group: dict[str, str],
    seed: int,
    note: str,
) -> Measurement:
    low, high = (None if b != b else b for b in bounds)
    return Measurement(
        name, float(value), unit, n, low, high, "bootstrap over repetitions", seed, group=group, note=note
    )
