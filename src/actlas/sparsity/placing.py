"""Expert placement as a method: profile on half of a text, place, and say what it is worth on the other
half."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.routing import trace_routing
from actlas.sparsity.placement import (
    Arrange,
    Balance,
    Simulation,
    best_of_random,
    contiguous,
    place_experts,
    simulate,
    two_nodes,
)


@method(
    "place-experts",
    room="sparsity",
    returns="Measurement",
    data="corpus",
    summary="MoETuner: put a mixture's experts on devices so that load is even and routes are short",
    example="actlas fit place-experts my-mixtral/ prose --devices 4 --path placement.json",
    papers=("moetuner",),
)
def fit_placement(
    model: Model,
    data: Any,
    *,
    devices: int = 4,
    node_ratio: float = 1.0,
    balance: Balance = "milp",
    arrange: Arrange = "auto",
    equal_sizes: bool = True,
    path: str = "",
    tokens: int = 8192,
    context: int = 256,
    draws: int = 20,
    seed: int = 0,
) -> list[Measurement]:
    """Place the experts; return tail load, travelling tokens and tail traffic on text that was kept apart.

    Args:
        model: a model with mixtures of experts.
        data: a corpus; half of its documents are profiled, the other half judge.
        devices: how many there are.
        node_ratio: above 1: two nodes, within which links are so many times faster.
        balance, arrange, equal_sizes: as of `place_experts`.
        path: where the placement is written (JSON), if anywhere.
        tokens, context: how much of the corpus is read.
        draws: random placements to compare with.
        seed: of the split and of random placements.

    Returns:
        Each number beside that of the contiguous placement (its baseline); `details` hold the best and the
        mean of the random placements, and the placement itself.

    Raises:
        InputError, ModelError: see `place_experts` and `trace_routing`.
    """
    trace = trace_routing(model, data, tokens=tokens, context=context)
    fit, test = trace.split(0.5, seed)
    links = two_nodes(devices, node_ratio) if node_ratio != 1.0 else None
    placement = place_experts(
        fit, devices, bandwidth=links, balance=balance, arrange=arrange, equal_sizes=equal_sizes, seed=seed
    )
    if path:
        placement.save(path)
    ours = simulate(placement, test, bandwidth=links)
    usual = simulate(contiguous(len(test.layers), test.n_experts, devices), test, bandwidth=links)
    random = best_of_random(test, devices, draws, seed=seed, bandwidth=links) if draws else []
    units = {
        "tail_load": "routed tokens",
        "crossing": "routed pairs",
        "tail_traffic": "routed pairs / bandwidth",
    }
    out = []
    for name in (f.name for f in fields(Simulation)):
        if name not in units:
            continue
        label = name.replace("_", "-")
        drawn = [getattr(r, name) for r in random]
        base = Measurement(label, getattr(usual, name), units[name], len(test), note="contiguous placement")
        details: dict[str, Any] = {"placement": placement.device.tolist(), "how": placement.how}
        if drawn:
            details |= {"random, best": min(drawn), "random, mean": float(np.mean(drawn))}
        out.append(
            Measurement(
                label,
                getattr(ours, name),
                units[name],
                len(test),
                better="lower",
                baseline=base,
                details=details,
                note="on documents that were not profiled",
            )
        )
    return out
