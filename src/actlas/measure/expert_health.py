"""Three illnesses of mixtures of experts, measured on any of them: collapse, capture, starvation.

    expert_collapse(outputs)         experts that write zeros, or on very different scales
    expert_degradation(gates)        a shared expert that one task has taken for itself
    expert_underfitting(gates, ...)  tasks with few positives that do not use the experts made for them

Outputs are a dictionary expert -> `[n, d]`; gates are records with `reader`, `experts`, `weights [n, E]` and
`own` (`actlas.nn.MultiTaskExperts.record` gives both). `expert_health(model, corpus)` looks at a language
model's mixtures. Source: "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou" (2024),
which names the three; the numbers by which we measure them are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.expert_block import expert_blocks
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.routing import trace_routing


class Gate(Protocol):
    """What a gate's record must have."""

    @property
    def reader(self) -> str: ...

    @property
    def experts(self) -> tuple[str, ...]: ...

    @property
    def weights(self) -> Tensor: ...

    @property
    def own(self) -> tuple[bool, ...]: ...


def expert_collapse(outputs: Mapping[str, Tensor], zero: float = 1e-6) -> list[Measurement]:
    """Return the zero rate, dead experts, and how different the experts' scales are.

    Args:
        outputs: expert -> what it wrote, `[n, d]`.
        zero: an entry of at most this size counts as zero.

    Returns:
        `zero-rate` (mean share of zero entries), `dead-experts` (share with over 90% zeros),
        `scale-dispersion` (greatest over smallest standard deviation between experts; infinity if one writes
        a constant) and `centre-dispersion` (standard deviation between experts of their means, over their
        mean standard deviation).

    Raises:
        InputError: no expert, or an empty output.
    """
    if not outputs or any(not len(o) for o in outputs.values()):
        raise InputError("expert_collapse needs the outputs of at least one expert on at least one row")
    zeros = np.array([float((o.abs() <= zero).double().mean()) for o in outputs.values()])
    std = np.array([float(o.double().std(correction=0)) for o in outputs.values()])
    mean = np.array([float(o.double().mean()) for o in outputs.values()])
    rows, n = len(next(iter(outputs.values()))), len(outputs)
    by = dict(zip(outputs, zeros.tolist(), strict=True))
    scale = {k: round(v, 6) for k, v in zip(outputs, std.tolist(), strict=True)}
    spread = float(std.max() / std.min()) if std.min() > 0 else float("inf")
    made = "exact"
    return [
        Measurement(
            "zero-rate", float(zeros.mean()), "fraction", rows, better="lower", details={"by expert": by}
        ),
        Measurement("dead-experts", float((zeros > 0.9).mean()), "fraction", n, better="lower"),
        Measurement(
            "scale-dispersion", spread, "ratio", n, interval=made, better="lower", details={"std": scale}
        ),
        Measurement(
            "centre-dispersion", float(mean.std() / max(std.mean(), 1e-12)), "ratio", n, better="lower"
        ),
    ]


def expert_degradation(gates: Sequence[Gate]) -> list[Measurement]:
    """Return how far single readers have taken shared experts, and how concentrated gates are.

    Args:
        gates: records of the gates of one level.

    Returns:
        `expert-capture`: mean over shared experts of the largest reader's share of all weight on it, from
        1 / readers (even) to 1 (captured); `gate-entropy`: mean entropy of gates over its largest value.

    Raises:
        InputError: no gates.
    """
    if not gates:
        raise InputError("expert_degradation needs at least one gate")
    weight: dict[str, dict[str, float]] = {}
    entropy = []
    for g in gates:
        p = g.weights.double()
        if p.shape[1] > 1:
            entropy.append(float(-(p * p.clamp(min=1e-12).log()).sum(1).mean() / np.log(p.shape[1])))
        for name, own, value in zip(g.experts, g.own, p.mean(0).tolist(), strict=True):
            if not own:
                weight.setdefault(name, {})[g.reader] = value
    shared = {n: w for n, w in weight.items() if len(w) > 1}
    capture = [max(w.values()) / max(sum(w.values()), 1e-12) for w in shared.values()]
    rows = len(gates[0].weights)
    even = float(np.mean([1 / len(w) for w in shared.values()])) if shared else float("nan")
    return [
        Measurement(
            "expert-capture",
            float(np.mean(capture)) if capture else float("nan"),
            "fraction",
            rows,
            better="lower",
            note="" if shared else "no expert is shared by several readers",
            details={"even": even if shared else None, "by expert": shared},
        ),
        Measurement(
            "gate-entropy",
            float(np.mean(entropy)) if entropy else float("nan"),
            "fraction of maximum",
            rows,
            note="" if entropy else "every gate has one expert",
        ),
    ]


