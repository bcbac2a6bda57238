"""Looking at circuits: heat maps of effects, where heads attend, and what turning a head up or down does.

heat_map(effects)                              an Altair chart, layer by head or by token
attention_view(model, pairs, [(20, 0)])        where the last token's head looks, token by token
knob_curve(model, pairs, 20, 0)                 the metric with the head scaled by 0, 0.5, 1, 1.5, 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.circuits.effects import Effects
from actlas.circuits.metrics import Metric, MetricFunction
from actlas.circuits.nodes import Node
from actlas.core.artifact import atomic_write
from actlas.core.errors import FailureError, InputError
from actlas.core.intervals import bootstrap_mean
from actlas.core.splitting import split_at

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model

BARS = 30


@dataclass(frozen=True)
class Grid:
    """Effects as a table of layers and columns.

    Attributes:
        layers: block numbers, first to last.
        columns: keys of the columns (head numbers, `MLP`, positions), in order.
        cells: (row, column) -> number of the part in the effects.
    """

    layers: tuple[int, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[int, int], int]


def grid_of(effects: Effects) -> Grid | None:
    """Return the table, or `None` where parts do not lie in one (tuples, single neurons, features)."""
    parts = effects.parts
    if any(not isinstance(p, Node) or p.feature is not None or p.kind == "mlp.act" for p in parts):
        return None
    found = [p for p in parts if isinstance(p, Node)]
    columns = sorted(dict.fromkeys(n.column for n in found), key=_column_order)
    layers = sorted({n.block for n in found})
    cells = {(layers.index(n.block), columns.index(n.column)): i for i, n in enumerate(found)}
    if len(cells) != len(found):
        return None
    return Grid(tuple(layers), tuple(columns), cells)


def column_names(effects: Effects, pairs: PromptPairs | None) -> dict[str, str]:
    """Return what the columns of positions are called: the token there, if most prompts share it."""
    grid = grid_of(effects)
    names: dict[str, str] = {}
    for column in grid.columns if grid is not None else ():
        names[column] = column
        if pairs is None or not column.lstrip("-").isdigit() or not column.startswith("-"):
            continue
        changed = float((pairs.changed == pairs.width + int(column)).float().mean())
        texts = [i[int(column)] for i in pairs.clean["input_ids"].tolist()]
        most = max(set(texts), key=texts.count)
        if texts.count(most) > len(texts) / 2 and pairs.decode is not None:
            names[column] += f" {pairs.decode(most)!r}"
        elif changed >= 0.5:
            names[column] += " changed" if changed == 1 else f" changed ({changed:.0%})"
    return names


def heat_map(effects: Effects, pairs: PromptPairs | None = None) -> Any:
    """Return an Altair chart: layer by column where there is a table, else bars of the largest effects."""
    import altair as alt

    if len(effects) == 0:
        raise InputError("there are no effects to draw")
    said = f"share of the {effects.metric.replace('_', ' ')} that each part carries"
    title = alt.TitleParams(
        f"{effects.mode.capitalize()} patching of {effects.model} on {effects.task}",
        subtitle=f"{said}, {len(effects.clean)} pairs, {effects.method}",
        anchor="start",
    )
    grid = grid_of(effects)
    values = effects.values.tolist()
    limit = max(max(abs(v) for v in values), 1e-9)
    if grid is None:
        top = effects.top(BARS)
        rows = [{"part": e.label, "effect": e.value, "low": e.low, "high": e.high} for e in top]
        y = alt.Y("part:N", sort=[e.label for e in top], title=None)
        base = alt.Chart(alt.Data(values=rows)).encode(y=y)
        bar = base.mark_bar(height=12).encode(x=alt.X("effect:Q", title="effect"), color=_colour(limit, None))
        rule = base.mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q")
        return alt.layer(bar, rule).properties(title=title, width=420, height=alt.Step(18))
    names = column_names(effects, pairs)
    cells = [
        {
            "layer": grid.layers[r],
            "column": names[grid.columns[c]],
            "part": effects.labels[i],
            "effect": values[i],
        }
        for (r, c), i in grid.cells.items()
    ]
    order = [names[c] for c in grid.columns]
    positions = any(c.startswith("-") or c in ("last", "changed") for c in grid.columns)
    x_title = "position (from the end)" if positions else "head" if len(order) > 2 else None
    return (
        alt.Chart(alt.Data(values=cells))
        .mark_rect(stroke="#ffffff", strokeWidth=0.5)
        .encode(
            x=alt.X("column:N", sort=order, title=x_title, axis=alt.Axis(labelAngle=-40 if positions else 0)),
            y=alt.Y("layer:O", sort="descending", title="layer"),
            color=_colour(limit, "effect"),
            tooltip=["part:N", alt.Tooltip("effect:Q", format="+.3f")],
        )
        .properties(title=title, width=alt.Step(46 if positions else 34), height=alt.Step(16))
    )


def save_png(effects: Effects, path: str | Path, pairs: PromptPairs | None = None) -> Path:
    """Write the heat map as a PNG picture.

    Raises:
        FailureError: the picture could not be made or written.
    """
    import vl_convert

    try:
        picture = vl_convert.vegalite_to_png(heat_map(effects, pairs).to_dict(), scale=2.0)
    except ValueError as error:
        raise FailureError(f"the heat map could not be drawn: {error}") from error
    return atomic_write(path, picture)


@dataclass(frozen=True)
class AttentionView:
    """Where one head's last token looks.

    Attributes:
        block, head: which head.
        weights: attention from the last token of each prompt, `[n, pos]` float32.
        by_position: mean attention to named places over prompts, with its 95% interval.
    """

    block: int
    head: int
    weights: Tensor
    by_position: dict[str, tuple[float, float, float]]

    def row(self, number: int, model: Model, pairs: PromptPairs) -> list[tuple[str, float]]:
        """Return (token, attention) of one clean prompt, padding left out."""
        mask = pairs.clean["attention_mask"][number].bool()
        tokens = model.token_strings(pairs.clean["input_ids"][number][mask])
        return list(zip(tokens, self.weights[number][mask].tolist(), strict=True))


def attention_view(
    model: Model, pairs: PromptPairs, heads: Sequence[tuple[int, int]], *, side: str = "clean", seed: int = 0
) -> list[AttentionView]:
    """Read the attention pattern of heads at the last token.

    Args:
        model, pairs: the model and the prompts.
        heads: (block, head) pairs.
        side: `"clean"` or `"corrupt"`.
        seed: of the intervals.

    Raises:
        InputError: no head, or an unknown side. SiteError: a head that does not exist.
    """
    if not heads:
        raise InputError("no head was given; give (block, head) pairs")
    if side not in ("clean", "corrupt"):
        raise InputError(f"side is {side!r}; it must be 'clean' or 'corrupt'")
    for block, number in heads:
        model.resolve(f"blocks.{block}.attn.z[head={number}]")
    names = {block: f"blocks.{block}.attn.pattern" for block, _ in heads}
    trace = model.trace(dict(getattr(pairs, side)), list(names.values()), attention_rows=1)
    first = pairs.width - pairs.lengths
    places = {"first": first, "changed": pairs.changed, "last": pairs.column("last"), **pairs.named}
    found = []
    for block, number in heads:
        weights = trace[names[block]][:, number, -1].float()
        means = {}
        for name, column in places.items():
            x = weights.gather(1, column[:, None])[:, 0].double().cpu().numpy()
            means[name] = (float(x.mean()), *bootstrap_mean(x, seed=seed))
        found.append(AttentionView(block, number, weights.cpu(), means))
    return found


@dataclass(frozen=True)
class KnobPoint:
    """The metric with a head's output multiplied by a factor: mean over prompts with its 95% interval."""

    factor: float
    value: float
    low: float
    high: float


