"""One pass over a corpus that many measures read together.

    observe(model, corpus, [NormObserver(...), AttentionObserver(...)], tokens=2048) -> list[Measurement]

An Observer says which sites it needs, keeps small sums of every batch, and turns them into measurements at
the end. All observers of a pass see the same tokens. A token whose residual state is a massive activation at
any layer is reported apart and left out of every average, the same tokens at all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.errors import ModelError, NonFiniteError
from actlas.core.intervals import percentiles, resample_counts
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.reading import read, token_rows

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.trace import Trace

RESAMPLES = 200
GROUPS = 24  # groups of documents of which sums are kept, where a sum per document would take much memory


@dataclass
class Batch:
    """What observers see of one forward pass.

    Attributes:
        model: the model.
        trace: what was read.
        document: number of the document of each token, counted over the whole pass, [n].
        place: position of each token in its window, [n].
        massive: whether the token is massive at some layer, bool [n].
        names: the documents so far, by number.
    """

    model: Model
    trace: Trace
    document: NDArray[np.int64]
    place: NDArray[np.int64]
    massive: NDArray[np.bool_]
    names: list[str]

    @cached_property
    def ordinary(self) -> NDArray[np.bool_]:
        """Which tokens count in averages, bool [n]."""
        return ~self.massive

    def rows(self, site: str) -> Tensor:
        """Return the activations of all real tokens, `[n, d]`, heads flattened."""
        x = self.trace.rows(site)
        return x.flatten(1)


class Observer:
    """Base of observers; see the module's text."""

    def sites(self, model: Model) -> list[str]:
        """Return the names of the sites that every batch must hold."""
        return []

    def attach(self, model: Model, stack: ExitStack) -> None:
        """Place readers of its own for the length of the pass; the stack removes them."""

    def update(self, batch: Batch) -> None:
        """Take one batch."""
        raise NotImplementedError

    def results(self, seed: int) -> list[Measurement]:
        """Return the measurements; `seed` is that of the bootstrap."""
        raise NotImplementedError


def observe(
    model: Model,
    corpus: Iterable[Any],
    observers: Sequence[Observer],
    *,
    tokens: int | None = 4096,
    context: int = 256,
    per_document: int | None = 128,
    batch_tokens: int = 512,
    seed: int = 0,
) -> list[Measurement]:
    """Stream a corpus once through the model and return what the observers found, in their order.

    Args:
        model: a model with a layout and a tokenizer; installed edits apply.
        corpus: documents or strings.
        observers: what to measure.
        tokens: tokens in all; context: of a window; per_document: of one document, about.
        batch_tokens: of one forward pass.
        seed: of the bootstraps.

    Raises:
        ModelError: the model has no residual sites.
        NonFiniteError: NaN or infinity in the residual stream.
    """
    states = residual_sites(model)
    wanted = dict.fromkeys([s.name for s in states])
    for observer in observers:
        wanted |= dict.fromkeys(observer.sites(model))
    names: dict[str, int] = {}
    with ExitStack() as stack:
        for observer in observers:
            observer.attach(model, stack)
        advance = stack.enter_context(progress("activation atlas", tokens, "tokens"))
        for trace in read(
            model,
            corpus,
            list(wanted),
            tokens=tokens,
            context=context,
            per_document=per_document,
            batch_tokens=batch_tokens,
        ):
            batch = _batch(model, trace, states, names)
            for observer in observers:
                observer.update(batch)
            advance(len(batch.document))
            del trace, batch  # or they would live through the next forward pass
    return [m for observer in observers for m in observer.results(seed)]


def residual_sites(model: Model) -> list[Site]:
    """Return the `resid_post` sites of the predicting tower."""
    if model.tower is None:
        raise ModelError(
            f"{model.name} has no layout, so its residual stream is not known; name module: sites"
        )
    prefix = f"{model.tower.name}." if model.tower.name else ""
    return model.resolve(f"{prefix}blocks.*.resid_post")


def block_sites(model: Model, kind: str) -> list[Site]:
    """Return the sites of a kind in the predicting tower that exist; possibly none."""
    tower = model.tower.name if model.tower is not None else ""
    return [s for s in model.sites() if s.kind == kind and s.tower == tower and s.absent is None]


def _batch(model: Model, trace: Trace, states: Sequence[Site], names: dict[str, int]) -> Batch:
    here, index = token_rows(trace)
    numbers = np.array([names.setdefault(name, len(names)) for name in here])
    massive = None
    for site in states:
        rows = trace.rows(site.name)
        if not bool(torch.isfinite(rows.sum())):
            raise NonFiniteError(f"{site.name} of {model.name} holds NaN or infinity; check the weights")
        found = massive_rows(rows)
        massive = found if massive is None else massive | found
    assert massive is not None and trace.mask is not None
    mask = trace.mask.cpu()
    place = (mask.cumsum(1) - 1)[mask].numpy()
    return Batch(model, trace, numbers[index], place, massive.cpu().numpy(), list(names))


# Bootstraps over documents ------------------------------------------------------------------------


def document_weights(
    documents: NDArray[np.int64], seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Return, for each draw of documents, the weight of each item: `[resamples, items]`."""
    held, index = np.unique(documents, return_inverse=True)
    counts = np.concatenate(list(resample_counts(len(held), resamples, seed)))
    return counts[:, index]


def quantile_interval(
    values: NDArray[np.float64], documents: NDArray[np.int64], q: float, seed: int
) -> tuple[float, float]:
    """Return the bootstrap interval over documents of a quantile of item values."""
    n = len(np.unique(documents))
    if n < 2:
        return float("nan"), float("nan")
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    weights = document_weights(documents[order], seed)
    draws = []
    for start in range(0, len(weights), 50):
        sums = weights[start : start + 50].cumsum(1)
        at = (sums < q * sums[:, -1:]).sum(1)
        draws.append(ordered[np.minimum(at, len(ordered) - 1)])
    return percentiles(np.concatenate(draws), n)


def group_draws(groups: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """Return how often each group of documents is drawn, `[resamples, groups]`."""
    return np.concatenate(list(resample_counts(groups, resamples, seed)))


def jackknife(value: float, left_out: Sequence[float]) -> tuple[float | None, float | None]:
    """Return `value -+ t * se` from the values without each of g groups (delete-a-group jackknife).

    For statistics that a bootstrap biases, such as a kurtosis, whose extremes most draws miss.
    """
    from scipy.stats import t

    g = len(left_out)
    if g < 2:
        return None, None
    x = np.array(left_out)
    if not np.isfinite(x).all():
        return None, None
    error = math.sqrt((g - 1) / g * float(((x - x.mean()) ** 2).sum()))
    half = float(t.ppf(0.975, g - 1)) * error
    return value - half, value + half