def expert_underfitting(
    gates: Sequence[Gate], density: Mapping[str, float] | None = None
) -> list[Measurement]:
    """Return the share of weight that each reader gives to its own experts.

    With gate weights w and a self gate that adds s to own experts, that is (w_own + s) / (1 + s).

    Args:
        gates: records of the gates of one level.
        density: share of positive labels by reader; readers below the median count as sparse.

    Returns:
        `own-expert-weight` per reader, over all, and over sparse readers if densities are given.

    Raises:
        InputError: no gate has an expert of its own.
    """
    found = {g.reader: _own(g) for g in gates if any(g.own)}
    if not found:
        raise InputError("expert_underfitting needs gates with experts of their own; these share all of them")
    rows = len(gates[0].weights)

    def one(value: float, **group: str) -> Measurement:
        return Measurement("own-expert-weight", value, "fraction", rows, better="higher", group=group)

    out = [one(v, reader=r) for r, v in found.items()]
    out.append(one(float(np.mean(list(found.values()))), reader="all"))
    if density:
        known = {r: density[r] for r in found if r in density}
        if known:
            middle = float(np.median(list(known.values())))
            sparse = [found[r] for r, v in known.items() if v < middle]
            if sparse:
                out.append(one(float(np.mean(sparse)), reader="sparse"))
    return out


@method(
    "expert-health",
    room="measure",
    returns="Measurement",
    data="corpus",
    summary="are a mixture's experts alive, on one scale, and used? zero rate, dispersion and gate entropy",
    example="actlas fit expert-health my-mixtral/ prose",
    papers=("home",),
)
def expert_health(model: Model, data: Any, *, tokens: int = 2048, context: int = 256) -> list[Measurement]:
    """Return `expert_collapse` and the router's entropy for each block of a Mixtral-like model.

    An expert's output is taken at the tokens that chose it; experts that no token chose are counted in
    `unused-experts`.

    Args:
        model, data, tokens, context: as of `actlas.measure.routing.trace_routing`.

    Raises:
        ModelError: the model has no such experts.
    """
    blocks = expert_blocks(model)
    trace = trace_routing(model, data, tokens=tokens, context=context, inputs=True)
    out: list[Measurement] = []
    for block in blocks:
        layer, group = trace.layers.index(block.block), {"layer": str(block.block)}
        active, written = trace.active[layer], {}
        with torch.no_grad():
            for e in range(block.n_experts):
                rows = torch.where(active[:, e])[0]
                if len(rows):
                    written[str(e)] = block.run(trace.inputs[layer][rows].to(block.down), e).float().cpu()
        out += [m.with_group(**group) for m in expert_collapse(written)]
        unused = 1 - len(written) / block.n_experts
        out.append(
            Measurement("unused-experts", unused, "fraction", block.n_experts, group=group, better="lower")
        )
        p = torch.softmax(trace.logits[layer].double(), 1)
        entropy = float(-(p * p.clamp(min=1e-12).log()).sum(1).mean() / np.log(max(2, block.n_experts)))
        out.append(Measurement("gate-entropy", entropy, "fraction of maximum", len(trace), group=group))
    return out


def _own(gate: Gate) -> float:
    own = gate.weights.double()[:, torch.tensor(list(gate.own))].sum(1)
    added = getattr(gate, "added", None)
    if added is not None:
        own = (own + added.double()) / (1 + added.double())
    return float(own.mean())
