"""Statistics of any module's activations, for networks whose blocks Actlas does not know by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.report.content import SectionResult, Table, plain, show_number
from actlas.report.example import Example, example_for, image_side
from actlas.report.plots import lines
from actlas.report.registry import Context, section

if TYPE_CHECKING:
    from actlas.core.model import Model

MOST_MODULES = 240
MOST_TYPES = 5
BATCH = 8
MOST_IMAGES = 16
KINDS = ("module", "image-classifier", "image-encoder", "image-text", "seq2seq", "speech")


@section("modules", title="Activations by module", order=40, needs=KINDS, cost=1.5)
def modules(context: Context) -> SectionResult:
    """Read the output of every innermost module, in the order in which they run."""
    from actlas.measure.statistics import mean_measurement

    model = context.model
    batches, note = _inputs(context)
    order, table = _read(model, batches)
    if not order:
        raise InputError(f"no module of {model.name} gives a tensor of numbers")
    found: list[Measurement] = []
    for name in order:
        for column, (what, unit) in enumerate(_QUANTITIES):
            samples = np.array([row[column] for row in table[name]])
            found.append(
                mean_measurement(
                    what,
                    unit,
                    samples[np.isfinite(samples)],
                    seed=context.seed,
                    over="inputs",
                    group={"module": name},
                )
            )
    places = {float(i): _label(model, name) for i, name in enumerate(order)}
    types = _types(model, order)
    items = len(next(iter(table.values())))
    common: dict[str, Any] = {
        "x": "module, in the order of running",
        "names": places,
        "connect": False,
        "wide": True,
    }
    figures = [
        lines(
            "Size of activations",
            "Root mean square of each module's output, with 95% intervals over inputs; point at one "
            "for its name.",
            _points(found, order, types, "module-rms"),
            y="root mean square",
            log=True,
            **common,
        ),
        lines(
            "Exact zeros",
            "Share of each module's output that is exactly zero: rectifiers make zeros, other "
            "functions do not.",
            _points(found, order, types, "module-zeros"),
            y="share of zeros",
            percent=True,
            domain=(0, 1),
            **common,
        ),
        lines(
            "Heavy tails",
            "Excess kurtosis of each module's output: 0 is Gaussian, large means that few elements "
            "carry most.",
            _points(found, order, types, "module-kurtosis"),
            y="excess kurtosis",
            **common,
        ),
    ]
    notes = [note] if note else []
    if len(order) == MOST_MODULES:
        notes.append(f"Only the first {MOST_MODULES} modules were read.")
    intro = (
        f"Every innermost module that runs is read once for {items} input{'s' if items > 1 else ''} "
        "through its `module:` site. Each statistic is taken over the elements of one input, then "
        "averaged over inputs."
    )
    return SectionResult(intro, (), figures, [_extremes(model, found, order)], notes, details=found)


_QUANTITIES = (
    ("module-rms", "root mean square"),
    ("module-zeros", "fraction"),
    ("module-kurtosis", "excess kurtosis"),
)


def _inputs(context: Context) -> tuple[list[Any], str]:
    """Batches of inputs: photographs for an image model, the example otherwise."""
    model = context.model
    if model.kind == "image-classifier" and context.example is None:
        from actlas.data import images

        n = min(MOST_IMAGES, context.budget.images)
        pixels = images("photos", n=n, size=image_side(model), seed=context.seed).pixels
        return [list(some) for some in torch.split(pixels, BATCH)], ""
    example: Example = context.once("example", lambda: example_for(model, context.example, context.seed))
    return [example.inputs], example.note


def _read(
    model: Model, batches: Sequence[Any]
) -> tuple[list[str], dict[str, list[tuple[float, float, float]]]]:
    """Return module names in running order and, for each, one row of statistics an input."""
    leaves = {n: m for n, m in model.module.named_modules() if n and not list(m.children())}
    order: list[str] = []
    table: dict[str, list[tuple[float, float, float]]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = (
                output
                if isinstance(output, Tensor)
                else next(
                    (x for x in output if isinstance(x, Tensor))
                    if isinstance(output, (tuple, list))
                    else iter(()),
                    None,
                )
            )
            if first is None or not first.is_floating_point() or first.dim() < 1 or name in running:
                return
            running.add(name)
            if name not in table:
                if len(order) >= MOST_MODULES:
                    return
                order.append(name)
                table[name] = []
            table[name] += _rows(name, first.detach())

        return hook

    running: set[str] = set()
    handles = [m.register_forward_hook(keep(n)) for n, m in leaves.items()]
    try:
        for batch in batches:
            running.clear()
            _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return order, table


def _run(model: Model, batch: Any) -> None:
    if batch is None:
        from actlas.measure.complexity import forward_arguments

        module, args, kwargs = forward_arguments(model, None, 64, 0)
        module(*args, **kwargs)
    elif isinstance(batch, tuple):
        model.module(*batch)
    elif isinstance(batch, dict):
        model.module(**batch)
    elif isinstance(batch, Tensor):
        model.module(batch)
    else:
        model.forward(batch)


def _rows(name: str, x: Tensor) -> list[tuple[float, float, float]]:
    """Root mean square, share of zeros and excess kurtosis of each input's elements, in float64."""
    flat = x.reshape(x.shape[0], -1).double()
    if not bool(torch.isfinite(flat).all()):
        raise NonFiniteError(f"the output of module {name!r} holds NaN or infinity")
    square = flat.square().mean(1)
    centred = flat - flat.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    constant = variance <= 1e-24 * square.clamp_min(1e-300)
    kurtosis = centred.pow(4).mean(1) / variance.clamp_min(1e-300).square() - 3
    kurtosis[constant] = float("nan")
    zeros = (flat == 0).double().mean(1)
    return list(zip(square.sqrt().tolist(), zeros.tolist(), kurtosis.tolist(), strict=True))


def _types(model: Model, order: Sequence[str]) -> dict[str, str]:
    """The class of each module; the rarer ones together."""
    of = {name: type(model.module.get_submodule(name)).__name__ for name in order}
    common = [kind for kind, _ in Counter(of.values()).most_common(MOST_TYPES)]
    return {name: kind if kind in common else "other" for name, kind in of.items()}


def _points(
    found: Sequence[Measurement], order: Sequence[str], types: Mapping[str, str], what: str
) -> dict[str, list[tuple[float, float, float | None, float | None]]]:
    """The measurements of one quantity as points at their module's place, by class of module."""
    place = {name: i for i, name in enumerate(order)}
    out: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for m in found:
        if m.name == what:
            name = m.group["module"]
            out.setdefault(types[name], []).append((place[name], m.value, m.low, m.high))
    return out


def _label(model: Model, name: str) -> str:
    return f"{name} ({type(model.module.get_submodule(name)).__name__})"


def _extremes(model: Model, found: Sequence[Measurement], order: Sequence[str]) -> Table:
    rows = []
    for what, unit in _QUANTITIES:
        known = [m for m in found if m.name == what and np.isfinite(m.value)]
        if known:
            most, least = max(known, key=lambda m: m.value), min(known, key=lambda m: m.value)
            where = [
                f"{show_number(m.value)} in {plain(_label(model, m.group['module']))}" for m in (least, most)
            ]
            rows.append((unit if what != "module-zeros" else "share of zeros", *where))
    return Table(f"Extremes of {len(order)} modules", ("Quantity", "Least", "Most"), tuple(rows))
