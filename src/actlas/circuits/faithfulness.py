"""Is a circuit the mechanism? Faithfulness, completeness and minimality of edges, with controls.

    F(E) = (m(only E carry the clean prompt) - m(corrupted)) / (m(clean) - m(corrupted))

    faithfulness    F(circuit): 1 if the circuit alone does what the model does, with everything else as on
                    the corrupted prompts
    remainder       F(all other edges): 0 if the circuit is complete, i.e. nothing else can do the task
    incompleteness  |F(circuit without K) - F(model without K)| over random halves K of the circuit's parts
    minimality      F(circuit) - F(circuit without a part), for every part

The runs are exact (`edge_stream`), only the choice of the edges is an estimate. Intervals are bootstraps over
prompts, numerator and denominator together. The control is the faithfulness of random circuits of as many
edges, made of random paths from input to logits.

Source: Wang et al. 2022 (arXiv 2211.00593), section 4; Hanna et al. 2024 (arXiv 2403.17806).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.circuits.edge_attribution import BATCH
from actlas.circuits.edge_stream import EdgeStream, Weights
from actlas.circuits.effects import check_difference
from actlas.core.errors import InputError
from actlas.core.intervals import bootstrap_ratio
from actlas.core.measurement import Measurement

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.graph import Graph
    from actlas.core.model import Model


class EdgeRuns:
    """Prompt pairs on which any set of edges can be run.

    Args:
        model: a causal language model whose parts add up.
        pairs: clean and corrupted prompts.
        batch: pairs a pass.

    Attributes:
        graph: the model's writers and receivers.
        clean, corrupt: logit differences of the two runs, `[n]` float64.
    """

    def __init__(self, model: Model, pairs: PromptPairs, *, batch: int = BATCH, seed: int = 0) -> None:
        if batch < 1:
            raise InputError(f"batch={batch}; it must be at least 1")
        self.pairs, self.seed = pairs, seed
        weights = Weights(model)
        self.graph: Graph = weights.graph
        starts = range(0, len(pairs), batch)
        self._streams = [EdgeStream(weights, pairs.take(slice(i, i + batch))) for i in starts]
        self.clean, self.corrupt = (
            torch.cat([_difference(s.logits[side].gather(1, s.columns)) for s in self._streams])
            for side in ("clean", "corrupt")
        )
        check_difference(self.clean, self.corrupt, "logit_difference")

    def __len__(self) -> int:
        return len(self.pairs)

    def difference(self, edges: Tensor) -> Tensor:
        """Return the logit difference with only these edges carrying the clean prompt, `[n]` float64.

        Raises:
            InputError: a mask of another graph.
        """
        if edges.shape != self.graph.allowed.shape:
            raise InputError(
                f"the edges are {list(edges.shape)}; this model's graph is {list(self.graph.allowed.shape)}"
            )
        kept = edges & self.graph.allowed
        return torch.cat([_difference(s.run(kept)) for s in self._streams])

    def share(self, edges: Tensor) -> float:
        """Return F(edges), without an interval."""
        return float((self.difference(edges) - self.corrupt).mean() / (self.clean - self.corrupt).mean())

    def measured(self, name: str, edges: Tensor, *, note: str = "", **group: str) -> Measurement:
        """Return F(edges) with its interval."""
        return self.ratio(name, self.difference(edges) - self.corrupt, note=note, **group)

    def ratio(self, name: str, change: Tensor, *, note: str = "", **group: str) -> Measurement:
        """Return the mean of changes in logit difference as a share of clean minus corrupted."""
        whole = (self.clean - self.corrupt).numpy()
        low, high = bootstrap_ratio(change.numpy(), whole, seed=self.seed)
        return Measurement(
            name, float(change.mean() / whole.mean()), "fraction", len(whole),
            None if math.isnan(low) else low, None if math.isnan(high) else high,
            "bootstrap over prompts", self.seed, group={"task": self.pairs.task, **group}, note=note,
        )  # fmt: skip


def circuit_scores(
    runs: EdgeRuns, edges: Tensor, *, controls: int = 5, halves: int = 4, seed: int = 0
) -> list[Measurement]:
    """Return faithfulness, its control, what the rest does alone, and incompleteness.

    Args:
        runs: prompts that did not choose the edges.
        edges: the circuit, bool `[receivers, writers]`.
        controls: random circuits of as many edges.
        halves: random halves of the circuit's parts that are taken out.
        seed: of both.
    """
    count, parts = int(edges.sum()), runs.graph.parts(edges)
    if not count:
        raise InputError("the circuit has no edges, so there is nothing to test")
    here = runs.difference(edges)
    found = [runs.ratio("circuit faithfulness", here - runs.corrupt, note=f"{count} edges")]
    if controls:
        drawn = [runs.graph.random(count, seed * 1000 + i) for i in range(controls)]
        random = torch.stack([runs.difference(x) for x in drawn]).mean(0)
        note = f"{controls} random circuits of as many edges"
        found.append(runs.ratio("random circuit faithfulness", random - runs.corrupt, note=note))
        found.append(runs.ratio("circuit minus random circuits", here - random, note=note))
    rest = runs.graph.allowed & ~edges
    note = (
        "all other edges carry the clean prompt, the circuit's the corrupted one; 0: the circuit is complete"
    )
    found.append(runs.measured("remainder without the circuit", rest, note=note))
    gaps = []
    for k in range(halves if len(parts) > 1 else 0):
        generator = torch.Generator().manual_seed(seed * 1000 + k)
        cut = [parts[i] for i in torch.randperm(len(parts), generator=generator)[: len(parts) // 2].tolist()]
        small, model = edges.clone(), runs.graph.allowed.clone()
        small[:, cut], model[:, cut] = False, False
        gaps.append((runs.difference(small) - runs.difference(model)).mean().abs())
    if gaps:
        each = torch.stack(gaps) / (runs.clean - runs.corrupt).mean()
        found.append(
            Measurement(
                "circuit incompleteness", float(each.mean()), "fraction", halves, float(each.min()),
                float(each.max()), "range over random halves of the circuit's parts", seed, better="lower",
                group={"task": runs.pairs.task}, note="difference between circuit and model without the half",
            )
        )  # fmt: skip
    return found


def minimality(runs: EdgeRuns, edges: Tensor) -> list[Measurement]:
    """Return, for every head and MLP of a circuit, what the circuit loses without it; largest first."""
    whole = runs.difference(edges)
    found = []
    for part in runs.graph.parts(edges):
        cut = edges.clone()
        cut[:, part] = False
        loss = whole - runs.difference(cut)
        found.append(runs.ratio("loss without the part", loss, part=runs.graph.writers[part]))
    return sorted(found, key=lambda m: -abs(m.value))


def minimality_share(losses: Sequence[Measurement], seed: int = 0) -> Measurement:
    """Return the share of parts whose removal changes the circuit's score, by their intervals."""
    from actlas.measure.samples import rate_measurement

    moved = [m.low is not None and m.high is not None and (m.low > 0 or m.high < 0) for m in losses]
    return rate_measurement(
        "circuit minimality", moved, seed=seed, better="higher",
        note="share of heads and MLPs without which the circuit's score changes (95% interval excludes 0)",
    )  # fmt: skip


def _difference(logits: Tensor) -> Tensor:
    return (logits[:, 0] - logits[:, 1]).double().cpu()
