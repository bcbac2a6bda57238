"""Neurofeedback: can a chat model report, and move, its own activation along a direction?

    neurofeedback(model, axes=["means", "pc1", lens], tasks=("report", "implicit", "explicit"))

Each sentence is labelled by the sign of the model's *own* activation along an axis (mean over the
sentence's tokens, split at the median). The model sees n labelled sentences as its earlier turns.

* Report: `logit(1) - logit(0)` right where the next label would stand, for every number of examples in
  one pass. Accuracy, its area under the ROC curve (free of a preference for one digit) and cross-entropy.
* Control: it is asked for a sentence with a label; see `feedback_control`.

A sequence is made of blocks of one high and one low sentence in random order, so that shown labels are
balanced and the label that is asked for after a whole number of blocks is a fair coin. Every second
repetition has flipped labels. Beside each number stand the same for an axis of shuffled labels, and what a
reader of the text alone reaches with the same examples: an axis that follows from the text can be reported
without any look inside.

Source: "Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations"
(2025) and its code (which labels by the sign of the standardised score; a split at the median is balanced).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actlas.core import resampling
from actlas.core.errors import InputError
from actlas.core.lens import Lens
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.pca import PCA, fit_pca
from actlas.core.probe_data import Examples, parse_items
from actlas.core.probe_quality import auc
from actlas.measure.feedback_axes import (
    Array,
    Axis,
    as_axis,
    standard_axes,
    text_accuracy,
    text_features,
)
from actlas.measure.feedback_chat import Chat
from actlas.measure.feedback_control import control
from actlas.measure.registry import measure
from actlas.measure.samples import mean_measurement, missing, rate_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

TASKS = ("report", "implicit", "explicit")
_ITEMS = 72


@measure(
    "neurofeedback",
    summary="whether a chat model can report its own activation along a direction, in context",
    unit="fraction",
    needs=("causal-lm",),
    data="pairs",
    quick={"examples": (0, 8), "repetitions": 6},
    source="Metacognitive Monitoring and Control (2025)",
)
@method(
    "neurofeedback",
    room="measure",
    returns="Measurement",
    data="labelled",
    summary="can a chat model report or move its own activation along a direction?",
    example="actlas fit neurofeedback smollm2 sentiment --site blocks.15.resid_post",
    papers=("neurofeedback",),
)
def neurofeedback(
    model: Model,
    data: Any = None,
    *,
    site: str | None = None,
    axes: Sequence[str | Lens | Axis] | str = ("means", "shuffled"),
    tasks: Sequence[str] | str = ("report",),
    examples: Sequence[int] = (0, 8, 24),
    repetitions: int = 20,
    reader: Model | None = None,
    tokens: int = 16,
    seed: int = 0,
) -> list[Measurement]:
    """Measure report and control of a model's own activations.

    Args:
        model: a chat model (a tokenizer with a chat template).
        data: sentences: labelled texts or pairs (see `actlas.core.probe_data`); the reviews of the
            sentiment task if missing. Half of them fits the standard axes, the other half is scored.
        site: where activations are read; default the middle block's output, or the lens's own site.
        axes: names of `standard_axes`, lenses (their score) or `Axis` values (a feature of a lens).
        tasks: of `"report"`, `"implicit"`, `"explicit"`.
        examples: even numbers of labelled sentences; the greatest is shown in the control tasks.
        repetitions: dialogues for each axis (four each in a control task).
        reader: an encoder model for the text-only reader; default TF-IDF of words.
        tokens: at most so many new tokens in the explicit task.
        seed: of every choice.

    Returns:
        For each axis and number of examples `report accuracy`, `report cross-entropy`, `text-only
        accuracy`; pooled over the later half of the sequence (group `examples="late"`) these and `report
        AUC`, the difference from the text-only reader, and from the `shuffled` axis if it is there; for
        control `implicit control`, `explicit control` and `explicit control, sentence alone` with their
        precision and their excess over components.

    Raises:
        ModelError: not a chat model.
        InputError: odd or negative numbers of examples, unknown tasks or axes, lenses of other sites, or
            too few sentences for so many examples.
    """
    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    named = [axes] if isinstance(axes, str) else list(axes)
    counts = sorted({int(n) for n in ([examples] if isinstance(examples, int) else examples)})
    if not wanted or any(t not in TASKS for t in wanted):
        raise InputError(f"tasks is {tasks!r}; it must be of {', '.join(TASKS)}")
    if not counts or counts[0] < 0 or any(n % 2 for n in counts):
        raise InputError(f"examples is {examples!r}; it must be even numbers, so that labels are balanced")
    if repetitions < 2:
        raise InputError(f"repetitions is {repetitions}; an interval needs at least 2")
    if not named:
        raise InputError("no axis was named; give means, pc1, a lens, ...")
    chat = Chat(model)
    texts, labels, groups = _sentences(model, data, seed)
    where = _site(model, site, named)
    x = chat.alone(texts, where)
    fit, pool = _halves(groups, seed)
    known = Examples(x.numpy()[fit], labels[fit], groups[fit], _paired(labels[fit], groups[fit]))
    found: list[Axis] = []
    for given in named:
        found += (
            standard_axes(known, where, [given], seed=seed) if isinstance(given, str) else [as_axis(given)]
        )
    scored = [texts[i] for i in pool]
    features = text_features(scored, reader)
    out: list[Measurement] = []
    rest = {"repetitions": repetitions, "seed": seed}
    for axis in found:
        values = axis.read(x[pool])
        high = (values > np.median(values)).astype(np.int64)
        if "report" in wanted:
            out += _report(chat, scored, high, axis, counts, features, **rest)
        for task in (t for t in wanted if t != "report"):
            drawn = _sequences(high, counts[-1], repetitions, seed)
            pca: PCA | None = fit_pca(
                None, x[fit].float(), where, components=min(16, len(fit) - 1, x.shape[1])
            )
            out += control(
                chat, scored, high, axis, drawn, task=task, components=pca, tokens=tokens, seed=seed
            )  # fmt: skip
    return out + _above_shuffled(out, seed)


def _report(
    chat: Chat,
    texts: Sequence[str],
    high: NDArray[np.int64],
    axis: Axis,
    counts: Sequence[int],
    features: Array,
    *,
    repetitions: int,
    seed: int,
) -> list[Measurement]:
    """Return the report task's numbers for one axis."""
    sequences = _sequences(high, counts[-1], repetitions, seed)
    flips = np.arange(repetitions) % 2
    made = [
        chat.render([texts[i] for i in s], [int(high[i]) ^ int(f) for i in s])
        for s, f in zip(sequences, flips, strict=True)
    ]
    gaps = np.stack([g.numpy() for g in chat.label_logits(made)])[:, ::2]  # at even numbers of examples
    shown = np.array([[high[i] for i in s] for s in sequences]) ^ flips[:, None]
    y = shown[:, ::2]
    right = np.where(gaps == 0, 0.5, (gaps > 0) == (y == 1)).astype(np.float64)
    surprise = np.logaddexp(0, np.where(y == 1, -gaps, gaps))
    reading = np.array(
        [[text_accuracy(features, high, s[:n], s[n]) for n in range(0, len(s), 2)] for s in sequences]
    )
    late = slice((counts[-1] // 2 + 1) // 2, None)
    out: list[Measurement] = []

    def mean(name: str, values: Array, examples: str, unit: str = "fraction") -> None:
        group = {"task": "report", "axis": axis.name, "examples": examples}
        if unit == "fraction" and np.isin(values, (0, 1)).all():
            out.append(rate_measurement(name, values, seed=seed, group=group))
        else:
            made = mean_measurement(name, unit, values, seed=seed, over="repetitions", group=group)
            out.append(made)

    for n in counts:
        mean("report accuracy", right[:, n // 2], str(n))
        mean("report cross-entropy", surprise[:, n // 2], str(n), "nats")
        mean("text-only accuracy", reading[:, n // 2], str(n))
    mean("report accuracy", right[:, late].mean(1), "late")
    mean("report cross-entropy", surprise[:, late].mean(1), "late", "nats")
    mean("text-only accuracy", reading[:, late].mean(1), "late")
    mean("report accuracy above the text-only reader", (right - reading)[:, late].mean(1), "late")
    out.append(_area(gaps[:, late], y[:, late], axis, seed))
    return out


def _area(gaps: Array, y: NDArray[np.int64], axis: Axis, seed: int) -> Measurement:
    """Return the area under the ROC curve of the label's logit difference, repetitions drawn whole."""
    about = {"gaps": gaps.round(4).tolist(), "labels": y.tolist()}
    group = {"task": "report", "axis": axis.name, "examples": "late"}
    value, drawn = _areas(gaps, y, seed)
    return _bootstrapped("report AUC", "AUC", value, drawn, len(gaps), group, seed, about)


def auc_above(one: Measurement, other: Measurement, name: str, seed: int = 0) -> Measurement:
    """Return how much greater one axis's `report AUC` is than another's, with an interval.

    Repetitions of the two are drawn together; they are independent of each other.

    Raises:
        InputError: not two measurements called `report AUC` with as many repetitions.
    """
    sides = [
        (np.array(m.details.get("gaps", ())), np.array(m.details.get("labels", ()))) for m in (one, other)
    ]
    alike = len(sides[0][0]) == len(sides[1][0]) or one.n == 0 or other.n == 0
    if one.name != "report AUC" or other.name != one.name or not alike:
        raise InputError(
            f"give two measurements 'report AUC' of equal length, not {one.name} and {other.name}"
        )
    if not (len(sides[0][0]) and len(sides[1][0])):
        return missing(name, "AUC", one.note or other.note, group=one.group)
    (a, drawn_a), (b, drawn_b) = (_areas(gaps, y, seed) for gaps, y in sides)
    return _bootstrapped(name, "AUC", a - b, drawn_a - drawn_b, len(sides[0][0]), dict(one.group), seed, {})


def _areas(gaps: Array, y: NDArray[np.int64], seed: int) -> tuple[float, Array]:
    n, m = gaps.shape
    labels, scores, groups = y.ravel().astype(np.float64), gaps.ravel(), np.repeat(np.arange(n), m)
    value = float(auc(labels, scores, np.ones((1, n * m)))[0])
    return value, np.concatenate([auc(labels, scores, d) for d in resampling.draws(groups, seed)])


def _bootstrapped(
    name: str,
    unit: str,
    value: float,
    drawn: Array,
    n: int,
    group: dict[str, str],
    seed: int,
    about: dict[str, Any],
) -> Measurement:
    low, high = (None if b != b else b for b in resampling.percentiles([drawn], range(n)))
    over = "bootstrap over repetitions"
    if value != value:
        return missing(name, unit, "the labels asked for are all alike: more repetitions", group=group)
    return Measurement(name, value, unit, n, low, high, over, seed, group=group, details=about)


def _above_shuffled(found: Sequence[Measurement], seed: int) -> list[Measurement]:
    """Return how much better each axis is reported than the axis of shuffled labels."""
    late = {
        (m.name, m.group["axis"]): m
        for m in found
        if m.name in ("report accuracy", "report AUC") and m.group["examples"] == "late"
    }
    out = []
    for (name, axis), m in late.items():
        blank = late.get((name, "shuffled"))
        if blank is None or axis == "shuffled":
            continue
        said = f"{name} above the shuffled axis"
        if name == "report AUC":
            out.append(auc_above(m, blank, said, seed))
        elif m.samples is not None and blank.samples is not None:
            values = m.samples - blank.samples
            out.append(
                mean_measurement(said, "fraction", values, seed=seed, over="repetitions", group=m.group)
            )
    return out


def _sequences(high: NDArray[np.int64], examples: int, repetitions: int, seed: int) -> list[tuple[int, ...]]:
    """Draw sentences for each repetition: blocks of one high and one low, and one more of either kind.

    Raises:
        InputError: too few sentences.
    """
    generator = np.random.default_rng(seed)
    sides = [np.flatnonzero(high == 0), np.flatnonzero(high == 1)]
    need = examples // 2 + 1
    if min(map(len, sides)) < need:
        raise InputError(
            f"{examples} examples need {need} sentences of high and of low activation; there are "
            f"{len(sides[1])} and {len(sides[0])}: give more sentences, or fewer examples"
        )
    out = []
    for _ in range(repetitions):
        low, up = (generator.permutation(side)[:need].tolist() for side in sides)
        blocks = [pair if generator.random() < 0.5 else pair[::-1] for pair in zip(low, up, strict=True)]
        out.append(tuple(i for pair in blocks for i in pair)[: examples + 1])
    return out


def _sentences(model: Model, data: Any, seed: int) -> tuple[list[str], Array, NDArray[np.int64]]:
    """Return different sentences with their labels and groups."""
    if data is None:
        from actlas.data import task
        from actlas.data.tasks import pairs

        data = pairs(task("sentiment", model.tokenizer, n=_ITEMS, seed=seed))
    texts, labels, groups, _ = parse_items(data)
    first = list({t.strip(): i for i, t in reversed(list(enumerate(texts)))}.values())[::-1]
    if len(first) < 8:
        raise InputError(f"neurofeedback needs at least 8 different sentences, not {len(first)}")
    values = np.array(labels)[first]
    if not np.isin(values, (0.0, 1.0)).all():
        raise InputError("the labels of the sentences must be 0 and 1; they only fit the standard axes")
    return [texts[i].strip() for i in first], values, np.array(groups, dtype=np.int64)[first]


def _halves(groups: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split sentences in two; those of one group stay together."""
    drawn = np.random.default_rng(seed).permutation(np.unique(groups))
    first = np.isin(groups, drawn[: (len(drawn) + 1) // 2])
    if first.all():
        raise InputError("all sentences come from one source; give several, so that half can be held out")
    return np.flatnonzero(first), np.flatnonzero(~first)


def _paired(labels: Array, groups: NDArray[np.int64]) -> bool:
    """Whether each group is one positive and one negative sentence."""
    _, code = np.unique(groups, return_inverse=True)
    sizes, positives = np.bincount(code), np.bincount(code, weights=labels)
    return bool((sizes == 2).all() and (positives == 1).all())


def _site(model: Model, site: str | None, axes: Sequence[str | Lens | Axis]) -> str:
    own = {a.site for a in axes if not isinstance(a, str) and hasattr(a, "site")}
    if site is not None:
        own.add(model.resolve(site)[0].name)
    if len(own) > 1:
        raise InputError(f"the axes read at {' and '.join(sorted(own))}; give axes of one site")
    if own:
        return own.pop()
    if not model.n_blocks:
        raise InputError(f"{model.name} has no layout, so its middle block is not known; give a site")
    return f"blocks.{model.n_blocks // 2}.resid_post"
