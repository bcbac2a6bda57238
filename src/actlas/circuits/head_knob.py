"""A knob per head: find the head whose scale decides between two answers, and set it.

    found = tune_head(model, pairs)                     # an Edit; found.measurements: effect and controls

1. Attribution at the last token: a_h = (W_O^h z_h) . (W_U[answer] - W_U[wrong]) through the final norm (its
   gain, and each prompt's own scale). The heads of largest |a_h| are candidates.
2. z_h -> alpha z_h at the last token, for every candidate and alpha, on one half of the prompts; the head
   and alpha that make the answer come out most often win.
3. The other half says how good that is, beside random heads of the same layers at the same alpha, the
   opposite change (2 - alpha), and how often a third answer comes out.

Logit differences alone mislead: a large negative alpha can raise them while nothing sensible is said.
Source: "Characterizing Mechanisms for Factual Recall in Language Models" (Yu, Merullo and Pavlick 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.circuits.head_runs import Head, HeadRuns, random_heads
from actlas.circuits.interchange import as_pairs
from actlas.core.edit import Edit
from actlas.core.edits import HeadScale
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.progress import progress
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

ALPHAS = (-1.0, 0.0, 0.5, 2.0, 4.0, 6.0, 8.0)
RATES = ("answer", "wrong", "other")


@method(
    "tune-head",
    room="circuits",
    returns="Edit",
    data="task",
    summary="the attention head, and the factor on it, that make a task's answer come out most often",
    example="actlas fit tune-head smollm2 capitals-counterfactual -o head/",
    papers=("factual-recall-heads",),
)
def tune_head(
    model: Model,
    data: Any,
    *,
    heads: Sequence[Head] | None = None,
    candidates: int = 6,
    alphas: Sequence[float] = ALPHAS,
    metric: Literal["answer", "wrong"] = "answer",
    groups: Sequence[str] | None = None,
    controls: int = 20,
    n: int = 64,
    seed: int = 0,
) -> Edit:
    """Find the head and factor that make one answer win.

    Args:
        model: a causal language model with a layout.
        data: a task (its name or items with counterfactuals) or `PromptPairs`; the model need not do it.
        heads: (block, head) to try; `None`: those of largest attribution.
        candidates: how many of those, half of either sign.
        alphas: factors to try on each.
        metric: which answer is to come out.
        groups: a label for each pair (its country, say); pairs of one label stay on one side of the split.
        controls: random heads, of the layers from the first candidate's on.
        n: at most so many pairs.
        seed: of task, split and controls.

    Returns:
        A `HeadScale` of the winner at the newest token, with measurements on the half that it was not
        chosen on: rates of the three outcomes with and without it, with the opposite change (2 - alpha), and
        of random heads.
        The sweep is in `details["sweep"]` of the first.

    Raises:
        InputError: nothing to try, or too few pairs to split.
    """
    if not alphas or not all(math.isfinite(a) for a in alphas):
        raise InputError(f"alphas are {list(alphas)}; give at least one finite factor")
    if metric not in ("answer", "wrong"):
        raise InputError(f"metric is {metric!r}; it must be 'answer' or 'wrong'")
    pairs = as_pairs(model, data, n=n, force=True, seed=seed)
    parts = halves(len(pairs), groups, seed)
    dev, test = (pairs.take(part) for part in parts)
    clusters = None if groups is None else [str(groups[i]) for i in parts[1]]
    runs = HeadRuns(model, dev)
    named = [(int(b), int(h)) for b, h in heads] if heads is not None else strongest(runs, candidates)
    if not named:
        raise InputError("there is no head to try; give at least one, or more candidates")
    best, sweep = sweep_heads(runs, named, alphas, metric)
    found = head_effect(
        HeadRuns(model, test),
        {best[0]: best[1]},
        tried=named,
        metric=metric,
        clusters=clusters,
        controls=controls,
        seed=seed,
    )
    found[0] = replace(found[0], details={**found[0].details, "sweep": sweep})
    (block, head), alpha = best
    site = model.resolve(f"blocks.{block}.attn.z")[0].name
    made = HeadScale(site, factors={head: alpha}).at(positions="last")
    return made.with_measurements(found).bind(model.fingerprint)


def strongest(runs: HeadRuns, n: int) -> list[Head]:
    """Return the heads of most positive and most negative mean attribution, `n` in all."""
    mean = runs.attribution().mean(0)
    order = mean.flatten().argsort(descending=True).tolist()
    chosen = dict.fromkeys([*order[: n - n // 2], *(order[-(n // 2) :] if n > 1 else [])])
    return [(i // runs.heads, i % runs.heads) for i in chosen]


def halves(n: int, groups: Sequence[str] | None, seed: int) -> tuple[list[int], list[int]]:
    """Return the rows of a development and a test half; equal labels stay together.

    Raises:
        InputError: fewer than two different labels, or not one label a row.
    """
    labels = [str(i) for i in range(n)] if groups is None else [str(g) for g in groups]
    if len(labels) != n:
        raise InputError(f"{n} pairs need {n} group labels, not {len(labels)}")
    every = sorted(set(labels))
    if len(every) < 2:
        raise InputError("all pairs have the same group label, so they cannot be split in halves")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    first = {every[i] for i in order[: len(every) // 2]}
    return [i for i in range(n) if labels[i] in first], [i for i in range(n) if labels[i] not in first]


def sweep_heads(
    runs: HeadRuns, heads: Sequence[Head], alphas: Sequence[float], metric: str = "answer"
) -> tuple[tuple[Head, float], list[dict[str, Any]]]:
    """Scale every head by every factor; return the head and factor of the best rate, and all rates.

    Equal rates are settled for the factor nearest to 1.
    """
    rows: list[dict[str, Any]] = []
    with progress("scaling heads", len(heads) * len(alphas), "runs") as advance:
        for block, head in heads:
            for alpha in alphas:
                said = runs.scaled({(block, head): alpha})
                rates = {which: said.rate(which) for which in RATES}
                rows.append({"head": f"{block}.{head}", "alpha": float(alpha), **rates})
                advance()
    best = max(range(len(rows)), key=lambda i: (rows[i][metric], -abs(rows[i]["alpha"] - 1)))
    return (heads[best // len(alphas)], float(alphas[best % len(alphas)])), rows


def head_effect(
    runs: HeadRuns,
    factors: dict[Head, float],
    *,
    metric: str = "answer",
    tried: Sequence[Head] = (),
    clusters: Sequence[str] | None = None,
    controls: int = 20,
    first: int | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """Measure what scaling heads does to prompts, beside its controls.

    Args:
        runs: the prompts; not those that the heads were chosen on.
        factors: factor by (block, head), at the last token.
        metric: the outcome that is wanted.
        tried: heads that random ones must not be.
        clusters: labels of pairs that go together in intervals.
        controls: random choices of as many heads, at the same factors.
        first: random heads come from this block on; `None`: from the first tried or scaled one on.
        seed: of controls and intervals.

    Returns:
        The gain in the wanted rate, the gain beyond twice the random heads' rate, and the rates of all
        three outcomes without, with, with the opposite change (2 - alpha), and of random heads.
    """
    named = list(dict.fromkeys([*factors, *tried]))
    start = min(b for b, _ in named) if first is None else first
    pool = random_heads(runs, controls * len(factors), first=start, without=named, seed=seed)
    drawn = [pool[i : i + len(factors)] for i in range(0, len(pool) - len(factors) + 1, len(factors))]
    alphas = list(factors.values())
    said = {
        "none": runs.scaled({}),
        "tuned": runs.scaled(factors),
        "opposite change": runs.scaled({head: 2 - alpha for head, alpha in factors.items()}),
    }
    random = [runs.scaled(dict(zip(heads, alphas, strict=True))) for heads in drawn]
    scaled = " and ".join(f"{b}.{h} x {alpha:g}" for (b, h), alpha in factors.items())

    def mean(name: str, values: Tensor | np.ndarray, **group: str) -> Measurement:
        return mean_measurement(
            name, "fraction", np.asarray(values, dtype=np.float64), seed=seed, clusters=clusters,
            over="prompts" if clusters is None else "groups of prompts", group={"scaled": scaled, **group},
        )  # fmt: skip

    wanted = {name: getattr(s, metric).double().numpy() for name, s in said.items()}
    found = [mean(f"gain in the {metric} rate", wanted["tuned"] - wanted["none"])]
    for name, s in said.items():
        found += [
            mean("rate", getattr(s, which).double().numpy(), edit=name, outcome=which) for which in RATES
        ]
    if random:
        each = np.stack([getattr(s, metric).double().numpy() for s in random])
        control = mean("rate", each.mean(0), edit="random heads", outcome=metric)
        named_rates = {
            "+".join(f"{b}.{h}" for b, h in hs): float(e.mean()) for hs, e in zip(drawn, each, strict=True)
        }
        found.append(replace(control, details={**control.details, "each": named_rates}))
        found.append(mean("rate beyond twice the random heads'", wanted["tuned"] - 2 * each.mean(0)))
    return found
