"""What a forward pass costs: parameters, multiply-adds, activation elements, time, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

from actlas.core.errors import ActlasError
from actlas.core.measurement import Measurement
from actlas.report.content import Figure, SectionResult, Table, Tile, plain, show_number
from actlas.report.example import Example, example_for
from actlas.report.plots import Row, bars
from actlas.report.registry import Context, section

SHOWN = 12
"""Roles of modules in the plots; the rest is one bar."""


@section("cost", title="Cost", order=70, cost=2.6)
def cost(context: Context) -> SectionResult:
    """Count what a pass computes, then time it beside the bare model."""
    from actlas.measure.cost import cost as cost_measures
    from actlas.measure.speed import decode_speed, forward_measures

    model, budget = context.model, context.budget
    example: Example = context.once("example", lambda: example_for(model, context.example, context.seed))
    tokens = min(budget.cost_tokens, model.context_length or budget.cost_tokens)
    notes = [example.note] if example.note else []
    counted = cost_measures(
        model, seed=context.seed, tokens=tokens, repeats=budget.cost_repeats, example=example.inputs
    )
    measurements = list(counted)
    measurements += forward_measures(
        model, tokens=tokens, repeats=budget.cost_repeats, example=example.inputs, seed=context.seed
    )
    if model.kind == "causal-lm":
        try:
            measurements.append(
                decode_speed(
                    model, new_tokens=budget.new_tokens, repeats=budget.cost_repeats, seed=context.seed
                )
            )
        except ActlasError as error:
            notes.append(f"Decoding speed was not measured: {plain(error)}")
    by_name = {m.name: m for m in measurements}
    uncounted: Mapping[str, int] = by_name["multiply-adds"].details.get("uncounted", {})
    table = Table(
        "Operators that were not counted",
        ("Operator", "Times in one pass"),
        tuple((op, f"{n:,}") for op, n in sorted(uncounted.items())),
        "Their work is in none of the totals.",
    )
    if not uncounted:
        notes.append("Every operator that ran was counted.")
    figures = [
        _shares("Multiply-adds by part", _parts(context, by_name["multiply-adds"], example), "multiply-adds"),
        _shares(
            "Activation elements by part",
            _parts(context, by_name["activation-elements"], example),
            "elements",
        ),
    ]
    intro = (
        "Counts come from the tensors of one real pass. Activation elements are the numbers that a "
        "pass writes: where memory traffic is the limit they predict run time better than "
        f"multiply-adds. Times are medians of {budget.cost_repeats} passes, each beside a baseline that "
        "was timed in turn with it on this machine."
    )
    return SectionResult(intro, measurements, figures, [table] if uncounted else [], notes, _tiles(by_name))


def _parts(context: Context, m: Measurement, example: Example) -> Mapping[str, float]:
    """Return the number by role; by module where the layers are numbered and nothing more."""
    roles: Mapping[str, float] = m.details.get("by_role", {})
    if len(roles) > 1:
        return roles
    from actlas.measure.complexity import complexity

    counted = context.once("complexity", lambda: complexity(context.model, example.inputs, seed=context.seed))
    field = "macs" if m.name == "multiply-adds" else "activations"
    named = dict(context.model.module.named_modules())
    return {
        f"{name} {type(named[name]).__name__}" if name in named else name: float(getattr(cost, field))
        for name, cost in counted.by_module.items()
        if getattr(cost, field)
    }


def _shares(title: str, roles: Mapping[str, float], what: str) -> Figure:
    total = sum(roles.values()) or 1.0
    ordered = sorted(roles.items(), key=lambda item: -item[1])
    rows = [Row(_short(role), value / total) for role, value in ordered[:SHOWN]]
    rest = sum(value for _, value in ordered[SHOWN:])
    if rest > 0:
        rows.append(Row(f"{len(ordered) - SHOWN} other parts", rest / total))
    most = ordered[0] if ordered else ("nothing", 0.0)
    text = (
        f"Share of the {what} of one pass by part of the model, layers taken together. The most are in "
        f"{_short(most[0])} ({most[1] / total:.0%})."
    )
    return bars(title, text, rows, axis=f"share of {what}", percent=True)


def _short(role: str) -> str:
    """The last parts of a module's path: `mlp.up_proj` instead of `model.layers.*.mlp.up_proj`."""
    parts = [p for p in role.split(".") if p != "*"]
    return ".".join(parts[-2:]) or "(the model itself)"


def _tiles(by_name: Mapping[str, Measurement]) -> list[Tile]:
    tiles = []
    for name, label, rank in (
        ("forward-speed", "Speed, reading", 60),
        ("decode-speed", "Speed, writing", 62),
    ):
        m = by_name.get(name)
        if m is not None and math.isfinite(m.value):
            bare = m.baseline
            remark = "" if bare is None else f"bare model {show_number(bare.value)}"
            tiles.append(Tile(label, m, remark=remark, rank=rank))
    elements = by_name.get("activation-elements")
    if elements is not None:
        per = elements.unit.partition("/")[2]
        tiles.append(Tile(f"Activations per {per}", elements, show=_short_number(elements.value), rank=64))
    return tiles


def _short_number(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g} {letter}"
    return f"{x:.3g}"
