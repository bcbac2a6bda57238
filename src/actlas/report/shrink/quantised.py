"""Quantization methods within a limit on size: bits for each layer, then the method.

The bits of every layer follow what the loss minds: with the error E of rounding a layer to b bits and the
gradient g at its output, the loss rises by about 1/2 E[(g . E x)^2], measured for every choice of b (a grid
that the weights lie on already breaks the rule of a factor of four a bit). Starting from the fewest, bits are
given where they save most for what they take, until the limit is used up; one number of bits for all layers
is tried beside it. Round to nearest decides between the two, and the better one is given to the methods that
calibrate. Group sizes are the legal ones nearest to 64, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError, did_you_mean
from actlas.core.methods import find_method, methods
from actlas.core.numbers import QuantSpec, nearest_group
from actlas.core.packed_weights import PackedWeights
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.measure.linear_layers import LinearLayer
from actlas.report.shrink.rows import Mix
from actlas.report.shrink.weights import BITS, Layers, lean_reason
from actlas.sparsity.sensitivity import each_gradient

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.report.shrink.search import Search

METHODS = ("rtn", "gptq", "awq")
CHOICES = (2, 3, 4, 8)


def quantised_mixes(search: Search, wanted: Sequence[str] | None) -> Iterator[Mix]:
    """Yield mixes of the wanted methods; the search judges each before the next is made.

    Raises:
        InputError: an unknown method, or a limit below two bits a weight.
    """
    names = _methods(wanted)
    layers, goal = search.layers, search.goal
    limit = most_bits(layers, goal.bits, goal.bytes)
    tried: dict[str, dict[str, str]] = {}
    whole = max(b for b in CHOICES if b <= limit)
    tried[f"{whole} bits"] = {p.path: _format(whole, p.columns) for p in layers.blocks}
    if search.model.kind == "causal-lm" and len(layers.blocks) > 1:
        tokens, seed = search.effort.gradients, search.seed
        rises = rounding_rises(search.model, search.fit, layers.blocks, tokens=tokens, seed=seed)
        given = allocate(rises, {p.path: p.size for p in layers.blocks}, limit)
        if len(set(given.values())) > 1:
            mixed = {p.path: _format(given[p.path], p.columns) for p in layers.blocks}
            tried[f"{_mean(layers, mixed):.2g} bits by layer"] = mixed
    first, *others = names
    for said, formats in tried.items():
        yield _mix(search, f"{first}, {said}", first, _fit(search, first, formats), formats)
    best = min(tried, key=lambda said: search.found.rows[f"{first}, {said}"].quality or math.inf)
    for name in others:
        search.say(f"fitting {name}, {best}")
        edit = _fit(search, name, tried[best])
        yield _mix(search, f"{name}, {best}", name, edit, tried[best])


def most_bits(layers: Layers, bits: float | None, limit: int | None) -> float:
    """Return the most mean bits of a code that both limits allow.

    Raises:
        InputError: fewer than two bits; the message says what the least is.
    """
    found = float(CHOICES[-1]) if bits is None else bits
    if limit is not None:
        low, high = 0.0, found
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if stored_bytes(layers, middle) <= limit else (low, middle)
        found = low
    if found < CHOICES[0] - 1e-6:
        least = stored_bytes(layers, CHOICES[0]) / 1e6
        raise InputError(
            f"the limit allows {found:.2g} bits a weight; the least is {CHOICES[0]} "
            f"({least:.1f} MB with scales and an output head of 8 bits)"
        )
    return found


def stored_bytes(layers: Layers, bits: float) -> float:
    """Return about how many bytes the weights take at these mean bits, with scales, zero points and head."""
    total = 0.0
    for layer in layers.blocks:
        group = nearest_group(layer.columns, 64)
        total += layer.size * (bits + (16 + 8) / group) / 8
    return total + head_bytes(layers)


def head_bytes(layers: Layers) -> float:
    """Return the bytes of the output head at 8 bits."""
    if layers.head is None:
        return 0.0
    weight = layers.modules[layers.head].weight
    assert isinstance(weight, Tensor)
    return weight.numel() * BITS["q8"][1] / 8


def rounding_rises(
    model: Model,
    documents: Sequence[Any],
    layers: Sequence[LinearLayer],
    *,
    tokens: int,
    seed: int,
    choices: Sequence[int] = CHOICES,
) -> dict[str, dict[int, float]]:
    """Return, by path and bits, about how much the loss rises (nats a token) if that layer is rounded."""
    sums = {layer.path: dict.fromkeys(choices, 0.0) for layer in layers}

    def take(layer: LinearLayer, x: Tensor, g: Tensor) -> None:
        for bits in choices:
            rounded = QuantLinear.of(layer.module(model), _format(bits, layer.columns), where=layer.path)
            error = rounded.weight.to(x.device) - layer.weight(model)
            sums[layer.path][bits] += float((g * (x @ error.T)).sum(1).double().square().sum())

    count = each_gradient(model, documents, layers, take, tokens=tokens, seed=seed)
    return {path: {b: s / (2 * max(count, 1)) for b, s in of.items()} for path, of in sums.items()}


def allocate(
    rises: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], limit: float
) -> dict[str, int]:
    """Return the bits of each layer, their mean over weights at most `limit`, bought where they save most."""
    given = {path: min(of) for path, of in rises.items()}
    left = limit * sum(sizes.values()) - sum(given[path] * n for path, n in sizes.items())
    while True:
        best, rate = None, 0.0
        for path, of in rises.items():
            for bits, rise in of.items():
                cost = (bits - given[path]) * sizes[path]
                saved = of[given[path]] - rise
                if 0 < cost <= left + 1e-6 and saved / cost > rate:
                    best, rate = (path, bits, cost), saved / cost
        if best is None:
            return given
        given[best[0]] = best[1]
        left -= best[2]


def _methods(wanted: Sequence[str] | None) -> list[str]:
    known = [
        name for name, info in methods().items() if info.room == "quantize" and "formats" in info.options
    ]
    if wanted is None:
        return [name for name in METHODS if name in known]
    for name in wanted:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise InputError(f"no quantization method for a mix of bits is called {name!r}{hint}")
    return list(wanted)


def _fit(search: Search, name: str, formats: Mapping[str, str]) -> Edit:
    info = find_method(name)
    options: dict[str, Any] = {"formats": formats, "evaluate": 0, "seed": search.seed}
    options = {k: v for k, v in options.items() if k in info.options}
    with torch.no_grad():
        made: Edit = info.fit(search.model, search.fit, **options)
    return made


def _format(bits: int, columns: int) -> str:
    group = nearest_group(columns, 64)
    channel = group == columns
    return QuantSpec(
        bits, granularity="channel" if channel else "group", group_size=None if channel else group
    ).name


def _mean(layers: Layers, formats: Mapping[str, str]) -> float:
    size = sum(p.size for p in layers.blocks)
    return sum(p.size * QuantSpec.parse(formats[p.path]).bits for p in layers.blocks) / size


def _mix(search: Search, name: str, method: str, edit: Edit, formats: Mapping[str, str]) -> Mix:
    layers = search.layers
    edits: tuple[Edit, ...] = (edit,)
    if layers.head is not None:
        edits = (edit, PackedWeights({layers.head: "q8"}))
    stored = sum(p.bits_per_weight * p.weights / 8 for p in edit.parts() if isinstance(p, QuantEdit))
    reason = lean_reason(search.model, edits) if search.model.kind == "causal-lm" else "it generates no text"
    size = round(stored + head_bytes(layers))
    return Mix(name, method, edits, size, _mean(layers, formats), 0.0, reason is None, reason or "")
