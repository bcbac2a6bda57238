"""Effect against price, strength by strength, for a direction and its controls.

    rows = effect_curve(model, contrast, direction, strengths=(-2, -1, -0.5, 0.5, 1, 2))
    save_plot(rows, "curve.html")            # or .json (Vega-Lite), .svg, .png

Every row has `series, strength, resid, effect, effect_low, effect_high, price`: what a strength buys, and
what it costs in KL per token. The random directions are as long as the direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actlas.core.direction import Direction
from actlas.core.edit import Edit
from actlas.core.errors import InputError, NonFiniteError
from actlas.measure.statistics import mean_measurement
from actlas.steering.price import PairSuffix

if TYPE_CHECKING:
    from actlas.core.contrast import Contrast
    from actlas.core.model import Model

SUFFIXES = (".html", ".json", ".svg", ".png")


def effect_curve(
    model: Model,
    contrast: Contrast,
    direction: Direction,
    strengths: Sequence[float],
    *,
    random: int = 1,
    make: Callable[[Direction], Edit] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return effect and price at each strength, of the direction and of random directions.

    Args:
        model, contrast: a causal language model and the pairs to measure on.
        direction: the direction; strengths multiply its vector.
        strengths: negative ones go the other way.
        random: how many random directions of equal length.
        make: direction -> edit of strength 1.
        seed: of the random directions and the bootstrap.

    Returns:
        Rows in order; strengths at which the logits are not finite are left out.

    Raises:
        InputError: no strengths, or none with finite logits.
    """
    if not strengths:
        raise InputError("an effect curve needs at least one strength; there is none")
    make = make or (lambda d: d.edit())
    members = [(direction.method or "direction", direction)]
    members += [(f"random {i + 1}", direction.random(seed + 1 + i)) for i in range(random)]
    run = PairSuffix(model, make(direction), contrast)
    rows: list[dict[str, Any]] = []
    for name, member in members:
        edit = make(member)
        for s in sorted(strengths):
            try:
                effect, kl = run.effect(edit * s)
            except NonFiniteError:
                continue
            m = mean_measurement("effect", "nats/token", effect, seed=seed, over="pairs")
            rows.append(
                {
                    "series": name,
                    "strength": float(s),
                    "resid": float(s) * direction.norm / direction.reference,
                    "effect": m.value,
                    "effect_low": m.low,
                    "effect_high": m.high,
                    "price": float(kl.mean()),
                }
            )
    if not rows:
        raise InputError(
            f"the logits are not finite at any of the strengths {list(strengths)}; use smaller ones"
        )
    return rows


def curve_chart(rows: Sequence[Mapping[str, Any]], title: str = "Effect against price") -> Any:
    """Return an Altair chart of curve rows: price on x, effect on y, one line a series and sign.

    Raises:
        InputError: no rows.
    """
    import altair as alt

    if not rows:
        raise InputError("there is nothing to plot; give rows of effect_curve")
    values = []
    for row in rows:
        way = "" if row["strength"] >= 0 else ", backwards"
        values.append({"effect_low": None, "effect_high": None, **row, "line": f"{row['series']}{way}"})
    values += [
        {
            **row,
            "strength": 0.0,
            "resid": 0.0,
            "effect": 0.0,
            "effect_low": 0.0,
            "effect_high": 0.0,
            "price": 0.0,
        }
        for row in {v["line"]: v for v in values}.values()
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("price:Q", title="price: KL per token, nats"),
        color=alt.Color("line:N", title=None, sort=list(dict.fromkeys(v["line"] for v in values))),
    )
    said = "effect: change of preference, nats per token"
    y = alt.Y("effect:Q", title=said)
    tips = [alt.Tooltip(f"{k}:Q", format=".3~g") for k in ("strength", "resid", "effect", "price")]
    order = alt.Order("price:Q")
    line = base.mark_line(strokeWidth=2).encode(y=y, order=order)
    dots = base.mark_point(filled=True, size=36).encode(y=y, tooltip=[alt.Tooltip("line:N"), *tips])
    bars = base.mark_rule(opacity=0.4).encode(y=alt.Y("effect_low:Q", title=said), y2="effect_high:Q")
    return alt.layer(line, bars, dots).properties(title=title, width=460, height=280)


def save_plot(
    rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "Effect against price"
) -> Path:
    """Write the plot of curve rows: `.html`, `.json` (Vega-Lite), `.svg` or `.png`.

    Raises:
        InputError: another kind of file.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path.name} is none of {', '.join(SUFFIXES)}; a plot is saved as one of these")
    curve_chart(rows, title).save(str(path), inline=path.suffix.lower() == ".html")
    return path
