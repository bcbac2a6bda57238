"""Find a circuit and test it: edges by attribution, size by faithfulness, judged on prompts kept apart.

    circuit = find_circuit(model, "ioi")

1. Prompt pairs are split by their right answer: no answer of the test is one that the search saw.
2. Edge attribution (EAP-IG) on the search prompts scores every edge.
3. The circuit is the smallest set of strongest edges, pruned to paths from input to logits, whose exact
   faithfulness on the search prompts reaches the target.
4. On the test prompts: faithfulness against size and against random circuits of equal size, the remainder,
   incompleteness, minimality, and the faithfulness of its parts when the rest is mean-ablated.

Source: Conmy et al. 2023 (arXiv 2304.14997); Hanna et al. 2024 (arXiv 2403.17806).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.circuit import Circuit, ablate_all_but
from actlas.circuits.edge_attribution import STEPS, EdgeScores, attribute_edges
from actlas.circuits.faithfulness import EdgeRuns, circuit_scores, minimality, minimality_share
from actlas.circuits.metrics import logit_difference
from actlas.circuits.position_means import position_means
from actlas.core.errors import InputError
from actlas.core.intervals import bootstrap_ratio
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.data.task_items import Task, TaskItem

SIZES = (10, 25, 50, 100, 200, 400, 800, 1600, 3200, 6400)
TARGET = 0.85
BISECTIONS = 3
TESTED_PARTS = 16
"""Test prompts for minimality, which needs one run a part."""


@method(
    "circuit",
    room="circuits",
    returns="Measurement",
    data="task",
    summary="the parts and edges that carry a task, tested for faithfulness on prompts kept apart",
    example="actlas fit circuit smollm2 ioi --option n=24 --option held_out=24",
    papers=("entity-tracking-finetuning",),
)
def fit_circuit(
    model: Model,
    data: Any,
    *,
    n: int = 48,
    held_out: int = 48,
    target: float = TARGET,
    steps: int = STEPS,
    controls: int = 5,
    seed: int = 0,
) -> tuple[Measurement, ...]:
    """Find a task's circuit and return its scores; `find_circuit` returns the circuit itself.

    Args:
        model: a causal language model with a tokenizer.
        data: a task.
        n, held_out, target, steps, controls, seed: as for `find_circuit`.
    """
    options: dict[str, Any] = {"target": target, "steps": steps, "controls": controls, "seed": seed}
    return find_circuit(model, data, n=n, held_out=held_out, **options).scores


def find_circuit(
    model: Model,
    task: str | Task | Sequence[TaskItem] | Sequence[Mapping[str, str]],
    *,
    n: int = 48,
    held_out: int = 48,
    target: float = TARGET,
    edges: int | None = None,
    sizes: Sequence[int] = SIZES,
    steps: int = STEPS,
    controls: int = 5,
    correct_only: bool = False,
    force: bool = False,
    seed: int = 0,
) -> Circuit:
    """Find the circuit of a task and test it on prompts kept apart.

    Args:
        model: a causal language model whose parts add up.
        task: see `PromptPairs.from_task`.
        n, held_out: about how many pairs search and test.
        target: share of the behaviour that the circuit must carry on the search prompts.
        edges: take this many of the strongest edges instead of searching for a size.
        sizes: numbers of edges that are tried, and drawn as a curve.
        steps: see `attribute_edges`.
        controls: random circuits of equal size.
        correct_only, force: see `PromptPairs.from_task`.
        seed: of the task, the split and all controls.

    Raises:
        InputError: settings that make no sense, a task that the model fails, or answers that cannot be split.
        ModelError: a model whose parts do not add up.
    """
    if n < 2 or held_out < 2:
        raise InputError(f"n={n}, held_out={held_out}: at least 2 pairs are needed to search and to test")
    pairs = PromptPairs.from_task(
        model, task, n=n + held_out, seed=seed, correct_only=correct_only, force=force
    )
    search, test = split_by_answer(pairs, held_out / (n + held_out), seed)
    options: dict[str, Any] = {"target": target, "edges": edges, "sizes": sizes, "steps": steps}
    return circuit_of(model, search, test, controls=controls, seed=seed, **options)


def circuit_of(
    model: Model,
    search: PromptPairs,
    test: PromptPairs,
    *,
    target: float = TARGET,
    edges: int | None = None,
    sizes: Sequence[int] = SIZES,
    steps: int = STEPS,
    controls: int = 5,
    seed: int = 0,
) -> Circuit:
    """Find a circuit on some pairs and test it on others; see `find_circuit`."""
    if not 0 < target <= 1:
        raise InputError(f"target={target}; it must be above 0 and at most 1")
    if not sizes or min(sizes) < 1 or (edges is not None and edges < 1):
        raise InputError(f"sizes={list(sizes)}, edges={edges}: circuits have at least 1 edge")
    scores = attribute_edges(model, search, steps=steps, seed=seed)
    runs = EdgeRuns(model, search, seed=seed)
    tried: dict[int, float] = {}
    with progress("circuit search", total=len(sizes) + BISECTIONS, unit="sizes") as advance:
        if edges is None:
            for size in sorted(sizes):
                tried[size] = _share(runs, scores, size)
                advance(1)
                if tried[size] >= target:
                    break
            chosen = _bisect(runs, scores, tried, target)
        else:
            chosen = edges
    mask = scores.strongest(chosen)
    if not bool(mask.any()):
        raise InputError(
            f"none of the {chosen} strongest edges lie on a path from the input to the logits; ask for more"
        )
    notes = [f"chosen on {len(search)} prompts: F = {runs.share(mask):.2f}, target {target:g}"]
    if edges is None and max(tried.values()) < target:
        notes.append(
            f"no circuit up to {max(tried)} edges reached the target of {target:g} on the search prompts"
        )
    notes += [test.note] if test.note else []
    tests = EdgeRuns(model, test, seed=seed)
    measured = circuit_scores(tests, mask, controls=controls, seed=seed)
    some = EdgeRuns(model, test.take(slice(0, TESTED_PARTS)), seed=seed)
    losses = minimality(some, mask)
    measured.append(minimality_share(losses, seed))
    found = Circuit(
        model.name, search.task, scores.graph, scores.edges(mask), scores.method,
        curve=tuple(_curve(tests, scores, [*sizes, chosen], seed)), losses=tuple(losses),
        means=position_means(model, search), fingerprint=model.fingerprint, seed=seed, notes=tuple(notes),
    )  # fmt: skip
    measured += mean_ablation_scores(model, found, test, controls=min(controls, 3), seed=seed)
    return replace(found, scores=tuple(measured))


def split_by_answer(pairs: PromptPairs, share: float, seed: int) -> tuple[PromptPairs, PromptPairs]:
    """Return (search, test) pairs with no right answer in common, about `share` of them in the test.

    Raises:
        InputError: fewer than two answers.
    """
    answers = pairs.answer_ids.tolist()
    distinct = sorted(set(answers))
    if len(distinct) < 2:
        raise InputError("all pairs have the same right answer, so no answers can be kept apart for the test")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    test: set[int] = set()
    for i in order[:-1]:
        if test and sum(a in test for a in answers) >= share * len(answers):
            break
        test.add(distinct[i])
    rows = [i for i, a in enumerate(answers) if a in test]
    return pairs.take([i for i, a in enumerate(answers) if a not in test]), pairs.take(rows)


def mean_ablation_scores(
    model: Model, circuit: Circuit, pairs: PromptPairs, *, controls: int = 3, seed: int = 0
) -> list[Measurement]:
    """Return the faithfulness of a circuit's parts with all other parts at their mean, and the control.

    The share is of the logit difference between the clean run and one in which every part is ablated. The
    control keeps as many random heads and as many random MLPs.
    """
    whole = _under(model, pairs, None)
    none = _under(model, pairs, ablate_all_but(circuit, ()))
    kept = list(circuit.nodes)
    everything = len(kept) == len(circuit.graph.writers) - 1
    here = whole if everything else _under(model, pairs, circuit.ablate_rest())
    base, group = (whole - none).numpy(), {"task": circuit.task}

    def ratio(name: str, change: Tensor, note: str) -> Measurement:
        low, high = bootstrap_ratio(change.numpy(), base, seed=seed)
        return Measurement(
            name, float(change.mean() / base.mean()), "fraction", len(base),
            None if math.isnan(low) else low, None if math.isnan(high) else high,
            "bootstrap over prompts", seed, group=group, note=note,
        )  # fmt: skip

    note = f"{len(kept)} heads and MLPs stay, the others are replaced by their means by position"
    found = [ratio("part faithfulness, mean ablation", here - none, note)]
    if controls and not everything:
        drawn = [_random_parts(circuit, kept, seed * 1000 + i) for i in range(controls)]
        random = torch.stack([_under(model, pairs, ablate_all_but(circuit, x)) for x in drawn]).mean(0)
        note = f"{controls} random sets of as many heads and MLPs"
        found.append(ratio("random parts, mean ablation", random - none, note))
        found.append(ratio("parts minus random parts, mean ablation", here - random, note))
    return found


def _random_parts(circuit: Circuit, kept: Sequence[str], seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in ("L", "MLP"):
        pool = [w for w in circuit.graph.writers[1:] if w.startswith(start)]
        count = sum(k.startswith(start) for k in kept)
        found += [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]
    return found


def _under(model: Model, pairs: PromptPairs, edit: Edit | None) -> Tensor:
    found = []
    with model.edit(edit) if edit is not None else nullcontext():
        for start in range(0, len(pairs), 16):
            part = pairs.take(slice(start, start + 16))
            found.append(logit_difference(part.last_logits(model), part).double().cpu())
    return torch.cat(found)


def _share(runs: EdgeRuns, scores: EdgeScores, size: int) -> float:
    mask = scores.strongest(size)
    return runs.share(mask) if bool(mask.any()) else 0.0


def _bisect(runs: EdgeRuns, scores: EdgeScores, tried: dict[int, float], target: float) -> int:
    """Return the smallest size found to reach the target; the largest tried where none does."""
    for _ in range(BISECTIONS):
        above = min((s for s, v in tried.items() if v >= target), default=None)
        if above is None:
            return max(tried)
        below = max((s for s in tried if s < above), default=1)
        middle = round(math.sqrt(below * above))
        if middle in tried or middle <= below:
            break
        tried[middle] = _share(runs, scores, middle)
    return min((s for s, v in tried.items() if v >= target), default=max(tried))


def _curve(runs: EdgeRuns, scores: EdgeScores, sizes: Sequence[int], seed: int) -> list[dict[str, float]]:
    """Return faithfulness on the test prompts by size, with one random circuit of equal size each."""
    rows = []
    for size in sorted(set(sizes)):
        mask = scores.strongest(min(size, int(scores.graph.allowed.sum())))
        count = int(mask.sum())
        if not count:
            continue
        found = runs.measured("faithfulness", mask)
        rows.append(
            {
                "edges": count,
                "parts": len(scores.graph.parts(mask)),
                "faithfulness": found.value,
                "low": found.value if found.low is None else found.low,
                "high": found.value if found.high is None else found.high,
                "random": runs.share(scores.graph.random(count, seed * 1000 + 999)),
            }
        )
    return rows
