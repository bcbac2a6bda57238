"""Place the experts of a mixture on devices so that no device waits and few tokens travel (MoETuner).

    trace = trace_routing(model, corpus)
    placement = place_experts(trace, devices=4)
    simulate(placement, trace)                           # tail load, tokens that travel, a latency model

With P[e, l] the tokens that expert e of layer l runs and R[e1, e2, l] those that run e1 in l and e2 in l + 1:

1. Per layer, clusters of equal load, one per device (an integer program): minimise sum_c |T_c - mean T| with
   T_c = sum_e P[e, l] x[c, e], each expert in exactly one cluster.
2. Between layers, clusters go to devices (a permutation per layer): minimise
   sum_l max over device pairs g1 != g2 of C[g1, g2, l] / B[g1, g2]
   where C is the number of routed pairs that go from g1 to g2 and B a bandwidth; within a device is free.

Step 2 is a chain of layers, so dynamic programming over the G! permutations of each layer is exact
(`arrange="dp"`, G up to 6). `"milp"` is the integer program of the paper with y1 y2 linearised by z <= y1,
z <= y2, z >= y1 + y2 - 1; `"local"` swaps pairs of clusters until nothing helps. The printed formula sums
inside the maximum; the purpose it states is the tail over pairs, which is what is here.

Sources: "MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token Routing"
(2025), equations of section 4. Clusters may have equal sizes (the memory constraint of the paper, per layer
instead of in total) or any; integer programs are solved by HiGHS through `scipy.optimize.milp`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actlas.core.artifact import atomic_write
from actlas.core.errors import InputError
from actlas.measure.routing import RoutingTrace
from actlas.sparsity.placement_solvers import (
    Array,
    Labels,
    arrange_dp,
    arrange_local,
    arrange_milp,
    balance_lpt,
    balance_milp,
    chain_cost,
)

Balance = Literal["milp", "lpt", "none"]
Arrange = Literal["auto", "dp", "milp", "local", "none"]
_DP_DEVICES = 5  # 120^2 pairs of permutations a layer; 6 takes half a million


@dataclass(frozen=True, eq=False)
class Placement:
    """Which device each expert lives on.

    Attributes:
        device: int64 `[L, E]`.
        devices: G.
        layers: block numbers.
        how: what made it.
    """

    device: Labels
    devices: int
    layers: tuple[int, ...] = ()
    how: str = ""

    def __post_init__(self) -> None:
        if self.device.ndim != 2 or self.device.min() < 0 or self.device.max() >= self.devices:
            raise InputError(
                f"a placement is a table [layers, experts] of device numbers below {self.devices}, "
                f"not {list(self.device.shape)} with {self.device.min()} to {self.device.max()}"
            )

    def save(self, path: str | Path) -> None:
        """Write the placement as JSON (what a serving engine's start-up reads: layer, expert -> device)."""
        record = {
            "devices": self.devices,
            "layers": list(self.layers),
            "how": self.how,
            "device": self.device.tolist(),
        }
        atomic_write(Path(path), json.dumps(record) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            record = json.loads(Path(path).read_text("utf-8"))
            table = np.asarray(record["device"], np.int64)
            return cls(table, int(record["devices"]), tuple(record["layers"]), str(record["how"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} does not hold a placement: {error}") from None


@dataclass(frozen=True)
class Simulation:
    """What a placement does with some tokens; times are in units of one token through one expert.

    Attributes:
        tail_load: sum over layers of the load of the busiest device.
        mean_load: the same if all devices were equally busy: the bound.
        crossing: routed pairs that change device between layers, of `pairs`.
        tail_traffic: sum over layers of the busiest device pair's traffic / bandwidth.
        latency: tail_load + exchange * tail_traffic.
    """

    tail_load: float
    mean_load: float
    crossing: float
    pairs: float
    tail_traffic: float
    latency: float


def place_experts(
    trace: RoutingTrace,
    devices: int = 4,
    *,
    bandwidth: NDArray[np.float64] | None = None,
    balance: Balance = "milp",
    arrange: Arrange = "auto",
    equal_sizes: bool = True,
    gap: float = 0.025,
    time_limit: float = 20.0,
    seed: int = 0,
) -> Placement:
    """Return a placement that balances load first, then keeps routes short.

    Args:
        trace: profiled routing.
        devices: G.
        bandwidth: relative speed from device to device `[G, G]`, 1 by default; the diagonal is ignored.
        balance: `"milp"`; `"lpt"`: the heaviest expert goes to the lightest device, then swaps; `"none"`:
            contiguous blocks, so that only traffic is optimised.
        arrange: step 2 (module docstring); `"auto"` is `"dp"` up to 5 devices and `"local"` beyond; `"none"`
            leaves clusters where balance put them, so that only load is optimised.
        equal_sizes: each device holds E / G experts of each layer.
        gap: relative optimality gap at which HiGHS may stop (the paper's 0.025).
        time_limit: seconds for each integer program.
        seed: of local search.

    Raises:
        InputError: devices that do not divide the experts, a bandwidth of another shape or not positive, or
            an unknown option.
    """
    experts = trace.n_experts
    if not 1 <= devices <= experts or (equal_sizes and experts % devices):
        raise InputError(
            f"devices is {devices}; it must divide the {experts} experts, or be at most that with "
            "equal_sizes=False"
        )
    for name, value, known in (("balance", balance, Balance), ("arrange", arrange, Arrange)):
        if value not in get_args(known):
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(get_args(known))}")
    cost = _pair_cost(bandwidth, devices)
    clusters = []
    for load in trace.loads():
        if balance == "milp":
            clusters.append(balance_milp(load, devices, equal_sizes, gap, time_limit))
        elif balance == "lpt":
            clusters.append(balance_lpt(load, devices, equal_sizes))
        else:
            clusters.append(contiguous(1, experts, devices).device[0])
    labels = np.stack(clusters)
    flows = cluster_traffic(labels, trace.transitions(), devices)
    if arrange == "auto":
        arrange = "dp" if devices <= _DP_DEVICES else "local"
    if arrange == "dp":
        order = arrange_dp(flows, cost)
    elif arrange == "milp":
        order = arrange_milp(flows, cost, gap, time_limit)
    elif arrange == "local":
        order = arrange_local(flows, cost, seed)
    else:
        order = np.tile(np.arange(devices), (len(labels), 1))
    device = np.take_along_axis(order, labels, axis=1)
    return Placement(device, devices, trace.layers, f"balance {balance}, arrange {arrange}")


def simulate(
    placement: Placement,
    trace: RoutingTrace,
    *,
    bandwidth: NDArray[np.float64] | None = None,
    exchange: float = 1.0,
) -> Simulation:
    """Return what the placement does with the tokens of a trace (not only those it was made on).

    Args:
        placement, trace: of the same layers and experts.
        bandwidth: as of `place_experts`.
        exchange: time to send one token over a link of bandwidth 1, in units of one token through an expert.

    Raises:
        InputError: sizes that do not fit.
    """
    return simulate_counts(
        placement, trace.loads(), trace.transitions(), bandwidth=bandwidth, exchange=exchange
    )


def simulate_counts(
    placement: Placement,
    loads: Array,
    transitions: Array,
    *,
    bandwidth: NDArray[np.float64] | None = None,
    exchange: float = 1.0,
) -> Simulation:
    """As `simulate`, from P `[L, E]` and R `[L - 1, E, E]` (sums over documents, say)."""
    if loads.shape != placement.device.shape:
        raise InputError(
            f"the placement is for {list(placement.device.shape)} layers and experts; "
            f"the trace has {list(loads.shape)}"
        )
    g = placement.devices
    cost = _pair_cost(bandwidth, g)
    per_device = np.stack([np.bincount(d, w, g) for d, w in zip(placement.device, loads, strict=True)])
    flows = cluster_traffic(placement.device, transitions, g)
    identity = np.tile(np.arange(g), (len(loads), 1))
    traffic = chain_cost(flows, cost, identity)
    tail = float(per_device.max(1).sum())
    pairs = float(flows.sum())
    stayed = float(np.trace(flows, axis1=1, axis2=2).sum())
    return Simulation(
        tail, float(per_device.mean(1).sum()), pairs - stayed, pairs, traffic, tail + exchange * traffic
    )


def contiguous(layers: int, experts: int, devices: int) -> Placement:
    """Return the usual placement: consecutive experts share a device (Megatron-LM)."""
    row = np.arange(experts) * devices // experts
    return Placement(np.tile(row, (layers, 1)), devices, tuple(range(layers)), "contiguous")


def random_placement(layers: int, experts: int, devices: int, seed: int = 0) -> Placement:
    """Return a placement drawn at random, with equal sizes: a control."""
    rng = np.random.default_rng(seed)
    row = np.arange(experts) * devices // experts
    return Placement(
        np.stack([rng.permutation(row) for _ in range(layers)]), devices, tuple(range(layers)), "random"
    )


def two_nodes(devices: int, ratio: float = 10.0) -> Array:
    """Return bandwidths of two nodes of devices / 2 each: `ratio` within a node, 1 between nodes."""
    node = np.arange(devices) * 2 // devices
    return np.where(node[:, None] == node[None], ratio, 1.0)


def cluster_traffic(labels: Labels, transitions: Array, devices: int) -> Array:
    """Return C `[L - 1, G, G]`: routed pairs from cluster to cluster, between consecutive layers."""
    hot = np.eye(devices)[labels]  # [L, E, G]
    found: Array = np.einsum("lef,leg,lfh->lgh", transitions, hot[:-1], hot[1:], optimize=True)
    return found


def _pair_cost(bandwidth: Any, devices: int) -> Array:
    """Return the time of one unit of traffic between two devices; 0 within one."""
    b = np.ones((devices, devices)) if bandwidth is None else np.asarray(bandwidth, float)
    off = ~np.eye(devices, dtype=bool)
    if b.shape != (devices, devices) or not (b[off] > 0).all():
        raise InputError(f"bandwidth must be a positive [{devices}, {devices}] table, not {list(b.shape)}")
    return np.where(off, 1.0 / np.where(off, b, 1.0), 0.0)


def best_of_random(
    trace: RoutingTrace, devices: int, draws: int, *, seed: int = 0, **options: Any
) -> list[Simulation]:
    """Return simulations of so many random placements, for a control."""
    layers, experts = trace.loads().shape
    seeds = itertools.islice(itertools.count(1000 * seed), draws)
    return [simulate(random_placement(layers, experts, devices, s), trace, **options) for s in seeds]
