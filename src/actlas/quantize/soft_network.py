"""A copy of a network whose rounding is still open: soft layers, activation quantisers, blocks in order.

    soft = soften(network, call, w_bits=4, a_bits=8)
    calibrate_acts(soft, calls, times); soft.acts_on(True)
    edit = soft.export("q-diffusion")

The first and the last convolution (of networks without one: linear map) have bits of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.errors import InputError
from actlas.core.layout import find
from actlas.core.network_blocks import Call, blocks_of, layers_of, observe, put
from actlas.core.numbers import QuantSpec
from actlas.core.quant_edit import QuantEdit
from actlas.quantize.adaround import Rounding
from actlas.quantize.concat_split import concat_readers
from actlas.quantize.soft_layers import SoftLayer


@dataclass
class SoftNetwork:
    """A copy of a network whose layers' rounding is still open.

    Attributes:
        network: the copy; its layers are `SoftLayer`s.
        teacher: the float network.
        layers: the soft layers by path.
        inner: quantisers inside attention by path.
        blocks: paths of the blocks in the order in which they run.
        roundings: by block, how its weights were rounded.
    """

    network: nn.Module
    teacher: nn.Module
    layers: dict[str, SoftLayer]
    inner: dict[str, ActQuantizer]
    blocks: list[str]
    roundings: dict[str, Rounding] = field(default_factory=dict)

    def export(self, name: str, note: str = "") -> QuantEdit:
        """Return the edit: every layer as codes, every inner quantiser."""
        modules: dict[str, nn.Module] = {p: layer.export() for p, layer in self.layers.items()}
        modules |= {p: copy.deepcopy(q) for p, q in self.inner.items()}
        errors = {p: r.learned if r.kept else r.nearest for p, r in self.roundings.items()}
        return QuantEdit(modules, method=name, note=note, errors=errors)

    def acts_on(self, on: bool) -> None:
        """Switch the rounding of activations."""
        for layer in self.layers.values():
            layer.act_on = on and layer.act is not None
        for path, quantizer in self.inner.items():
            put(self.network, {path: quantizer if on else nn.Identity()})


def soften(
    network: nn.Module,
    call: Call,
    *,
    w_bits: int,
    a_bits: int | None,
    split: bool = True,
    ends_bits: int | None = 8,
    per_channel: bool = False,
    times: Sequence[int] | None = None,
    polished: bool = False,
    search: bool = True,
    skip: Sequence[str] = (),
) -> SoftNetwork:
    """Return a copy of a network with soft layers and uncalibrated activation quantisers (switched off).

    Args:
        network: any module.
        call: arguments of one pass.
        w_bits, a_bits: of weights and activations; `a_bits=None` leaves activations alone.
        split: ranges of their own for concatenated parts.
        ends_bits: bits of weights and inputs of the first and the last layer that see the image; `None`: like
            all.
        per_channel: a range for each channel of an activation.
        times: a range for each of these timesteps.
        polished: LogNP polishing of activations (not at the ends).
        search: L_2.4 search for the weights' ranges.
        skip: paths of layers that stay as they are.
    """
    for name, bits in (("w_bits", w_bits), ("a_bits", a_bits), ("ends_bits", ends_bits)):
        if bits is not None and not 2 <= bits <= 8:
            raise InputError(f"{name} is {bits}; weights and activations have 2 to 8 bits here")
    teacher = network
    made = copy.deepcopy(network).eval()
    for p in made.parameters():
        p.requires_grad_(False)
    parts = concat_readers(made, call) if split else {}
    found = layers_of(made)
    ends = _ends(made, found, call) if ends_bits is not None else ()
    shapes = _input_shapes(made, call)
    layers: dict[str, SoftLayer] = {}
    for path, layer in found.items():
        if path not in shapes or path in skip:
            continue
        end = path in ends
        bits_w, bits_a = (ends_bits, ends_bits) if end and ends_bits else (w_bits, a_bits)
        act = None
        if bits_a is not None and a_bits is not None:
            axis = 1 if isinstance(layer, nn.Conv2d) else -1
            channels = shapes[path][axis]
            sizes = (1,) * channels if per_channel and not end else parts.get(path)
            act = ActQuantizer(
                bits_a,
                channels,
                segments=sizes,
                axis=axis,
                times=times,
                polished=polished and not end,
            )
        assert bits_w is not None
        layers[path] = SoftLayer(
            layer,
            QuantSpec(bits_w, granularity="channel"),
            split=parts.get(path),
            act=act,
            search=search,
            where=path,
        )
    inner: dict[str, ActQuantizer] = {}
    if a_bits is not None:
        for path, shape in shapes.items():
            module = find(made, path)
            if isinstance(module, nn.Identity) and path.rpartition(".")[2].startswith("at_"):
                # The map and what it mixes: one range each, at 8 bits for the map as in the official code.
                bits = 8 if path.endswith("at_map") else a_bits
                inner[path] = ActQuantizer(bits, shape[-1], axis=-1, times=times)
    order = blocks_of(made, call)
    put(made, layers)
    soft = SoftNetwork(made, teacher, layers, inner, order)
    soft.acts_on(False)
    return soft


def calibrate_acts(
    soft: SoftNetwork,
    calls: Sequence[Call],
    when: Sequence[Tensor | None],
    *,
    rows: int = 1024,
    seed: int = 0,
) -> None:
    """Set all activation ranges from the float network's activations on random rows of the data."""
    quantisers = {p: layer.act for p, layer in soft.layers.items() if layer.act is not None}
    quantisers |= soft.inner
    seen: dict[str, list[Tensor]] = {p: [] for p in quantisers}
    share = max(1, rows // max(1, len(calls)))

    def keep(path: str, x: Tensor, number: int) -> None:
        seen[path].append(x[:share])

    on = any(layer.act_on for layer in soft.layers.values())
    soft.acts_on(False)
    observe(soft.network, list(quantisers), calls, keep)
    soft.acts_on(on)
    known = [t for t in when if t is not None]
    times = torch.cat([t[:share] for t in known]) if len(known) == len(calls) else None
    for path, quantizer in quantisers.items():
        if not seen[path]:
            raise InputError(f"the calibration data never reached {path}")
        quantizer.calibrate(torch.cat(seen[path]), times)


def scale_groups(scales: Sequence[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Return optimiser groups whose rates are relative to each scale's size, and let the scales learn."""
    return [{"params": [s.requires_grad_(True)], "lr": lr * float(s.detach().mean())} for s in scales]


def freeze(parameters: Sequence[nn.Parameter]) -> None:
    """Stop learning parameters."""
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None


def inside(layers: dict[str, SoftLayer], path: str) -> dict[str, SoftLayer]:
    """Return the soft layers of one block."""
    return {p: layer for p, layer in layers.items() if p == path or p.startswith(path + ".")}


def _input_shapes(network: nn.Module, call: Call) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what reaches each layer and each empty module."""
    shapes: dict[str, tuple[int, ...]] = {}
    paths = [p for p, m in network.named_modules() if p and not any(True for _ in m.children())]
    observe(network, paths, [call], lambda p, x, i: shapes.setdefault(p, tuple(x.shape)))
    return shapes


def _ends(network: nn.Module, layers: dict[str, nn.Module], call: Call) -> tuple[Any, ...]:
    """Return the first and the last convolution that run (linear maps where there is none)."""
    order: list[str] = []
    observe(network, list(layers), [call], lambda p, x, i: order.append(p) if p not in order else None)
    convs = [p for p in order if isinstance(layers[p], nn.Conv2d)] or order
    return (convs[0], convs[-1]) if convs else ()
