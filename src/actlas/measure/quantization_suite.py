"""What a quantised model keeps: knowledge, alignment, efficiency, and the text that it writes.

    suite = quantization_suite(model, {"gptq": a, "awq": b})
    suite.measurements           # per variant: perplexity, KL, tasks, answers changed, recovery, texts, bytes
    proxy_agreement(suite)       # do perplexity and KL rank the variants as the tasks do?

Jin et al. 2024, "A Comprehensive Evaluation of Quantization Strategies for Large Language Models", and Kurtic
et al. 2024, "Give Me BF16 or Give Me Death?": the plan of both, on tasks that need no download. For variant v
and the model p as it is, on the same items:

    task-accuracy        share of items right, by task. Knowledge: capitals, arithmetic, agreement, ioi;
                         alignment: following a context against memory, sentiment, true-false
    answers-changed      share of items right under one and wrong under the other (averages hide these)
    accuracy-recovery    mean accuracy over tasks of v over that of p, drawn over the items of every task
    rouge-1, rouge-l     of v's greedy text against p's
    same-text            share of the text's tokens before the first other one
    perplexity-ratio, kl-to-base, agreement, bits-per-weight       as in `quant_price`
    stored-bytes         of the exchanged layers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.core.quant_edit import QuantEdit
from actlas.measure.quant_price import losses_of, prices_of
from actlas.measure.samples import mean_measurement, rate_measurement
from actlas.measure.tasks import Answers, answer
from actlas.measure.text_overlap import rouge_1, rouge_l, shared_start

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.measure.likelihood import Losses

KNOWLEDGE = ("capitals", "arithmetic", "agreement", "ioi")
ALIGNMENT = ("capitals-counterfactual", "sentiment", "true-false")
TASKS = (*KNOWLEDGE, *ALIGNMENT)
BASE = "as it is"
RESAMPLES = 1000


@dataclass(frozen=True)
class Suite:
    """Everything that was measured.

    Attributes:
        measurements: grouped by `variant` (the model itself is `"as it is"`), and by `task`.
        variants: names, the model itself first.
        correct: task -> variant -> which items were right, bool `[items]`.
        losses: variant -> losses on text.
    """

    measurements: list[Measurement]
    variants: tuple[str, ...]
    correct: Mapping[str, Mapping[str, NDArray[np.bool_]]] = field(repr=False)
    losses: Mapping[str, Losses] = field(repr=False)

    def get(self, name: str, **group: str) -> Measurement:
        """Return one measurement by name and labels.

        Raises:
            InputError: there is none.
        """
        for m in self.measurements:
            if m.name == name and all(m.group.get(k) == v for k, v in group.items()):
                return m
        raise InputError(f"the suite has no {name!r} for {group}")


def quantization_suite(
    model: Model,
    candidates: Mapping[str, Edit],
    *,
    corpus: Iterable[Any] | None = None,
    tasks: Sequence[str] = TASKS,
    items: int = 40,
    tokens: int = 1024,
    context: int = 128,
    prompts: int = 8,
    new_tokens: int = 24,
    embedder: Model | None = None,
    seed: int = 0,
) -> Suite:
    """Measure variants of a model on the same text, tasks and prompts.

    Args:
        model: a causal language model with a tokenizer, without edits.
        candidates: name -> edit.
        corpus: text; default: the bundled prose. Its last documents begin the prompts.
        tasks: names of tasks (see `actlas.data.tasks`).
        items: of each task.
        tokens, context: text that is scored, and length of a window.
        prompts, new_tokens: greedy continuations; 0 prompts write none.
        embedder: a text encoder; adds `text-similarity`, the cosine of the continuations' embeddings.
        seed: of items, order of text and the bootstrap.

    Raises:
        InputError: no candidates, or a task that there is not.
    """
    from actlas.data import corpus as bundled
    from actlas.data import task as make

    if not candidates:
        raise InputError("there is nothing to compare; give at least one quantised variant by name")
    if BASE in candidates:
        raise InputError(f"{BASE!r} is the name of the model itself; call the variant something else")
    documents = list(bundled("prose", seed=seed) if corpus is None else corpus)
    made = [make(name, model.tokenizer, n=items, seed=seed) for name in tasks]
    options = {"tokens": tokens, "context": context, "per_document": context}
    base_losses, losses = losses_of(model, documents, candidates, **options)
    found = prices_of(base_losses, losses, candidates, seed=seed)
    openings = [_opening(d) for d in documents[-prompts:]] if prompts else []
    answers: dict[str, dict[str, Answers]] = {}
    written: dict[str, list[Any]] = {}
    everyone: dict[str, Edit | None] = {BASE: None, **candidates}
    with progress("tasks and texts", total=len(everyone), unit="variants") as advance:
        for name, edit in everyone.items():
            with model.edit(*([edit] if edit is not None else [])):
                answers[name] = {t.name: answer(model, t) for t in made}
                written[name] = [_continued(model, text, new_tokens) for text in openings]
            advance()
    correct = {t.name: {name: answers[name][t.name].correct for name in everyone} for t in made}
    for name, edit in everyone.items():
        found += _task_rows(correct, name, seed)
        if edit is not None:
            found.append(recovery(correct, name, seed=seed))
            found += _sizes(edit, name)
            if openings:
                found += _text_rows(written, name, embedder, seed)
    return Suite(found, tuple(everyone), correct, {BASE: base_losses, **losses})


def recovery(
    correct: Mapping[str, Mapping[str, NDArray[np.bool_]]], name: str, over: str = BASE, *, seed: int = 0
) -> Measurement:
    """Return mean accuracy over tasks under one variant over that under another.

    Args:
        correct: task -> variant -> which items were right.
        name, over: the two variants.
        seed: of the bootstrap, which draws items of every task, the same for both.
    """
    rng = np.random.default_rng(seed)

    def mean(variant: str, at: Mapping[str, Any] | None = None) -> float:
        return float(np.mean([c[variant][at[t] if at else slice(None)].mean() for t, c in correct.items()]))

    drawn = []
    for _ in range(RESAMPLES):
        at = {t: rng.integers(0, len(c[over]), len(c[over])) for t, c in correct.items()}
        below = mean(over, at)
        if below > 0:
            drawn.append(mean(name, at) / below)
    value = mean(name) / mean(over) if mean(over) > 0 else float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (None, None)
    return Measurement(
        "accuracy-recovery",
        100 * value,
        "%",
        sum(len(c[over]) for c in correct.values()),
        None if low is None else 100 * float(low),
        None if high is None else 100 * float(high),
        "paired bootstrap over the items of every task",
        seed,
        group={"variant": name},
        better="higher",
    )


def proxy_agreement(suite: Suite, *, seed: int = 0) -> list[Measurement]:
    """Return Spearman's correlation of log perplexity, and of KL, with mean task accuracy over the variants.

    The interval draws items of the tasks; perplexity and KL stay as they are. NaN with fewer than four.
    """
    names = [n for n in suite.variants if n in suite.losses]
    loss = [float(suite.losses[n].nll.sum() / suite.losses[n].tokens.sum()) for n in names]
    divergence = [0.0 if n == BASE else suite.get("kl-to-base", variant=n).value for n in names]
    rng = np.random.default_rng(seed)
    out = []
    for name, values in (("log-perplexity", loss), ("kl", divergence)):
        exact = _spearman(values, _accuracy(suite, names))
        drawn = []
        for _ in range(RESAMPLES // 2):
            at = {
                t: rng.integers(0, len(next(iter(c.values()))), len(next(iter(c.values()))))
                for t, c in suite.correct.items()
            }
            drawn.append(_spearman(values, _accuracy(suite, names, at)))
        finite = [d for d in drawn if d == d]
        low, high = np.quantile(finite, [0.025, 0.975]) if finite else (None, None)
        out.append(
            Measurement(
                "proxy-agreement",
                exact,
                "rank correlation",
                len(names),
                None if low is None else float(low),
                None if high is None else float(high),
                "bootstrap over the items of every task",
                seed,
                group={"proxy": name},
            )
        )
    return out


def _accuracy(suite: Suite, names: Sequence[str], at: Mapping[str, Any] | None = None) -> list[float]:
    return [
        float(np.mean([c[n][at[t] if at else slice(None)].mean() for t, c in suite.correct.items()]))
        for n in names
    ]


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import rankdata

    if len(a) < 4:
        return float("nan")
    x, y = rankdata(a), rankdata(b)
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _task_rows(
    correct: Mapping[str, Mapping[str, NDArray[np.bool_]]], name: str, seed: int
) -> list[Measurement]:
    out = []
    for task, by_variant in correct.items():
        mine, base = by_variant[name], by_variant[BASE]
        aspect = "alignment" if task in ALIGNMENT else "knowledge"
        group = {"variant": name, "task": task, "aspect": aspect}
        out.append(rate_measurement("task-accuracy", mine, group=group, better="higher"))
        if name != BASE:
            out.append(rate_measurement("answers-changed", mine != base, group=group, better="lower"))
    return out


def _sizes(edit: Edit, name: str) -> list[Measurement]:
    parts = [part for part in edit.parts() if isinstance(part, QuantEdit)]
    if not parts:
        return []
    size = sum(part.stored_bytes for part in parts)
    n = sum(part.weights for part in parts)
    return [Measurement("stored-bytes", float(size), "bytes", n, group={"variant": name}, better="lower")]


def _text_rows(
    written: Mapping[str, list[Any]], name: str, embedder: Model | None, seed: int
) -> list[Measurement]:
    mine, base = written[name], written[BASE]
    group = {"variant": name}
    pairs = list(zip(mine, base, strict=True))
    columns = {
        "rouge-1": [rouge_1(a[0], b[0]) for a, b in pairs],
        "rouge-l": [rouge_l(a[0], b[0]) for a, b in pairs],
        "same-text": [shared_start(a[1], b[1]) for a, b in pairs],
    }
    if embedder is not None:
        from actlas.measure.encoder import embed

        x, y = (embed(embedder, [t or " " for t, _ in some]) for some in (mine, base))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        columns["text-similarity"] = ((x * y).sum(1) / norms).tolist()
    return [
        mean_measurement(measure, "share", values, seed=seed, over="prompts", group=group, better="higher")
        for measure, values in columns.items()
    ]


def _opening(document: Any) -> str:
    """Return the first words of a document, to go on from."""
    text = document if isinstance(document, str) else document.text
    return " ".join(text.split()[:12])


def _continued(model: Model, prompt: str, new_tokens: int) -> tuple[str, list[int]]:
    with torch.no_grad():
        made = model.generate(prompt, max_new_tokens=new_tokens)
    return made.texts[0], made.tokens[0].tolist()
