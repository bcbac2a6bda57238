"""From a subject and data to one number an item: what `evaluate` splits into groups."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.errors import InputError, did_you_mean
from actlas.core.measurement import Better

if TYPE_CHECKING:
    from actlas.core.model import Model

RATES = {
    "fpr": "there are no negatives",
    "fnr": "there are no positives",
    "fdr": "nothing was decided positive",
    "for": "nothing was decided negative",
}
"""The four error rates of a decision, and why one may be undefined."""

METRICS = ("accuracy", "error rate", *RATES, "auc", "pinned auc", "mean", "loss per byte")


@dataclass(frozen=True)
class Scores:
    """One number an item.

    Attributes:
        name, unit, better: of the metric.
        values: shape [n]; for AUC the scores.
        counted: which items count (the negatives, for a false positive rate), shape [n].
        weights: weight of each item, or `None`.
        binary: whether the values are hits (0 or 1).
        labels: shape [n], 0 or 1; only for AUC, which is no mean.
        empty: why a cell may have nothing to count.
        over: what an item is, for the interval's description.
        under: edits that were installed.
    """

    name: str
    unit: str
    better: Better | None
    values: NDArray[np.float64]
    counted: NDArray[np.bool_]
    weights: NDArray[np.float64] | None = None
    binary: bool = False
    labels: NDArray[np.bool_] | None = None
    empty: str = "there are no items"
    over: str = "items"
    under: tuple[str, ...] = ()


def scores_of(
    subject: Any,
    data: Any,
    items: Sequence[Any],
    metric: str | Callable[[Any, Any], float],
    *,
    threshold: float = 0.5,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Scores:
    """Return the metric's number for every item; arguments as of `evaluate`.

    Raises:
        InputError: unknown metric, predictions or weights of another length, labels that are missing
            or not binary where they must be.
    """
    if isinstance(metric, str) and metric not in METRICS:
        hint = did_you_mean(metric, METRICS) or "; known: " + ", ".join(METRICS)
        raise InputError(f"there is no metric {metric!r}{hint}")
    w = None if weights is None else _numbers(weights, "weights", len(items))
    if w is not None and (w < 0).any():
        raise InputError(f"weights must not be negative, and one is {w.min()}")
    every = np.ones(len(items), dtype=bool)
    if _is_model(subject):
        scores = _model_scores(subject, data, items, metric)
        if scores is not None:
            if weights is not None:
                raise InputError("a model on a task or corpus has its own weights; leave `weights` out")
            return scores
    predictions = _predictions(subject, items)
    under = tuple(e.describe() for e in getattr(subject, "installed", ()))
    if callable(metric):
        name = getattr(metric, "__name__", "metric").replace("_", " ")
        found = [metric(p, item) for p, item in zip(predictions, items, strict=True)]
        return Scores(name, "", None, _numbers(found, name, len(items)), every, w, under=under)
    if metric == "mean":
        values = _numbers(predictions, "predictions", len(items))
        binary = bool(np.isin(values, (0.0, 1.0)).all())
        return Scores("mean", "", None, values, every, w, binary, under=under)
    if metric == "loss per byte":
        raise InputError("loss per byte needs a causal-lm and a corpus; give these, or the losses and `mean`")
    truth = [label_of(item) for item in items]
    if metric in ("accuracy", "error rate"):
        hits = np.array(
            [_same(p, t, threshold) for p, t in zip(predictions, truth, strict=True)], dtype=float
        )
        right = metric == "accuracy"
        better: Better = "higher" if right else "lower"
        return Scores(metric, "fraction", better, hits if right else 1 - hits, every, w, True, under=under)
    y = np.array([_binary(t) for t in truth])
    if metric in ("auc", "pinned auc"):
        score = _numbers(predictions, "scores", len(items))
        return Scores(metric, "", "higher", score, every, None, labels=y, under=under)
    d = np.array([_decision(p, threshold) for p in predictions])
    counted, hit = {"fpr": (~y, d), "fnr": (y, ~d), "fdr": (d, ~y), "for": (~d, y)}[metric]
    return Scores(
        metric, "fraction", "lower", hit.astype(float), counted, w, True, empty=RATES[metric], under=under
    )


def data_hash(data: Any) -> str:
    """Return the SHA-256 of data: its own `.hash`, or that of its items as text."""
    own = getattr(data, "hash", None)
    if isinstance(own, str) and own:
        return own.lower()
    digest = hashlib.sha256()
    for item in data:
        holder = (
            item
            if isinstance(item, (Mapping, str, int, float, list, tuple))
            else getattr(item, "__dict__", item)
        )
        text = json.dumps(holder, sort_keys=True, default=repr, ensure_ascii=True)
        digest.update(len(text).to_bytes(8, "big") + text.encode())
    return digest.hexdigest()


def label_of(item: Any) -> Any:
    """Return an item's label.

    Raises:
        InputError: it has none.
    """
    for key in ("label", "answer", "target"):
        if isinstance(item, Mapping):
            if key in item:
                return item[key]
        elif getattr(item, key, None) is not None:
            return getattr(item, key)
    raise InputError("an item has no label; give each a `label`")


def _is_model(subject: Any) -> bool:
    return hasattr(subject, "fingerprint") and hasattr(subject, "module")


def _model_scores(model: Model, data: Any, items: Sequence[Any], metric: Any) -> Scores | None:
    """Scores of the pairs of model and data that the measure room knows how to run."""
    under = tuple(e.describe() for e in model.installed)
    every = np.ones(len(items), dtype=bool)
    if metric in ("accuracy", "error rate") and hasattr(data, "chance") and model.kind == "causal-lm":
        from actlas.measure.tasks import answer

        hits = answer(model, data).correct.astype(float)
        right = metric == "accuracy"
        return Scores(
            "task-accuracy" if right else "task error rate", "fraction", "higher" if right else "lower",
            hits if right else 1 - hits, every, None, True, under=under,
        )  # fmt: skip
    if metric == "loss per byte" and model.kind == "causal-lm":
        from actlas.measure.likelihood import nll

        losses = nll(model, data)
        if len(losses.ids) != len(items) or not np.isfinite(losses.bytes).all():
            raise InputError("loss per byte needs a tokenizer that says which characters a token stands for")
        bits = losses.nll / np.log(2)
        ratio = np.divide(bits, losses.bytes, out=np.zeros(len(bits)), where=losses.bytes > 0)
        return Scores(
            "loss-per-byte", "bits/byte", "lower", ratio, losses.bytes > 0, losses.bytes,
            over="documents", under=under,
        )  # fmt: skip
    return None


def _predictions(subject: Any, items: Sequence[Any]) -> list[Any]:
    if _is_model(subject):
        raise InputError(
            "a model can be evaluated on a task (accuracy) or a corpus (loss per byte); for other data give "
            "a function `item -> prediction`"
        )
    if callable(subject):
        return [subject(item) for item in items]
    predictions = list(subject)
    if len(predictions) != len(items):
        raise InputError(f"there are {len(items)} items but {len(predictions)} predictions; give one an item")
    return [p.item() if hasattr(p, "item") and getattr(p, "ndim", 0) == 0 else p for p in predictions]


def _numbers(values: Iterable[Any], what: str, n: int) -> NDArray[np.float64]:
    try:
        x = np.asarray([float(v) for v in values])
    except (TypeError, ValueError):
        raise InputError(f"{what} must be numbers") from None
    if len(x) != n:
        raise InputError(f"there are {n} items but {len(x)} {what}; give one an item")
    if not np.isfinite(x).all():
        raise InputError(f"{what} hold {x[~np.isfinite(x)][0]} at item {int(np.argmin(np.isfinite(x)))}")
    return x


def _same(prediction: Any, label: Any, threshold: float) -> bool:
    """A fractional score against a binary label is decided by the threshold."""
    if isinstance(prediction, float) and isinstance(label, (bool, int)) and not prediction.is_integer():
        return (prediction >= threshold) == bool(label)
    return bool(prediction == label)


def _decision(prediction: Any, threshold: float) -> bool:
    if isinstance(prediction, (bool, np.bool_)):
        return bool(prediction)
    try:
        return float(prediction) >= threshold
    except (TypeError, ValueError):
        raise InputError(
            f"a binary prediction is true, false or a score, not {plain_repr(prediction)}"
        ) from None


def _binary(label: Any) -> bool:
    if label in (0, 1, True, False):
        return bool(label)
    raise InputError(f"this metric needs labels that are 0 or 1, not {plain_repr(label)}")


def plain_repr(value: Any) -> str:
    return repr(value)[:40]
