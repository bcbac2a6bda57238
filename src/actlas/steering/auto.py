"""Layer and strength without guessing: the most effect for a given price.

    chosen = auto(model, contrast, {d.site: d for d in directions}, budget=0.1)
    edit = chosen.edit                       # strength 1 is the automatic strength

For a small strength s the effect grows like s and the price like s^2, so `effect * sqrt(budget / price)`,
from one run of a site at a small strength, says what the site will do at the budget. The most promising
sites are then searched on their measured KL (`strength.search`), and the one with the largest measured
effect within the budget is taken. Effect and price come from the same runs, which begin at the edited
block (`price.Suffix`).

Controls: random directions of equal length, and the same direction backwards, at the same strength.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.direction import Direction
from actlas.core.edit import Edit
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.measure.statistics import mean_measurement, paired_difference, rate_measurement
from actlas.steering.price import Array, PairSuffix, Suffix
from actlas.steering.strength import BUDGET, check_budget, level_of, search

if TYPE_CHECKING:
    from actlas.core.contrast import Contrast
    from actlas.core.model import Model

SHARE = 0.95
_PAIRS = 32  # pairs on which layer and strength are chosen
_SCREEN = 8  # pairs on which layers are screened
_FINALISTS = 2
_FIRST = 0.05  # strength of the first run, in median residual norms
_RANDOM = 3


@dataclass(frozen=True)
class Chosen:
    """A direction with its automatic strength.

    Attributes:
        site, direction: the direction that was taken.
        strength: factor of `direction.vector` (raw).
        edit: the edit whose strength 1 is the automatic strength.
        effect: change of preference per token on `contrast` (or `test`), nats.
        price: KL per token of their texts, nats.
        within: share of those texts that stay within the budget.
        measurements: these and the controls (random directions of equal length, sign flipped).
        curve: rows `strength, resid, effect, price, series` for a plot; see `steering.curve`.
        screened: rows `site, effect` with the effect that was expected at the budget.
    """

    site: str
    direction: Direction
    strength: float
    edit: Edit
    effect: Measurement
    price: Measurement
    within: Measurement
    measurements: tuple[Measurement, ...]
    curve: tuple[Mapping[str, Any], ...]
    screened: tuple[Mapping[str, Any], ...]
    budget: float
    note: str = ""


Make = Callable[[Direction], Edit]


def auto(
    model: Model,
    contrast: Contrast,
    directions: Mapping[str, Direction],
    *,
    budget: float = BUDGET,
    texts: Sequence[str] | None = None,
    test: Contrast | None = None,
    make: Make | None = None,
    share: float = SHARE,
    random: int = _RANDOM,
    seed: int = 0,
) -> Chosen:
    """Choose the site and the strength with the most effect at a price within the budget.

    Args:
        model: a causal language model.
        contrast: pairs to choose on (a pair counts as one prompt when the share is held).
        directions: one direction a site, fitted beforehand.
        budget: KL per token, nats.
        texts: texts to price on instead of the contrast's own.
        test: held-out pairs to report on; the pairs of the choice (and a note) if missing.
        make: direction -> edit of strength 1; adds the vector if missing.
        share: of texts that must stay within the budget.
        random: how many random directions are run as controls.
        seed: of the pairs that are drawn and of the random directions.

    Raises:
        InputError: no directions, a budget that is not positive, or no direction changes the output.
    """
    check_budget(budget, share)
    if not directions:
        raise InputError("there are no directions to choose from; give at least one")
    make = make or (lambda direction: direction.edit())
    pairs = _some(contrast, _PAIRS, seed)
    screened = _screen(model, _some(contrast, _SCREEN, seed), directions, make, budget)
    best: tuple[float, str, float] | None = None
    curves: dict[str, list[dict[str, Any]]] = {}
    notes: list[str] = []
    for row in screened[:_FINALISTS]:
        name, direction = row["site"], directions[row["site"]]
        edit = make(direction)
        run = PairSuffix(model, edit, pairs)
        other = None if texts is None else Suffix(model, edit, texts)
        seen: dict[float, tuple[Array, Array]] = {}

        def cost(s: float) -> Array:
            seen[s] = run.effect(edit * s)  # noqa: B023
            return seen[s][1] if other is None else other.outcome(edit * s).kl  # noqa: B023

        groups = list(range(len(pairs))) * 2 if texts is None else None
        found = search(cost, budget, level_of(share, groups), start=row["strength"], what=edit.describe())
        effect = float(seen[found.value][0].mean())
        curves[name] = [_point(direction, s, *seen[s]) for s in sorted(seen)]
        if best is None or effect > best[0]:
            best = (effect, name, found.value)
            notes = [found.note] if found.note else []
    assert best is not None
    _, site, strength = best
    direction = directions[site]
    if test is None:
        notes.append("measured on the pairs that the strength was chosen on")
    measured = report(
        model, test or contrast, direction, strength, budget=budget, make=make, random=random, seed=seed
    )
    by_name = {m.name: m for m in measured if not m.group}
    return Chosen(
        site=site,
        direction=direction,
        strength=strength,
        edit=make(direction) * strength,
        effect=by_name["steering-effect"],
        price=by_name["kl-per-token"],
        within=by_name["within-budget"],
        measurements=tuple(measured),
        curve=tuple(curves[site]),
        screened=tuple(screened),
        budget=budget,
        note="; ".join(notes),
    )


def report(
    model: Model,
    contrast: Contrast,
    direction: Direction,
    strength: float,
    *,
    budget: float = BUDGET,
    make: Make | None = None,
    random: int = _RANDOM,
    others: Mapping[str, Direction] | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """Return effect and price of a direction on pairs, with its controls.

    Args:
        model, contrast, direction, make, budget, seed: see `auto`.
        strength: factor of the direction's vector.
        random: how many random directions of equal length.
        others: further controls by name (e.g. the direction of shuffled labels), scaled to the same length.

    Returns:
        `steering-effect`, `kl-per-token` and `within-budget` of the direction (no group); the first two for
        each control (`group["control"]`: `"random"`, `"flipped"`, and the names of `others`); and
        `effect-over-random`, the effect minus that of the random directions on the same pairs.
    """
    make = make or (lambda d: d.edit())
    run = PairSuffix(model, make(direction), contrast)
    effect, kl = run.effect(make(direction) * strength)
    found = [
        _effect(effect, seed),
        _price(kl, seed),
        rate_measurement(
            "within-budget", kl <= budget, seed=seed, better="higher",
            note=f"texts whose KL per token is at most {budget:g} nats",
            details={"worst": float(kl.max()), "budget": budget},
        ),
    ]  # fmt: skip
    controls = {"flipped": [direction.flipped()]}
    if random:
        controls = {"random": [direction.random(seed + 1 + i) for i in range(random)], **controls}
    controls |= {name: [_as_long(d, direction)] for name, d in (others or {}).items()}
    for name, members in controls.items():
        runs = [run.effect(make(d) * strength) for d in members]
        mean, cost = np.mean([r[0] for r in runs], axis=0), np.mean([r[1] for r in runs], axis=0)
        found += [_effect(mean, seed, control=name), _price(cost, seed, control=name)]
        if name == "random":
            gap = paired_difference(mean, effect, seed=seed)
            found.append(
                Measurement(
                    "effect-over-random", gap.value, "nats/token", gap.n, gap.low, gap.high,
                    "paired bootstrap over pairs", seed, better="higher",
                    note=f"against the mean of {random} random directions of equal length",
                )
            )  # fmt: skip
    return found


def _screen(
    model: Model, pairs: Contrast, directions: Mapping[str, Direction], make: Make, budget: float
) -> list[dict[str, Any]]:
    """Return each site with the effect that is expected at the budget, the most promising first."""
    if len(directions) == 1:
        ((name, direction),) = directions.items()
        return [{"site": name, "effect": None, "strength": _FIRST * direction.reference / direction.norm}]
    rows: list[dict[str, Any]] = []
    for name, direction in directions.items():
        edit, s = make(direction), _FIRST * direction.reference / direction.norm
        run = PairSuffix(model, edit, pairs)
        for _ in range(3):
            try:
                effect, kl = run.effect(edit * s)
            except NonFiniteError:
                s /= 8
                continue
            mean = float(kl.mean())
            if budget / 40 < mean < budget:
                break
            s *= min(max((budget / 4 / mean) ** 0.5, 1 / 32), 32) if mean > 0 else 32
        else:
            effect, kl = run.effect(edit * s)
            mean = float(kl.mean())
        if mean > 0:
            factor = (budget / mean) ** 0.5
            rows.append({"site": name, "effect": float(effect.mean()) * factor, "strength": s * factor})
    if not rows:
        raise InputError(f"none of the {len(directions)} directions changes the model's output")
    return sorted(rows, key=lambda row: -row["effect"])


def _some(contrast: Contrast, most: int, seed: int) -> Contrast:
    if len(contrast) <= most:
        return contrast
    chosen = np.random.default_rng(seed).permutation(len(contrast))[:most]
    return contrast.at(sorted(int(i) for i in chosen))


def _point(direction: Direction, strength: float, effect: Array, kl: Array) -> dict[str, Any]:
    return {
        "strength": strength,
        "resid": strength * direction.norm / direction.reference,
        "effect": float(effect.mean()),
        "price": float(kl.mean()),
        "series": direction.method or "direction",
    }


def _as_long(other: Direction, like: Direction) -> Direction:
    from dataclasses import replace

    return replace(other, vector=other.vector / other.norm * like.norm, measurements=())


def _effect(values: Array, seed: int, **group: str) -> Measurement:
    return mean_measurement(
        "steering-effect", "nats/token", values, seed=seed, over="pairs", better="higher", group=group,
        note="change of log p(positive) - log p(negative) per token",
    )  # fmt: skip


def _price(values: Array, seed: int, **group: str) -> Measurement:
    return mean_measurement(
        "kl-per-token", "nats/token", values, seed=seed, over="texts", better="lower", group=group,
        note="KL(plain || edited)",
    )  # fmt: skip
