"""Bits for layers by how much each one matters, under a budget of the average.

    allocate_bits({"a": 3.0, "b": 0.1}, choices=(2, 3, 4), budget=3, sizes={"a": 100, "b": 300})

A layer at b bits is taken to cost `sensitivity * 4^-b`: an even grid's squared step falls fourfold with each
bit, and a loss with curvature lambda rises by lambda / 2 times the squared error (Q-BERT, HAWQ). Bits are
given one step at a time to the layer whose cost falls most for the bits that the step takes. With two choices
and layers of one size this gives the larger one to the most sensitive layers, as Q-BERT's "2/3 MP" does.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from actlas.core.errors import InputError


def allocate_bits(
    sensitivity: Mapping[str, float],
    choices: Sequence[int] = (2, 3),
    budget: float = 2.5,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return the bits of each layer; their mean, weighted by size, is at most `budget`.

    Args:
        sensitivity: layer -> how much the loss rises per squared error (an eigenvalue, a trace, `Omega`).
        choices: bits that there are.
        budget: mean bits.
        sizes: layer -> number of weights; default: all alike.

    Raises:
        InputError: no layers, negative or NaN sensitivities, or a budget below the least choice.
    """
    if not sensitivity:
        raise InputError("there are no layers to give bits to")
    wrong = [name for name, s in sensitivity.items() if not s >= 0]
    if wrong:
        raise InputError(f"the sensitivity of {wrong[0]} is {sensitivity[wrong[0]]}; it must be 0 or more")
    steps = sorted(set(choices))
    if not steps or steps[0] < 1:
        raise InputError(f"choices must be positive numbers of bits, not {tuple(choices)}")
    if budget < steps[0]:
        raise InputError(f"a budget of {budget:g} bits is below the least choice, {steps[0]}")
    n = {name: int(sizes[name]) if sizes is not None else 1 for name in sensitivity}
    level = dict.fromkeys(sensitivity, 0)
    left = budget * sum(n.values()) - steps[0] * sum(n.values())

    def gain(name: str) -> float:
        low, high = steps[level[name]], steps[level[name] + 1]
        return sensitivity[name] * (4.0**-low - 4.0**-high) / (high - low)

    # A cost per bit of a weight that does not grow with the layer: sensitivities count whole layers.
    queue = [(-gain(name) / n[name], i, name) for i, name in enumerate(sensitivity) if len(steps) > 1]
    heapq.heapify(queue)
    while queue:
        _, i, name = heapq.heappop(queue)
        cost = (steps[level[name] + 1] - steps[level[name]]) * n[name]
        if cost > left + 1e-9:
            continue
        left -= cost
        level[name] += 1
        if level[name] + 1 < len(steps):
            heapq.heappush(queue, (-gain(name) / n[name], i, name))
    return {name: steps[i] for name, i in level.items()}
