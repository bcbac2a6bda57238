"""What a run is judged by: numbers computed from the logits after each prompt.

    logit_difference   logit(answer) - logit(wrong)
    log_prob           log softmax(logits)[answer]
    kl                 KL(clean run || run), of the whole distribution

A metric of one's own is a function from logits `[n, vocab]` and pairs to `[n]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError, did_you_mean

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs

MetricFunction = Callable[[Tensor, "PromptPairs"], Tensor]
UNITS = {"logit_difference": "logits", "log_prob": "nats", "kl": "nats"}
METRICS = tuple(UNITS)


def logit_difference(logits_last: Tensor, pairs: PromptPairs) -> Tensor:
    """Return logit(answer) - logit(wrong), `[n]`, of logits `[n, vocab]`."""
    _check(logits_last, pairs)
    return _at(logits_last, pairs.answer_ids) - _at(logits_last, pairs.wrong_ids)


def log_prob(logits_last: Tensor, pairs: PromptPairs) -> Tensor:
    """Return the log-probability of the answer in nats, `[n]`, of logits `[n, vocab]`."""
    _check(logits_last, pairs)
    return _at(logits_last, pairs.answer_ids) - logits_last.logsumexp(-1)


def kl(logits_last: Tensor, reference: Tensor) -> Tensor:
    """Return KL(softmax(reference) || softmax(logits)) in nats, `[n]`; both `[n, vocab]`."""
    if logits_last.shape != reference.shape:
        raise ShapeError(f"logits {list(logits_last.shape)} cannot be compared with {list(reference.shape)}")
    log_p, log_q = (torch.log_softmax(x.float(), -1) for x in (reference, logits_last))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class Metric:
    """A metric together with the pairs that it judges, for any selection of their rows.

    Attributes:
        name, unit: for people.
        function: from logits `[b, vocab]` and row numbers `[b]` to `[b]`.
        columns: token ids `[n, k]` whose logits are all that it needs, or `None`; then the logits it gets
            are `[b, k]`.
    """

    name: str
    unit: str
    function: Callable[[Tensor, Tensor], Tensor]
    columns: Tensor | None = None

    @classmethod
    def of(cls, metric: str | MetricFunction, pairs: PromptPairs, clean_logits: Tensor) -> Metric:
        """Return a metric by name, or one's own function.

        Raises:
            InputError: there is none of that name.
        """
        if not isinstance(metric, str):
            own = metric
            name = getattr(own, "__name__", "metric")
            return cls(name, UNITS.get(name, ""), lambda z, rows: own(z, pairs.take(rows)))
        if metric == "logit_difference":
            both = torch.stack([pairs.answer_ids, pairs.wrong_ids], 1)
            return cls(metric, "logits", lambda z, rows: z[:, 0] - z[:, 1], both)
        if metric == "log_prob":
            ids = pairs.answer_ids
            return cls(metric, "nats", lambda z, rows: _at(z, ids[rows]) - z.logsumexp(-1))
        if metric == "kl":
            return cls(metric, "nats", lambda z, rows: kl(z, clean_logits[rows]))
        hint = did_you_mean(metric, METRICS) or f"; there are {', '.join(METRICS)}"
        raise InputError(f"there is no metric {metric!r}{hint}")

    def whole(self, logits: Tensor) -> Tensor:
        """Return the metric of logits `[n, vocab]` of all rows.

        Raises:
            ShapeError: one's own function does not give one number a row.
            NonFiniteError: the metric is NaN or infinite.
        """
        rows = torch.arange(len(logits), device=logits.device)
        narrow = logits if self.columns is None else logits.gather(1, self.columns)
        found = self.function(narrow, rows)
        if found.shape != rows.shape:
            raise ShapeError(f"the metric {self.name} gives {list(found.shape)}; it must give [{len(rows)}]")
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(f"the metric {self.name} is NaN or infinite on some prompts")
        return found


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids.to(logits.device)[:, None])[:, 0]


def _check(logits: Tensor, pairs: PromptPairs) -> None:
    if logits.ndim != 2 or len(logits) != len(pairs):
        raise ShapeError(f"logits are [n, vocab] with n={len(pairs)}, not {list(logits.shape)}")
