"""Build the networks that `scaling` describes, and compare their cost with their run time.

    build_anynet(spec, seed=0) -> nn.Module
    efficientnet_lite(version=0) -> ConvArch
    scaling_report(specs, *, batch=1, repeats=7, seed=0) -> ScalingReport

An AnyNet (Radosavovic et al. 2020, section 3.1) is a 3 x 3 stem, stages of residual bottleneck
blocks (1x1, grouped k x k, 1x1), global average pooling and a linear classifier. The inverted form is
EfficientNet-Lite's (no squeeze-excitation, ReLU6).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.architectures import ConvArch, Stage
from actlas.measure.complexity import complexity
from actlas.measure.cost import median_interval


def _conv(w_in: int, w_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(w_in, w_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(w_out)]


class ResidualBlock(nn.Module):
    """`activation(project(x) + body(x))`; `project` is the identity where the shape stays.

    Args:
        body: the block's own layers.
        project: a projection, or `None`.
        activation: what follows the sum, or `None`.
        residual: whether the input is added at all.
    """

    def __init__(
        self, body: nn.Module, project: nn.Module | None, activation: nn.Module | None, residual: bool
    ) -> None:
        super().__init__()
        self.body, self.project, self.activation, self.residual = body, project, activation, residual

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, w_in, h, w] to [batch, w_out, h', w']."""
        y: Tensor = self.body(x)
        if self.residual:
            y = y + (x if self.project is None else self.project(x))
        return y if self.activation is None else self.activation(y)


def _bottleneck(w_in: int, s: Stage, stride: int) -> ResidualBlock:
    width, inner = int(s.width), round(s.width * s.expansion)
    body = [
        *_conv(w_in, inner, 1),
        nn.ReLU(),
        *_conv(inner, inner, s.kernel, stride, inner // int(s.group_width)),
        nn.ReLU(),
        *_conv(inner, width, 1),
    ]
    project = nn.Sequential(*_conv(w_in, width, 1, stride)) if w_in != width or stride != 1 else None
    return ResidualBlock(nn.Sequential(*body), project, nn.ReLU(), residual=True)


def _inverted(w_in: int, s: Stage, stride: int) -> ResidualBlock:
    width, inner = int(s.width), round(w_in * s.expansion)
    expand = [*_conv(w_in, inner, 1), nn.ReLU6()] if s.expansion != 1 else []
    body = [*expand, *_conv(inner, inner, s.kernel, stride, inner), nn.ReLU6(), *_conv(inner, width, 1)]
    return ResidualBlock(nn.Sequential(*body), None, None, residual=w_in == width and stride == 1)


def build_anynet(spec: ConvArch, seed: int = 0) -> nn.Module:
    """Build a randomly initialised network in evaluation mode.

    Args:
        spec: integer sizes, as `scale_arch` returns with rounding.
        seed: seed of the weights (He initialisation, fan-out).

    Returns:
        a module that maps [batch, channels, resolution, resolution] to [batch, classes].

    Raises:
        InputError: a size that is not a whole number, or groups that do not divide.
    """
    sizes = [spec.stem_width, spec.head_width, spec.resolution]
    sizes += [v for s in spec.stages for v in (s.depth, s.width, s.group_width)]
    if any(v != int(v) for v in sizes):
        bad = next(v for v in sizes if v != int(v))
        raise InputError(f"a network needs whole sizes, not {bad:g}; scale with rounding=True")
    width = int(spec.stem_width)
    stem = nn.Sequential(*_conv(spec.channels, width, 3, spec.stem_stride), _activation(spec))
    stages = []
    for i, s in enumerate(spec.stages):
        inner = round(s.width * s.expansion)
        if spec.block == "bottleneck" and inner % int(s.group_width):
            raise InputError(
                f"stage {i}: group width {s.group_width:g} does not divide the inner width {inner}"
            )
        blocks = []
        for j in range(int(s.depth)):
            make = _bottleneck if spec.block == "bottleneck" else _inverted
            blocks.append(make(width, s, s.stride if j == 0 else 1))
            width = int(s.width)
        stages.append(nn.Sequential(*blocks))
    head: list[nn.Module] = []
    if spec.head_width:
        head = [*_conv(width, int(spec.head_width), 1), _activation(spec)]
        width = int(spec.head_width)
    head += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, spec.classes)]
    net = nn.Sequential()
    net.add_module("stem", stem)
    net.add_module("stages", nn.Sequential(*stages))
    net.add_module("head", nn.Sequential(*head))
    _initialise(net, seed)
    return net.eval()


def _activation(spec: ConvArch) -> nn.Module:
    return nn.ReLU() if spec.block == "bottleneck" else nn.ReLU6()


def _initialise(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.Conv2d):
                fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
                part.weight.normal_(0, math.sqrt(2 / fan_out), generator=generator)
            elif isinstance(part, nn.Linear):
                part.weight.normal_(0, 0.01, generator=generator)
                part.bias.zero_()


