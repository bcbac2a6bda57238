"""Budgets: how much each layer skips, so that all together skip what was asked.

`greedy`: every layer has a curve of loss against share (`sensitivity.loss_rises`). Starting from dense,
the layer whose next step costs least per weight saved takes it, until the model's share of skipped weights
is reached. Steps follow the lower convex hull of each curve, so that the greedy answer is the best one on
the hull; the last step is cut to fit the budget exactly.

`by_price`: layers whose scores are in one unit need no curves. One price per weight decides everywhere:
input i of a layer with m rows is skipped where score_i^2 < price * m.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.measure.linear_layers import LinearLayer
from actlas.sparsity.input_sparsity import check_sparsity


def greedy(
    layers: Sequence[LinearLayer],
    rises: Mapping[str, Sequence[float]],
    levels: Sequence[float],
    sparsity: float,
) -> dict[str, float]:
    """Return the share of skipped inputs of each layer, by path.

    Args:
        layers: the layers that may skip inputs.
        rises: path -> cost at each level; of `loss_rises`.
        levels: ascending shares in (0, 1); a cost of 0 at share 0 is understood.
        sparsity: share of all these layers' weights that is skipped together.

    Raises:
        InputError: levels that do not ascend, or a budget above the last level.
    """
    check_sparsity(sparsity)
    points = [0.0, *levels]
    if any(b <= a for a, b in itertools.pairwise(points)) or points[-1] >= 1:
        raise InputError(f"levels must ascend within (0, 1), not {list(levels)}")
    if sparsity > points[-1]:
        raise InputError(
            f"no layer may skip more than {points[-1]:g}, so all together cannot skip {sparsity:g}"
        )
    size = {layer.path: layer.size for layer in layers}
    left = sparsity * sum(size.values())
    shares = dict.fromkeys(size, 0.0)
    queue: list[tuple[float, str, int]] = []
    hulls = {p: _hull(points, [0.0, *(max(0.0, r) for r in rises[p])]) for p in size}

    def offer(path: str, i: int) -> None:
        hull = hulls[path]
        if i + 1 < len(hull):
            (a, low), (b, high) = hull[i], hull[i + 1]
            heapq.heappush(queue, ((high - low) / ((b - a) * size[path]), path, i))

    for path in size:
        offer(path, 0)
    while queue and left > 0:
        _, path, i = heapq.heappop(queue)
        a, b = hulls[path][i][0], hulls[path][i + 1][0]
        step = min(b - a, left / size[path])
        shares[path] = a + step
        left -= step * size[path]
        offer(path, i + 1)
    return shares


def _hull(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Return the lower convex hull of points with ascending x."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def by_price(
    layers: Sequence[LinearLayer],
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    most: float = 0.95,
    steps: int = 40,
) -> dict[str, float]:
    """Return the share of skipped inputs of each layer at one price per weight.

    Args:
        layers: the layers.
        scores: path -> scores `[n, columns]` of calibration tokens, in one unit for all layers.
        sparsity: share of all these layers' weights that is skipped together.
        most: no layer skips more than this.
        steps: bisection steps.

    Raises:
        InputError: a sparsity above `most`.
    """
    check_sparsity(sparsity)
    if sparsity > most:
        raise InputError(f"no layer may skip more than {most:g}, so all together cannot skip {sparsity:g}")
    prices = {p.path: (scores[p.path].double().square() / p.rows).flatten().sort().values for p in layers}
    total = sum(layer.size for layer in layers)

    def shares(log_price: float) -> dict[str, float]:
        price = torch.tensor([log_price], dtype=torch.float64).exp()
        return {
            path: min(most, int(torch.searchsorted(values, price)) / len(values))
            for path, values in prices.items()
        }

    low, high = -80.0, 80.0
    for _ in range(steps):
        middle = (low + high) / 2
        found = shares(middle)
        if sum(found[layer.path] * layer.size for layer in layers) < sparsity * total:
            low = middle
        else:
            high = middle
    return shares(high)
