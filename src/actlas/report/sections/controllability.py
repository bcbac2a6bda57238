"""How far a few standard directions move the model, and at what price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.report.content import DataUse, Figure, SectionResult, Table, Tile, show_number
from actlas.report.plots import Row, dots, lines
from actlas.report.registry import Context, section

if TYPE_CHECKING:
    from actlas.core.contrast import Contrast
    from actlas.core.model import Model

DIRECTIONS = {
    "sentiment": "praise instead of criticism",
    "true-false": "true instead of false statements",
    "agreement": "right instead of wrong verb forms",
}
"""Tasks whose pairs give the directions, and what the positive side of each is."""
BUDGET = 0.1
_RANDOM = 2
_FRACTIONS = (1.0,)


@dataclass(frozen=True)
class _Turned:
    """One direction with what it did at the budget."""

    name: str
    site: str
    strength: float
    measured: list[Measurement]
    curve: list[dict[str, Any]]


@section("controllability", title="Controllability", order=48, needs=("causal-lm",), cost=1.6)
def controllability(context: Context) -> SectionResult:
    """Fit standard directions from pairs and measure effect per nat of KL on other pairs."""
    model = context.model
    if model.n_blocks is None or model.tokenizer is None:
        raise ModelError(f"{model.name} has no blocks or tokenizer to steer by")
    site = f"blocks.{min(round(0.6 * model.n_blocks), model.n_blocks - 1)}.resid_post"
    prompts = context.budget.task_prompts
    sizes = (min(max(prompts // 5, 8), 64), min(max(prompts // 10, 4), 32))
    turned: list[_Turned] = []
    used: list[DataUse] = []
    notes: list[str] = []
    for name in DIRECTIONS:
        try:
            fit, test = _pairs(model, name, sizes, context.seed)
            turned.append(_turn(model, name, site, fit, test, context.seed))
        except InputError as error:
            notes.append(f"`{name}`: {error}")
            continue
        used.append(DataUse(f"{name} pairs", len(fit) + len(test), "pairs", test.hash))
    if not turned:
        raise ModelError(f"no standard direction could be fitted: {notes[0]}")
    found = [m for t in turned for m in t.measured]
    slopes = {
        m.group["direction"]: m for m in found if m.name == "effect-per-nat" and "control" not in m.group
    }
    random = {m.group["direction"]: m for m in found if m.name == "effect-per-nat" and "control" in m.group}
    best = max(slopes, key=lambda name: slopes[name].value)
    intro = (
        f"At `{site}` a direction is fitted from {sizes[0]} pairs of texts (mean difference of their last "
        f"tokens) and added at every token, as strongly as a KL divergence of {BUDGET:g} nat per token "
        "allows. Effect is by how much the model then prefers the positive text of other pairs, in nats per "
        "token; divided by the price it says how much control a nat buys. Random directions of the same "
        "length are the control."
    )
    rows = [Row.of(m, DIRECTIONS[name], series="direction") for name, m in slopes.items()]
    rows += [Row.of(m, DIRECTIONS[name], series="random") for name, m in random.items()]
    figures = [
        dots(
            "Effect per nat",
            "Change of preference for each nat of KL per token, with 95% intervals.",
            rows, axis="effect per nat of KL", wide=True,
        ),
        _curve(turned),
    ]  # fmt: skip
    table = Table(
        "What a tenth of a nat buys",
        ("direction", "effect", "effect of random", "price", "strength"),
        tuple(_row(t) for t in turned),
        "Strength in median norms of the residual stream; effect and price in nats per token.",
    )
    tile = Tile("Effect per nat of KL", slopes[best], remark=DIRECTIONS[best], rank=47)
    notes.append(
        "`actlas fit steer` fits such a direction from your own pairs, chooses layer and strength, and saves "
        "the edit."
    )
    return SectionResult(intro, found, figures, (table,), notes, [tile], used)


def _pairs(model: Model, name: str, sizes: tuple[int, int], seed: int) -> tuple[Contrast, Contrast]:
    """Return pairs to fit on and pairs to measure on, without shared texts, that fit the context."""
    from actlas.core.contrast import Contrast
    from actlas.data.tasks import pairs, task

    room = model.context_length or 10**6
    wanted = sum(sizes)
    made = pairs(task(name, None, n=3 * wanted, seed=seed))
    fits = [p for p in made if max(_tokens(model, p.positive), _tokens(model, p.negative)) <= room]
    if len(fits) < wanted:
        raise InputError(f"only {len(fits)} of its pairs fit into a context of {room} tokens")
    return Contrast.of(fits[:wanted]).split(sizes[1] / wanted, seed=seed)


def _tokens(model: Model, text: str) -> int:
    return len(model.tokenizer(text)["input_ids"])


def _turn(model: Model, name: str, site: str, fit: Contrast, test: Contrast, seed: int) -> _Turned:
    from actlas.core.contrast import read_contrast
    from actlas.core.direction import Direction
    from actlas.steering.price import PairSuffix
    from actlas.steering.strength import level_of, search

    reading = read_contrast(model, fit, site)[site]
    direction = Direction.of(reading, reading.difference.mean(0), "mean_diff")
    edit = direction.edit()
    run = PairSuffix(model, edit, test)
    seen: dict[float, tuple[Any, Any]] = {0.0: (np.zeros(run.n), np.zeros(2 * run.n))}

    def cost(s: float) -> Any:
        seen[s] = run.effect(edit * s)
        return seen[s][1]

    start = 0.1 * direction.reference / direction.norm
    strength = search(cost, BUDGET, level_of(None), start=start, what=edit.describe()).value
    for part in _FRACTIONS:
        cost(-part * strength)
    effect, kl = seen[strength]
    control = [run.effect(direction.random(seed + 1 + i).edit() * strength) for i in range(_RANDOM)]
    group = {"direction": name}
    found = [
        *_measure(effect, kl, seed, group),
        *_measure(
            np.mean([e for e, _ in control], axis=0),
            np.mean([k for _, k in control], axis=0),
            seed,
            {**group, "control": "random"},
        ),
    ]
    curve = [
        {"strength": s, "effect": float(e.mean()), "price": float(k.mean())} for s, (e, k) in seen.items()
    ]
    resid = strength * direction.norm / direction.reference
    return _Turned(name, site, resid, found, sorted(curve, key=lambda row: row["strength"]))


def _measure(effect: Any, kl: Any, seed: int, group: dict[str, str]) -> list[Measurement]:
    """Return effect, price and effect per nat; an interval draws whole pairs."""
    from actlas.measure.statistics import bootstrap_ratio, mean_measurement

    n = len(effect)
    per_pair = (kl[:n] + kl[n:]) / 2
    price = float(per_pair.mean())
    low, high = bootstrap_ratio(effect, per_pair, seed=seed)
    shared: dict[str, Any] = {"seed": seed, "over": "pairs", "group": group}
    return [
        mean_measurement("steering-effect", "nats/token", effect, better="higher", **shared),
        mean_measurement("kl-per-token", "nats/token", per_pair, better="lower", **shared),
        Measurement(
            "effect-per-nat", float(effect.mean()) / price, "nats/nat", n, low, high, "bootstrap over pairs",
            seed, group=group, better="higher", note=f"at a price of {price:.3g} nats per token",
        ),
    ]  # fmt: skip


def _curve(turned: list[_Turned]) -> Figure:
    series: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for t in turned:
        for way, sign in (("", 1), (", backwards", -1)):
            points = [(r["price"], r["effect"], None, None) for r in t.curve if sign * r["strength"] >= 0]
            series[f"{t.name}{way}"] = sorted(points)
    return lines(
        "Effect against price",
        "What each direction does at several strengths, against what it costs; up is towards the positive "
        "side. A line that rises steeply at the left buys much control for little.",
        series,
        x="KL per token, nats",
        y="change of preference, nats per token",
        wide=True,
    )


def _row(t: _Turned) -> tuple[str, ...]:
    def value(name: str, *, control: bool) -> str:
        m = next(m for m in t.measured if m.name == name and ("control" in m.group) is control)
        return show_number(m.value)

    return (
        DIRECTIONS[t.name],
        value("steering-effect", control=False),
        value("steering-effect", control=True),
        value("kl-per-token", control=False),
        f"{t.strength:.3f}",
    )
