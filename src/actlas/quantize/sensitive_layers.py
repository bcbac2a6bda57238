"""Which layers of a quantised diffusion network carry the timestep, which suffer most; ranges by timestep.

    time_layers(soft, call)             # those whose input does not change with the image
    site_sensitivity(soft, calls)       # error of the output when one input alone is rounded
    with_times(soft, data)              # the same network with one activation range for each timestep

Found by running the network, not by the names of its layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.network_blocks import Call, observe, put
from actlas.quantize.soft_layers import SoftLayer
from actlas.quantize.soft_network import SoftNetwork, calibrate_acts
from actlas.quantize.trajectory import Trajectory


def time_layers(soft: SoftNetwork, call: Call) -> tuple[str, ...]:
    """Return the layers whose input depends on the timestep alone: it stays when the image changes.

    Args:
        soft: the network.
        call: `((x, t), {})` with two rows or more.
    """
    seen: list[dict[str, Tensor]] = []
    (x, t, *rest), kwargs = call
    for image in (x, x.flip(0) + 0.5):
        found: dict[str, Tensor] = {}

        def see(path: str, value: Tensor, number: int, found: dict[str, Tensor] = found) -> None:
            found[path] = value

        observe(soft.network, list(soft.layers), [((image, t, *rest), kwargs)], see)
        seen.append(found)
    return tuple(p for p in soft.layers if p in seen[0] and torch.equal(seen[0][p], seen[1][p]))


@torch.no_grad()
def site_sensitivity(soft: SoftNetwork, calls: Sequence[Call]) -> dict[str, float]:
    """Return, for each layer and inner quantiser, the error of the output when only its input is rounded.

    Args:
        soft: with calibrated quantisers; weights stay as they are in all runs.
        calls: data.

    Returns:
        path -> mean squared error against the output without rounded inputs, greatest first.
    """
    before = {p: layer.act_on for p, layer in soft.layers.items()}
    soft.acts_on(False)
    want = [soft.network(*a, **k) for a, k in calls]

    def error() -> float:
        total = sum(
            float((soft.network(*a, **k) - w).square().mean()) for (a, k), w in zip(calls, want, strict=True)
        )
        return total / len(want)

    found: dict[str, float] = {}
    for path, layer in soft.layers.items():
        if layer.act is not None:
            layer.act_on = True
            found[path] = error()
            layer.act_on = False
    for path, quantizer in soft.inner.items():
        put(soft.network, {path: quantizer})
        found[path] = error()
        put(soft.network, {path: nn.Identity()})
    soft.acts_on(any(before.values()))
    for path, on in before.items():
        soft.layers[path].act_on = on
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def with_times(soft: SoftNetwork, data: Trajectory, *, seed: int = 0) -> SoftNetwork:
    """Return a copy of a network with one activation range for each calibrated timestep; weights stay.

    Args:
        soft: with activation quantisers.
        data: its timesteps are calibrated.
        seed: of the rows that are used.
    """
    teacher, soft.teacher = soft.teacher, nn.Identity()
    try:
        made = copy.deepcopy(soft)
    finally:
        soft.teacher = teacher
    made.teacher = teacher
    made.layers = {p: m for p, m in made.network.named_modules() if isinstance(m, SoftLayer)}
    for layer in made.layers.values():
        if layer.act is not None:
            layer.act = ActQuantizer.from_config({**layer.act.config(), "times": [0] * len(data.t)})
            layer.act.times = torch.tensor(data.t)
    made.inner = {
        p: ActQuantizer.from_config({**q.config(), "times": [0] * len(data.t)}) for p, q in soft.inner.items()
    }
    for quantizer in made.inner.values():
        quantizer.times = torch.tensor(data.t)
    made.acts_on(True)
    calls, when = data.mixed(128, seed)
    calibrate_acts(made, calls, when, seed=seed)
    return made