def knob_curve(
    model: Model,
    pairs: PromptPairs,
    block: int,
    head: int,
    *,
    factors: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    metric: str | MetricFunction = "logit_difference",
    seed: int = 0,
) -> list[KnobPoint]:
    """Scale one head's output on the clean prompts and read the metric.

    The blocks before the head run once. The same knob as an edit, for text of any kind, is
    `HeadScale(f"blocks.{block}.attn.z", {head: factor})`.

    Raises:
        InputError: no factors. SiteError: a head that does not exist.
    """
    if not factors:
        raise InputError("no factor was given; give at least one, e.g. (0, 1, 2)")
    model.resolve(f"blocks.{block}.attn.z[head={head}]")
    start, tail = split_at(model, f"blocks.{block}.attn.z")
    state = start(dict(pairs.clean))
    judge = Metric.of(metric, pairs, pairs.last_logits(model))
    points = []
    for factor in factors:
        z = state.activation.clone()
        z[:, :, head] *= factor
        found = judge.whole(tail(state, z).logits[:, -1].float()).double().cpu().numpy()
        points.append(KnobPoint(float(factor), float(found.mean()), *bootstrap_mean(found, seed=seed)))
    return points


def _column_order(name: str) -> tuple[int, int, str]:
    if name.lstrip("-").isdigit():
        return (0, int(name), "")
    return (1, {"changed": 0, "last": 2, "attention": 3, "MLP": 4}.get(name, 1), name)


def _colour(limit: float, title: str | None) -> Any:
    import altair as alt

    scale = alt.Scale(scheme="redblue", domain=[-limit, limit], domainMid=0)
    return alt.Color(
        "effect:Q", scale=scale, legend=alt.Legend(title=title, format="+.2f") if title else None
    )
