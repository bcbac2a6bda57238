"""Edge attribution patching: estimate, from one gradient, what every edge of a model carries.

    score(w -> r)  =  m(clean) - m(edge patched)  ~  (a_w(clean) - a_w(corrupted)) . dm/dx_r

for every writer w and every receiver r after it, where x_r is what r reads (before its norm). One pass over
each side of the pairs and one backward pass give all edges at once. A gradient at the clean run misses what
saturates; `steps` averages it over runs whose embeddings lie between the two prompts (EAP-IG).

Summed over the receivers of a writer, the scores are attribution patching of the writer.

Source: Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from actlas.circuits.edge_stream import EdgeStream, Weights
from actlas.circuits.effects import check_difference
from actlas.circuits.graph import Graph
from actlas.circuits.metrics import Metric
from actlas.core.errors import InputError
from actlas.core.intervals import divide, percentiles, resample_counts
from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model

BATCH = 8
STEPS = 5
RESAMPLES = 1000


@dataclass(frozen=True)
class Edge:
    """One edge of a circuit.

    Attributes:
        source: a writer, `"input"`, `"L5H3"` or `"MLP 5"`.
        target: a receiver, `"L5H3.q"`, `"L5K1"`, `"L5V1"`, `"MLP 5"` or `"logits"`.
        score: the share of the difference between clean and corrupted prompts that it carries, estimated.
        low, high: 95% interval over prompts.
    """

    source: str
    target: str
    score: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """What edge attribution found.

    Attributes:
        graph: the model's writers and receivers.
        changes: the metric's fall when an edge is patched, estimated, `[n, receivers, writers]` float32.
        clean, corrupt: the metric of the two runs, `[n]` float64.
        method: how it was estimated.
        seed: of intervals.
    """

    graph: Graph
    changes: Tensor = field(repr=False)
    clean: Tensor = field(repr=False)
    corrupt: Tensor = field(repr=False)
    method: str
    seed: int = 0

    @property
    def values(self) -> Tensor:
        """Scores as shares of the difference between the runs, float64 `[receivers, writers]`."""
        return self.changes.mean(0).double() / (self.clean - self.corrupt).mean()

    def strongest(self, count: int) -> Tensor:
        """Return the edges on paths from input to logits among the `count` largest in absolute value.

        Raises:
            InputError: fewer than one edge.
        """
        if count < 1:
            raise InputError(f"a circuit of {count} edges is none; ask for at least 1")
        sizes = self.values.abs().masked_fill(~self.graph.allowed, -1.0).flatten()
        chosen = torch.zeros_like(sizes, dtype=torch.bool)
        chosen[sizes.argsort(descending=True, stable=True)[:count]] = True
        return self.graph.pruned(chosen.reshape(self.graph.allowed.shape))

    def edges(self, mask: Tensor) -> tuple[Edge, ...]:
        """Return edges with their scores and intervals, largest first."""
        where = mask.nonzero()
        if not len(where):
            return ()
        num = self.changes[:, where[:, 0], where[:, 1]].double().numpy()
        den = (self.clean - self.corrupt).numpy()
        n = len(den)
        values = num.mean(0) / den.mean()
        bounds: list[tuple[float | None, float | None]] = [(None, None)] * len(where)
        if n > 1:
            draws = np.concatenate(
                [
                    divide(c @ num, np.repeat((c @ den)[:, None], num.shape[1], 1))
                    for c in resample_counts(n, RESAMPLES, self.seed)
                ]
            )
            bounds = [percentiles(draws[:, i], n) for i in range(len(where))]
        found = [
            Edge(source, target, float(v), low, high)
            for (_, _, source, target), v, (low, high) in zip(
                self.graph.names(mask), values, bounds, strict=True
            )
        ]
        return tuple(sorted(found, key=lambda e: -abs(e.score)))


def attribute_edges(
    model: Model, pairs: PromptPairs, *, steps: int = STEPS, batch: int = BATCH, seed: int = 0
) -> EdgeScores:
    """Estimate what every edge carries, in logit difference.

    Args:
        model: a causal language model whose parts add up (no norms after the addition).
        pairs: clean and corrupted prompts.
        steps: 0 for the gradient at the clean run (EAP), else the number of runs between clean and
            corrupted embeddings over which it is averaged (EAP-IG; 5 are usual).
        batch: pairs a pass.
        seed: of the intervals.

    Raises:
        ModelError: a model whose parts do not add up.
        InputError: settings that make no sense, or prompts whose logit differences do not differ.
    """
    if steps < 0 or batch < 1:
        raise InputError(f"steps={steps}, batch={batch}: steps must be at least 0 and batch at least 1")
    weights = Weights(model)
    allowed = weights.graph.allowed
    found, clean, corrupt = [], [], []
    points = [None] if steps == 0 else [(k + 0.5) / steps for k in range(steps)]
    starts = range(0, len(pairs), batch)
    with progress("edge attribution", total=len(starts) * len(points), unit="passes") as advance:
        for start in starts:
            part = pairs.take(slice(start, start + batch))
            stream = EdgeStream(weights, part)
            judge = Metric.of("logit_difference", part, stream.logits["clean"])
            clean.append(judge.whole(stream.logits["clean"]))
            corrupt.append(judge.whole(stream.logits["corrupt"]))
            total = torch.zeros(len(part), *allowed.shape)
            for point in points:
                gradients = stream.gradients(judge, point)
                total += torch.bmm(gradients, stream.differences.transpose(1, 2)).float().cpu()
                advance(1)
            found.append(total / len(points) * allowed)
    a, b = (torch.cat(x).double().cpu() for x in (clean, corrupt))
    check_difference(a, b, "logit_difference")
    method = f"EAP-IG ({steps} steps)" if steps else "EAP"
    return EdgeScores(weights.graph, torch.cat(found), a, b, method, seed)
