"""Expert placement: the solvers against brute force, and the simulator against counting token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from actlas.core.errors import InputError
from actlas.measure.routing import RoutingTrace, trace_routing
from actlas.sparsity.placement import (
    Placement,
    best_of_random,
    contiguous,
    place_experts,
    random_placement,
    simulate,
    two_nodes,
)
from actlas.sparsity.placement_solvers import (
    arrange_dp,
    arrange_local,
    arrange_milp,
    balance_lpt,
    balance_milp,
    chain_cost,
)
from actlas.sparsity.placing import fit_placement
from tests.core.tiny import TEXTS, tiny


def made(n: int = 300, layers: int = 3, experts: int = 8, seed: int = 0) -> RoutingTrace:
    """A trace with skewed loads in which a token tends to follow one path."""
    rng = np.random.default_rng(seed)
    theme = rng.integers(0, 4, n)
    active = []
    for layer in range(layers):
        taste = np.random.default_rng(100 + layer).normal(size=(4, experts)) * 2
        score = torch.tensor(taste[theme] + rng.gumbel(size=(n, experts)))
        active.append(torch.zeros(n, experts, dtype=torch.bool).scatter(1, score.topk(2, -1).indices, True))
    gates = tuple(a.float() / 2 for a in active)
    ids = np.arange(n) // 30
    return RoutingTrace(tuple(range(layers)), gates, tuple(active), gates, ids, ids)


def uneven(load: np.ndarray, labels: np.ndarray, g: int) -> float:
    total = np.bincount(labels, load, g)
    return float(np.abs(total - total.mean()).sum())


@pytest.mark.parametrize("equal", [True, False])
def test_balance_is_the_best_of_all_assignments(equal: bool) -> None:
    rng = np.random.default_rng(3)
    for g in (2, 3):
        load = rng.gamma(1.0, 100.0, 6).round()
        best = np.inf
        for labels in itertools.product(range(g), repeat=6):
            sizes = np.bincount(labels, minlength=g)
            if (sizes == 6 // g).all() if equal else (sizes > 0).all():
                best = min(best, uneven(load, np.array(labels), g))
        found = balance_milp(load, g, equal, 0.0, 20.0)
        assert uneven(load, found, g) == pytest.approx(best, abs=1e-3)
        quick = balance_lpt(load, g, equal)
        sizes = np.bincount(quick, minlength=g)
        assert (sizes == 6 // g).all() if equal else (sizes > 0).all()
        assert best - 1e-6 <= uneven(load, quick, g) <= uneven(load, np.arange(6) * g // 6, g) + 1e-6


def test_lpt_leaves_no_device_empty() -> None:
    labels = balance_lpt(np.array([0.0, 0, 0, 9]), 4, False)
    assert sorted(labels) == [0, 1, 2, 3]


@pytest.mark.parametrize("links", ["even", "nodes"])
def test_arrangement_is_the_best_of_all_orders(links: str) -> None:
    rng = np.random.default_rng(4)
    g = 3
    flows = rng.gamma(0.5, 10.0, (2, g, g))
    b = np.ones((g, g)) if links == "even" else np.array([[1, 10, 1], [10, 1, 1], [1, 1, 1.0]])
    cost = np.where(np.eye(g, dtype=bool), 0, 1 / b)
    orders = list(itertools.permutations(range(g)))
    best = min(chain_cost(flows, cost, np.array(o)) for o in itertools.product(orders, repeat=3))
    assert chain_cost(flows, cost, arrange_dp(flows, cost)) == pytest.approx(best)
    assert chain_cost(flows, cost, arrange_milp(flows, cost, 0.0, 30.0)) == pytest.approx(best, rel=1e-5)
    local = chain_cost(flows, cost, arrange_local(flows, cost))
    start = chain_cost(flows, cost, np.tile(np.arange(g), (3, 1)))
    assert best - 1e-9 <= local <= start + 1e-9


def test_simulation_counts_token_by_token() -> None:
    trace = made(60)
    placement = random_placement(3, 8, 4, seed=5)
    links = two_nodes(4, 10.0)
    load, crossing, traffic = np.zeros((3, 4)), 0, np.zeros((2, 4, 4))
    for t in range(60):
        for layer in range(3):
            here = torch.where(trace.active[layer][t])[0].tolist()
            for e in here:
                load[layer, placement.device[layer, e]] += 1
                if layer < 2:
                    for f in torch.where(trace.active[layer + 1][t])[0].tolist():
                        a, b = placement.device[layer, e], placement.device[layer + 1, f]
                        crossing += a != b
                        traffic[layer, a, b] += 0 if a == b else 1 / links[a, b]
    got = simulate(placement, trace, bandwidth=links, exchange=2.0)
    assert got.tail_load == load.max(1).sum() and got.crossing == crossing
    assert got.tail_traffic == pytest.approx(traffic.max((1, 2)).sum())
    assert got.latency == pytest.approx(got.tail_load + 2 * got.tail_traffic)
    assert got.mean_load == pytest.approx(3 * 120 / 4) and got.pairs == 60 * 2 * 4


def test_placement_beats_contiguous_and_random_on_other_tokens() -> None:
    fit, test = made(1200).split(0.5)
    ours = simulate(place_experts(fit, 4), test)
    usual = simulate(contiguous(3, 8, 4), test)
    best = best_of_random(test, 4, 20)
    assert ours.tail_load < usual.tail_load and ours.tail_load <= min(s.tail_load for s in best)
    free = simulate(place_experts(fit, 4, balance="none"), test)
    loose = simulate(place_experts(fit, 4, balance="none", arrange="none"), test)
    assert free.tail_traffic < loose.tail_traffic and free.tail_load == loose.tail_load == usual.tail_load


def test_saved_and_loaded_and_the_method(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny("mixtral")
    path = tmp_path / "p.json"
    found = fit_placement(model, TEXTS, devices=2, node_ratio=4.0, path=str(path), draws=3)
    placement = Placement.load(path)
    assert {m.name for m in found} == {"tail-load", "crossing", "tail-traffic"}
    assert found[0].details["placement"] == placement.device.tolist() and found[0].baseline is not None
    assert simulate(placement, trace_routing(model, TEXTS)).tail_load > 0
    path.write_text("{}")
    with pytest.raises(InputError, match="does not hold a placement"):
        Placement.load(path)


def test_bad_input() -> None:
    trace = made(60)
    with pytest.raises(InputError, match="devices is 3"):
        place_experts(trace, 3)
    with pytest.raises(InputError, match="balance is 'gurobi'"):
        place_experts(trace, 4, balance="gurobi")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bandwidth must be"):
        place_experts(trace, 4, bandwidth=np.ones((3, 3)))
    with pytest.raises(InputError, match="the placement is for"):
        simulate(contiguous(2, 8, 4), trace)
    with pytest.raises(InputError, match="table"):
        Placement(np.full((1, 2), 5), 4)
    with pytest.raises(InputError, match="product variables"):
        arrange_milp(np.ones((3, 20, 20)), np.ones((20, 20)), 0.0, 1.0)
