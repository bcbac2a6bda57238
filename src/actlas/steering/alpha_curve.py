"""What a steering edit does to answers, strength by strength.

    curve = alpha_curve(model, edit, task, alphas=(-0.2, -0.1, 0.1, 0.2))
    curve.points[0.1].correct.mean(), curve.points[0.1].kl.mean()
    print(*curve.measurements(), sep="\\n")

At the first token of each answer, with p the next-token distribution, A the answers that the item offers
and a* the right one:

    accuracy             a* has the greatest p in A (a tie does not count)
    answer probability   p(a*) / sum_{a in A} p(a)         what it leaves is the wrong answers'
    answer mass          sum_{a in A} p(a)                  a broken model loses it
    entropy              -sum p log p over the vocabulary, nats
    KL                   KL(p_0 || p), p_0 the plain model's, nats

The prompts run once up to the edited block; every strength runs only what lies behind it.

Source: Hojer et al. 2025, "Improving Reasoning Performance in Large Language Models via Representation
Engineering", section 4 (their KL has 1e-8 inside the logarithms; here it is exact).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.divergence import kl_divergence
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.core.splitting import SplitState, split_at
from actlas.measure.likelihood import takes_option
from actlas.measure.samples import mean_measurement, rate_measurement
from actlas.measure.statistics import paired_difference
from actlas.measure.tasks import _answer_ids
from actlas.steering.price import blocks_before

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]
_BATCH = 16


@dataclass(frozen=True)
class Answered:
    """What the model answers to each item, arrays `[n]`; see the module docstring."""

    correct: Array
    probability: Array
    mass: Array
    entropy: Array
    kl: Array


@dataclass
class _Batch:
    rows: list[int]
    encoded: dict[str, Any]
    state: SplitState | None
    base: Tensor = field(default_factory=lambda: torch.zeros(0))


class AnswerRuns:
    """Items whose prompts were run once up to where edits begin.

    Args:
        model: a causal language model; edits that are installed belong to the plain model.
        edits: the edits that will be asked about; they say where the model is cut.
        items: a task, or items with `.prompt`, `.answer` and `.wrong`.
        batch: prompts in one forward pass.

    Attributes:
        base: what the plain model answers.

    Raises:
        ModelError: not a causal language model with a tokenizer.
        InputError: no items, answers that are not one token each, or two that share it.
    """

    def __init__(
        self, model: Model, edits: Edit | Iterable[Edit], items: Any, *, batch: int = _BATCH
    ) -> None:
        if model.kind != "causal-lm" or model.tokenizer is None:
            raise ModelError(f"{model.name} is a {model.kind}; answers need a causal-lm with a tokenizer")
        found = list(getattr(items, "items", items))
        if not found:
            raise InputError("there are no items to answer; give at least one")
        right, wrong = _answer_ids(model, found)
        self.model, self.n = model, len(found)
        self._answers = [[r, *w] for r, w in zip(right, wrong, strict=True)]
        self._options = {"logits_to_keep": 1} if takes_option(model, "logits_to_keep") else {}
        self.skipped = blocks_before(model, [edits] if isinstance(edits, Edit) else list(edits))
        head: Any = None
        self._tail: Any = None
        if self.skipped:
            head, self._tail = split_at(model, f"blocks.{self.skipped - 1}.resid_post")
        prompts = [item.prompt for item in found]
        lengths = [len(ids) for ids in model.tokenizer(prompts, verbose=False)["input_ids"]]
        order = sorted(range(self.n), key=lambda i: (lengths[i], i))
        self._batches: list[_Batch] = []
        for start in range(0, self.n, batch):
            rows = order[start : start + batch]
            encoded = model.encode([prompts[i] for i in rows], padding_side="left")
            one = _Batch(rows, encoded, None if head is None else head(encoded))
            one.base = self._logits(one, None)
            self._batches.append(one)
        self.base = self.under(None)

    def under(self, edit: Edit | None) -> Answered:
        """Return the answers under an edit.

        Raises:
            NonFiniteError: it makes the logits NaN or infinite.
            InputError: it reaches before the place where the model was cut.
        """
        if edit is not None and self.skipped and blocks_before(self.model, [edit]) < self.skipped:
            raise InputError(
                f"{edit.describe()} reaches before block {self.skipped - 1}, where the model is cut"
            )
        out = {name: np.zeros(self.n) for name in ("correct", "probability", "mass", "entropy", "kl")}
        for batch in self._batches:
            logits = batch.base if edit is None else self._logits(batch, edit)
            logp = logits.double().log_softmax(-1)
            divergence = kl_divergence(batch.base, logits)
            entropy = -(logp.exp() * logp).sum(-1)
            for row, i in enumerate(batch.rows):
                offered = logp[row, self._answers[i]]
                out["correct"][i] = float(offered[0] > offered[1:].max())
                out["probability"][i] = float(offered.softmax(-1)[0])
                out["mass"][i] = float(offered.logsumexp(-1).exp())
                out["entropy"][i], out["kl"][i] = float(entropy[row]), float(divergence[row])
        return Answered(**out)

    def _logits(self, batch: _Batch, edit: Edit | None) -> Tensor:
        """Return the logits of each prompt's last token, float32 `[rows, vocab]`."""
        with self.model.edit(*([] if edit is None else [edit])), torch.no_grad():
            if batch.state is not None and self._tail is not None:
                output = self._tail(batch.state, **self._options)
            else:
                output = self.model._call(batch.encoded, use_cache=False, **self._options)
        logits: Tensor = getattr(output, "logits", output)[:, -1].float()
        if not bool(torch.isfinite(logits).all()):
            what = "the model" if edit is None else edit.describe()
            raise NonFiniteError(f"{what} makes logits that are NaN or infinite; use a smaller strength")
        return logits