_LITE = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 260), 3: (1.2, 1.4, 280), 4: (1.4, 1.8, 300)}


def efficientnet_lite(version: int = 0) -> ConvArch:
    """Return the architecture of EfficientNet-Lite 0 to 4 (width, depth and resolution scaled together).

    Source: Google's `efficientnet_lite_builder.py`: EfficientNet-B0 without squeeze-excitation, with
    ReLU6; stem, head, and the depth of the first and last stage stay fixed.
    """
    if version not in _LITE:
        raise InputError(f"EfficientNet-Lite has versions 0 to 4, not {version}")
    width_by, depth_by, resolution = _LITE[version]
    base = (
        Stage(1, 16, 1, 1, 1, 3),
        Stage(2, 24, 2, 6, 1, 3),
        Stage(2, 40, 2, 6, 1, 5),
        Stage(3, 80, 2, 6, 1, 3),
        Stage(3, 112, 1, 6, 1, 5),
        Stage(4, 192, 2, 6, 1, 5),
        Stage(1, 320, 1, 6, 1, 3),
    )
    stages = []
    for i, s in enumerate(base):
        depth = s.depth if i in (0, len(base) - 1) else math.ceil(s.depth * depth_by)
        width = max(8, int(s.width * width_by + 4) // 8 * 8)
        width += 8 if width < 0.9 * s.width * width_by else 0
        stages.append(replace(s, depth=depth, width=width))
    return ConvArch(tuple(stages), resolution, 32, 2, 1280, 1000, block="inverted")


@dataclass(frozen=True)
class ScalingReport:
    """Cost and run time of several networks, and which cost goes with the time.

    Attributes:
        rows: name -> measurements (multiply-adds, activation elements, parameters, forward time).
        correlation: Pearson's r of the run time with activations and with multiply-adds.
    """

    rows: Mapping[str, list[Measurement]]
    correlation: Mapping[str, Measurement]


def scaling_report(
    specs: Mapping[str, ConvArch], *, batch: int = 1, repeats: int = 7, seed: int = 0
) -> ScalingReport:
    """Count and time several architectures in interleaved passes.

    Times are CPU times (of all threads of this process), so that a busy machine matters less; each
    row's baseline is the first network's time.

    Args:
        specs: name -> architecture with whole sizes; two or more.
        batch: images in a pass.
        repeats: timed passes for each network.
        seed: seed of weights and images.

    Raises:
        InputError: fewer than two architectures.
    """
    if len(specs) < 2:
        raise InputError(f"a scaling report compares two or more architectures, not {len(specs)}")
    generator = torch.Generator().manual_seed(seed)
    nets = {name: build_anynet(spec, seed) for name, spec in specs.items()}
    images = {
        name: torch.randn(batch, s.channels, int(s.resolution), int(s.resolution), generator=generator)
        for name, s in specs.items()
    }
    rows, times = {}, {name: [] for name in specs}  # type: dict[str, list[Measurement]], dict[str, list[float]]
    with progress("scaling report", (repeats + 1) * len(specs)) as advance, torch.no_grad():
        for repeat in range(repeats + 1):
            for name, net in nets.items():
                start = time.process_time()
                net(images[name])
                if repeat:
                    times[name].append(time.process_time() - start)
                advance()
    base: Measurement | None = None
    for name, net in nets.items():
        low, high = median_interval(times[name])
        took = Measurement(
            "forward-time",
            statistics.median(times[name]) / batch,
            "CPU s/image",
            repeats,
            low / batch,
            high / batch,
            "order statistics",
            seed=seed,
            better="lower",
            baseline=base,
        )
        base = base or took
        counted = complexity(net, images[name]).measurements()
        rows[name] = [replace(m, group={"network": name}) for m in (*counted, took)]
    values = {m: [r.value for row in rows.values() for r in row if r.name == m] for m in _CORRELATED}
    return ScalingReport(rows, {m: _pearson(m, values[m], values["forward-time"]) for m in _CORRELATED[:2]})


_CORRELATED = ("activation-elements", "multiply-adds", "forward-time")


def _pearson(name: str, x: list[float], y: list[float]) -> Measurement:
    """Pearson's r with Fisher's interval (four or more networks)."""
    constant = len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0
    r = math.nan if constant else float(np.corrcoef(x, y)[0, 1])
    low = high = None
    if len(x) > 3 and abs(r) < 1:
        low, high = (math.tanh(math.atanh(r) + sign * 1.96 / math.sqrt(len(x) - 3)) for sign in (-1, 1))
    note = "fewer than three networks, or no variation" if constant else ""
    return Measurement(
        f"correlation of {name} with time", r, "Pearson r", len(x), low, high, "Fisher z", note=note
    )
