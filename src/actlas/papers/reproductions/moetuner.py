"""moetuner: does placing experts by load and routes, from a profile, beat the usual placement on other text?

A byte-level Mixtral learns prose and Python source. Half of the documents kept apart are profiled, the other
half are routed through each placement: tail load, tokens that travel, the busiest link, a simple latency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from actlas.core.measurement import Measurement
from actlas.measure.routing import RoutingTrace, gini, trace_routing
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions import byte_mixtral as tiny
from actlas.papers.reproductions.byte_models import CONTEXT
from actlas.sparsity.placement import (
    Placement,
    Simulation,
    contiguous,
    place_experts,
    random_placement,
    simulate_counts,
    two_nodes,
)
from actlas.sparsity.placement_solvers import Array

DEVICES, DRAWS, RESAMPLES = 4, 20, 400
OURS, LOAD, TRAFFIC, USUAL = "MoETuner", "load only", "traffic only", "contiguous"
BEST = "best of 20 random"
SLOW = {"all links equal": None, "two nodes, 10 to 1": two_nodes(DEVICES, 10.0)}
Metric = Callable[[Simulation], float]
METRICS: dict[str, Metric] = {
    "tail load": lambda s: s.tail_load,
    "tail traffic": lambda s: s.tail_traffic,
    "travelling pairs": lambda s: s.crossing,
    "latency": lambda s: s.latency,
}


def judge(m: Measured) -> list[Check]:
    """Holds if, on documents that were not profiled and with all links equal, the latency of MoETuner's
    placement is below that of the best of 20 random placements, the best being chosen on those same documents
    (central), and its tail load is below the contiguous placement's (central). Beside it, against the
    contiguous placement: less tail traffic with equal links and with two nodes; arranging clusters lowers
        tail traffic against balancing load
    only; a placement profiled on prose only still has less tail load on source code.
    """
    even = "all links equal"
    return [
        Check.below(
            "latency is below the best random placement's",
            m.get("ratio", metric="latency", over=BEST, links=even),
            1.0,
            central=True,
        ),
        Check.below(
            "tail load is below the contiguous placement's",
            m.get("ratio", metric="tail load", over=USUAL, links=even),
            1.0,
            central=True,
        ),
        *(
            Check.below(
                f"tail traffic is below the contiguous placement's ({links})",
                m.get("ratio", metric="tail traffic", over=USUAL, links=links),
                1.0,
            )
            for links in SLOW
        ),
        Check.below(
            "arranging lowers tail traffic",
            m.get("ratio", metric="tail traffic", over=LOAD, links="two nodes, 10 to 1"),
            1.0,
        ),
        Check.below("tail load on another kind of text", m["tail load ratio after drift"], 1.0),
    ]


@reproduction(
    "moetuner",
    claim="Placing experts by load and by routes between layers, from a profile, lowers the tail load and "
    "the latency on other text against contiguous and random placements.",
    judge=judge,
    quick={"steps": 180, "layers": 6, "experts": 8, "tokens": 16384},
    full={"steps": 1500, "layers": 6, "experts": 16, "tokens": 65536},
)
def moetuner(*, seed: int, steps: int, layers: int, experts: int, tokens: int) -> Findings:
    """Run it.

    Args:
        seed: of texts, weights and random placements.
        steps: training steps of 2,048 bytes.
        layers, experts: of the model.
        tokens: bytes that are routed, half of them for the profile.
    """
    texts = tiny.domains(seed, names=("prose", "code"))
    model = tiny.byte_mixtral(experts, seed, layers=layers, hidden=64, balance=0.002)
    model = tiny.without_balance(tiny.train(model, tiny.mixed(texts), steps, seed))
    traces = {
        name: trace_routing(model, [*fit, *judged], tokens=tokens // 2, context=CONTEXT, per_document=256)
        for name, (_, fit, judged) in texts.items()
    }
    both = _joined(list(traces.values()))
    fit, test = both.split(0.5, seed)
    loads, transitions = by_document(test)
    out = [
        Measurement("skew of loads", gini(p), "Gini coefficient", len(both), group={"layer": str(n)})
        for n, p in zip(both.layers, both.loads(), strict=True)
    ]
    rows = []
    for links, bandwidth in SLOW.items():
        made = {
            OURS: place_experts(fit, DEVICES, bandwidth=bandwidth),
            LOAD: place_experts(fit, DEVICES, bandwidth=bandwidth, arrange="none"),
            TRAFFIC: place_experts(fit, DEVICES, bandwidth=bandwidth, balance="none"),
            USUAL: contiguous(layers, experts, DEVICES),
        }
        random = [random_placement(layers, experts, DEVICES, 1000 * seed + i) for i in range(DRAWS)]
        total = (loads.sum(0), transitions.sum(0))
        for metric, value in METRICS.items():
            found = [value(simulate_counts(p, *total, bandwidth=bandwidth)) for p in random]
            made[BEST] = random[int(np.argmin(found))]
            for arm, placement in made.items():
                number = value(simulate_counts(placement, *total, bandwidth=bandwidth))
                group = {"metric": metric, "arm": arm, "links": links}
                out.append(Measurement("held-out", number, "tokens", len(test), group=group))
                rows.append({"arm": arm, "metric": metric, "links": links, "relative": number})
                if arm != OURS:
                    args = (made[OURS], placement, loads, transitions, bandwidth, value, seed)
                    out.append(_ratio("ratio", *args, {"metric": metric, "over": arm, "links": links}))
            mean = float(np.mean(found))
            group = {"metric": metric, "arm": "mean of 20 random", "links": links}
            out.append(Measurement("held-out", mean, "tokens", len(test), group=group))
    drifted = place_experts(traces["prose"], DEVICES)
    other = by_document(traces["code"])
    usual = contiguous(layers, experts, DEVICES)
    out.append(
        _ratio("tail load ratio after drift", drifted, usual, *other, None, METRICS["tail load"], seed, {})
    )
    return _findings(out, rows)


def by_document(trace: RoutingTrace) -> tuple[Array, Array]:
    """Return P `[documents, L, E]` and R `[documents, L - 1, E, E]`."""
    parts = [trace.rows(trace.documents == d) for d in np.unique(trace.documents)]
    return np.stack([p.loads() for p in parts]), np.stack([p.transitions() for p in parts])


def _ratio(
    name: str,
    ours: Placement,
    other: Placement,
    loads: Array,
    transitions: Array,
    bandwidth: Any,
    value: Metric,
    seed: int,
    group: dict[str, str],
) -> Measurement:
    """Return ours over another on a metric, with a bootstrap over documents."""

    def ratio(weights: Array) -> float:
        sums = (np.tensordot(weights, loads, 1), np.tensordot(weights, transitions, 1))
        a, b = (value(simulate_counts(p, *sums, bandwidth=bandwidth)) for p in (ours, other))
        return a / b

    n = len(loads)
    rng = np.random.default_rng(seed)
    drawn = [ratio(np.bincount(rng.integers(0, n, n), minlength=n).astype(float)) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Measurement(
        name,
        ratio(np.ones(n)),
        "ratio",
        n,
        float(low),
        float(high),
        "bootstrap over documents",
        seed,
        group=group,
        better="lower",
    )


def _joined(traces: list[RoutingTrace]) -> RoutingTrace:
    """Return traces of different documents as one."""
    first = traces[0]

    def cat(field: str) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.cat(list(parts)) for parts in zip(*(getattr(t, field) for t in traces), strict=True)
        )

    def numbered(field: str) -> Any:
        out, start = [], 0
        for t in traces:
            values = getattr(t, field)
            out.append(values + start)
            start += int(values.max()) + 1
        return np.concatenate(out)

    return RoutingTrace(
        first.layers, cat("gates"), cat("active"), cat("logits"), numbered("windows"), numbered("documents")
    )


def _findings(out: list[Measurement], rows: list[dict[str, Any]]) -> Findings:
    usual = {(r["metric"], r["links"]): r["relative"] for r in rows if r["arm"] == USUAL}
    for r in rows:
        r["relative"] = r["relative"] / usual[r["metric"], r["links"]]
    ratio = {(m.group["metric"], m.group["over"], m.group["links"]): m for m in out if m.name == "ratio"}
    even = "all links equal"
    headline = (
        f"against contiguous: tail load x {ratio['tail load', USUAL, even].value:.2f}, tail traffic x "
        f"{ratio['tail traffic', USUAL, even].value:.2f}, latency x "
        f"{ratio['latency', USUAL, even].value:.2f}; latency against the best of {DRAWS} random x "
        f"{ratio['latency', BEST, even].value:.3f}"
    )
    plot = Plot(
        "On text that was not profiled, relative to the contiguous placement (all links equal)",
        [r for r in rows if r["links"] == even],
        x="metric",
        y="relative",
        color="arm",
        mark="point",
    )
    return Findings(out, headline, NOTE, [plot])


NOTE = (
    "Published: Mixtral-8x7B, 9.3% end to end on one node of 8 GPUs and 17.5% on two of 16, against "
    "contiguous placement; tail of token processing and of all-to-all -36% on one node. Ours: a byte-level "
    "Mixtral, 4 devices, a simulator instead of GPUs. Tail load is the sum over layers of the busiest "
    "device's tokens; tail traffic the sum of the busiest link's routed pairs over its bandwidth; latency is "
    "tail load + tail traffic, in units of one token through an expert. Clusters have equal sizes, so the "
    "arrangement is a chain and solved exactly by dynamic programming instead of the paper's second integer "
    "program (tests hold the two and brute force together). The best random placement is chosen on the text "
    "it is judged on, separately for each metric: a control that is better than anything one could deploy. "
    "Intervals are over documents of one model."
)