@dataclass(frozen=True)
class AlphaCurve:
    """Answers by strength.

    Attributes:
        base: of the plain model.
        points: by strength, in increasing order.
        seed: of the intervals.
    """

    base: Answered
    points: Mapping[float, Answered]
    seed: int = 0

    def measurements(self, **group: str) -> list[Measurement]:
        """Return every quantity at every strength (group `alpha`; the plain model is `"0"`), and the paired
        change of accuracy and answer probability from the plain model."""
        out = _quantities(self.base, self.seed, {"alpha": "0", **group})
        for alpha, point in self.points.items():
            label = {"alpha": f"{alpha:g}", **group}
            out += _quantities(point, self.seed, label)
            for name, unit in (("correct", "fraction"), ("probability", "fraction")):
                a, b = getattr(self.base, name), getattr(point, name)
                said = {"correct": "accuracy", "probability": "answer probability"}[name]
                found = paired_difference(a, b, seed=self.seed)
                low, high = (None, None) if found.low != found.low else (found.low, found.high)
                out.append(
                    Measurement(
                        f"{said} gain", found.value, unit, found.n, low, high, "paired bootstrap over items",
                        self.seed, group=label, better="higher",
                    )
                )  # fmt: skip
        return out

    def rows(self, series: str = "") -> list[dict[str, Any]]:
        """Return rows for a plot: `alpha`, the means of all quantities, and `series`."""
        pairs = [(0.0, self.base), *self.points.items()]
        return [
            {
                "alpha": alpha,
                "accuracy": float(p.correct.mean()),
                "answer probability": float(p.probability.mean()),
                "answer mass": float(p.mass.mean()),
                "entropy": float(p.entropy.mean()),
                "KL": float(p.kl.mean()),
                "series": series,
            }
            for alpha, p in sorted(pairs, key=lambda pair: pair[0])
        ]


def alpha_curve(
    model: Model, edit: Edit, items: Any, alphas: Sequence[float], *, seed: int = 0, batch: int = _BATCH
) -> AlphaCurve:
    """Answer items under an edit at several strengths.

    Args:
        model: a causal language model.
        edit: the edit; each alpha multiplies its strength.
        items: a task, or items with one-token answers.
        alphas: strengths, without 0, which is always there.
        seed: of the intervals.
        batch: prompts in one forward pass.

    Raises:
        InputError: no strengths, one that is not finite, or what `AnswerRuns` raises.
    """
    wanted = sorted({float(a) for a in alphas} - {0.0})
    if not wanted or not np.isfinite(wanted).all():
        raise InputError(f"alphas are {list(alphas)}; give at least one finite number other than 0")
    runs = AnswerRuns(model, edit, items, batch=batch)
    return AlphaCurve(runs.base, {a: runs.under(edit * a) for a in wanted}, seed)


def _quantities(point: Answered, seed: int, group: Mapping[str, str]) -> list[Measurement]:
    def mean(name: str, unit: str, values: Array, better: Any = None) -> Measurement:
        return mean_measurement(name, unit, values, seed=seed, over="items", better=better, group=group)

    return [
        rate_measurement("accuracy", point.correct, seed=seed, better="higher", group=group),
        mean("answer probability", "fraction", point.probability, "higher"),
        mean("answer mass", "fraction", point.mass, "higher"),
        mean("next-token entropy", "nats", point.entropy),
        mean("KL to the plain model", "nats", point.kl, "lower"),
    ]
