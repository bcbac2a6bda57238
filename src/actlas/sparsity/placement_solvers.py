"""The integer programs of expert placement, and what solves their special cases exactly or fast.

`balance_*` divide one layer's experts among clusters of equal load; `arrange_*` give clusters to devices.
Equations: module docstring of `placement`.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from actlas.core.errors import FailureError, InputError

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def balance_milp(load: Array, devices: int, equal_sizes: bool, gap: float, time_limit: float) -> Labels:
    """Return the cluster of each expert: the integer program, with t_c >= |T_c - mean| for the absolute
    value.

    Clusters are interchangeable, so expert e may only go to the first e + 1: that removes equal solutions.

    Raises:
        FailureError: HiGHS found no solution in the time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    e, g = len(load), devices
    scale = max(float(load.sum()), 1.0)
    w, mean = load / scale, float(load.sum()) / scale / g
    n = g * e  # x[c, e], then t[c]
    constraints = []
    once = np.zeros((e, n + g))
    for j in range(e):
        once[j, j:n:e] = 1
    constraints.append(LinearConstraint(once, 1, 1))
    size = np.zeros((g, n + g))
    over, under = np.zeros((g, n + g)), np.zeros((g, n + g))
    for c in range(g):
        size[c, c * e : (c + 1) * e] = 1
        over[c, c * e : (c + 1) * e], over[c, n + c] = w, -1
        under[c, c * e : (c + 1) * e], under[c, n + c] = w, 1
    least, most = (e // g, e // g) if equal_sizes else (1, e)
    constraints += [
        LinearConstraint(size, least, most),
        LinearConstraint(over, -np.inf, mean),
        LinearConstraint(under, mean, np.inf),
    ]
    upper = np.ones(n + g)
    for c in range(g):
        upper[c * e : c * e + c] = 0.0  # the first experts go to the first clusters
    solved = milp(
        np.r_[np.zeros(n), np.ones(g)],
        integrality=np.r_[np.ones(n), np.zeros(g)],
        bounds=Bounds(np.zeros(n + g), upper),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": time_limit},
    )
    if solved.x is None:
        raise FailureError(f"HiGHS found no balanced placement in {time_limit:g} s; take balance='lpt'")
    return np.asarray(solved.x[:n].reshape(g, e).argmax(0), np.int64)


def balance_lpt(load: Array, devices: int, equal_sizes: bool) -> Labels:
    """Return clusters by longest processing time first, improved by swaps of two experts."""
    e, order = len(load), np.argsort(-load, kind="stable")
    room = np.full(devices, e // devices if equal_sizes else e)
    total, labels = np.zeros(devices), np.zeros(e, np.int64)
    held = np.zeros(devices, int)
    for placed, j in enumerate(order):
        free = held < room
        if e - placed == int((held == 0).sum()):  # the last experts fill devices that have none
            free = held == 0
        c = int(np.argmin(np.where(free, total, np.inf)))
        labels[j] = c
        total[c] += load[j]
        held[c] += 1
    mean = total.mean()

    def uneven(t: Array) -> float:
        return float(np.abs(t - mean).sum())

    better = True
    while better:
        better = False
        for i, j in itertools.combinations(range(e), 2):
            a, b = labels[i], labels[j]
            if a == b:
                continue
            new = total.copy()
            new[a] += load[j] - load[i]
            new[b] += load[i] - load[j]
            if uneven(new) < uneven(total) - 1e-9:
                total, better = new, True
                labels[i], labels[j] = b, a
    return labels


def arrange_dp(flows: Array, cost: Array) -> Labels:
    """Return the best device of each cluster, `[L, G]`, exactly: dynamic programming over permutations.

    Args:
        flows: C `[L - 1, G, G]` between clusters.
        cost: time per unit between devices `[G, G]`.

    Raises:
        InputError: more than 6 devices.
    """
    g = cost.shape[0]
    if g > 6:
        raise InputError(f"arrange='dp' tries all orders of {g} devices; take 'local' beyond 6")
    orders = np.array(list(itertools.permutations(range(g))))
    best, back = np.zeros(len(orders)), []
    for flow in flows:
        step = np.empty((len(orders), len(orders)))
        for i, order in enumerate(orders):
            moved = flow[:, :, None]  # cost[order[c1], new[c2]] for every new order at once
            step[i] = (moved * cost[order][:, orders.T]).max((0, 1))
        total = best[:, None] + step
        back.append(total.argmin(0))
        best = total.min(0)
    at = int(best.argmin())
    chosen = [at]
    for pointers in reversed(back):
        at = int(pointers[at])
        chosen.append(at)
    return np.asarray(orders[chosen[::-1]], np.int64)


def arrange_milp(flows: Array, cost: Array, gap: float, time_limit: float) -> Labels:
    """Return the devices of the clusters by the paper's integer program, its products linearised.

    Raises:
        InputError: more than 200,000 product variables. FailureError: no solution in the time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    steps, g = len(flows), cost.shape[0]
    ny, nz = (steps + 1) * g * g, steps * g**4
    if nz > 200_000:
        raise InputError(f"arrange='milp' would need {nz} product variables; take 'dp' or 'local'")
    scale = max(float(flows.max(initial=0.0)) * float(cost.max()), 1e-12)

    def y(layer: int, c: int, d: int) -> int:
        return (layer * g + c) * g + d

    def z(layer: int, c1: int, c2: int, d1: int, d2: int) -> int:
        return ny + (((layer * g + c1) * g + c2) * g + d1) * g + d2

    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    low: list[float] = []
    high: list[float] = []

    def add(terms: list[tuple[int, float]], least: float, most: float) -> None:
        for column, value in terms:
            rows.append(len(low))
            columns.append(column)
            values.append(value)
        low.append(least)
        high.append(most)

    around = range(g)
    for layer in range(steps + 1):
        for a in around:
            add([(y(layer, a, d), 1.0) for d in around], 1, 1)
            add([(y(layer, c, a), 1.0) for c in around], 1, 1)
    for layer in range(steps):
        for c1, c2, d1, d2 in itertools.product(around, repeat=4):
            one, two, both = y(layer, c1, d1), y(layer + 1, c2, d2), z(layer, c1, c2, d1, d2)
            add([(both, 1.0), (one, -1.0)], -np.inf, 0)
            add([(both, 1.0), (two, -1.0)], -np.inf, 0)
            add([(both, 1.0), (one, -1.0), (two, -1.0)], -1, np.inf)
        for d1, d2 in itertools.product(around, repeat=2):
            if cost[d1, d2] > 0:
                terms = [
                    (z(layer, c1, c2, d1, d2), float(flows[layer, c1, c2] * cost[d1, d2] / scale))
                    for c1, c2 in itertools.product(around, repeat=2)
                ]
                add([*terms, (ny + nz + layer, -1.0)], -np.inf, 0)
    total = ny + nz + steps
    upper = np.ones(total)
    upper[ny + nz :] = np.inf
    solved = milp(
        np.r_[np.zeros(ny + nz), np.ones(steps)],
        integrality=np.r_[np.ones(ny), np.zeros(nz + steps)],
        bounds=Bounds(np.zeros(total), upper),
        constraints=LinearConstraint(
            coo_array((values, (rows, columns)), shape=(len(low), total)).tocsr(), low, high
        ),
        options={"mip_rel_gap": gap, "time_limit": time_limit},
    )
    if solved.x is None:
        raise FailureError(f"HiGHS found no arrangement in {time_limit:g} s; take arrange='local'")
    return np.asarray(solved.x[:ny].reshape(steps + 1, g, g).argmax(2), np.int64)


def arrange_local(flows: Array, cost: Array, seed: int = 0, starts: int = 4) -> Labels:
    """Return devices by swapping two clusters of a layer until nothing helps, from several starts."""
    rng = np.random.default_rng(seed)
    layers, g = len(flows) + 1, cost.shape[0]
    best, least = np.tile(np.arange(g), (layers, 1)), np.inf
    for start in range(starts):
        order = np.tile(np.arange(g), (layers, 1))
        if start:
            order = np.stack([rng.permutation(g) for _ in range(layers)])
        now, better = chain_cost(flows, cost, order), True
        while better:
            better = False
            for layer, (a, b) in itertools.product(range(layers), itertools.combinations(range(g), 2)):
                order[layer, [a, b]] = order[layer, [b, a]]
                new = chain_cost(flows, cost, order)
                if new < now - 1e-9:
                    now, better = new, True
                else:
                    order[layer, [a, b]] = order[layer, [b, a]]
        if now < least:
            best, least = order.copy(), now
    return np.asarray(best, np.int64)


def chain_cost(flows: Array, cost: Array, order: Labels) -> float:
    """Return sum over layers of the largest traffic time between two devices."""
    total = 0.0
    for flow, before, after in zip(flows, order, order[1:], strict=False):
        total += float((flow * cost[np.ix_(before, after)]).max())
    return total
