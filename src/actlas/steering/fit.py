"""`actlas fit steer`: from pairs of texts to an edit that steers, with its layer, strength and price.

    edit = fit_steer(model, pairs)                       # everything chosen and measured
    with model.edit(edit * 1.5): ...

The pairs are split. On one part a direction is fitted at each candidate layer, and layer and strength are
chosen: the most change of preference that keeps the KL divergence from the plain model within a budget.
The other part says what came of it, beside random directions of equal length, the direction backwards, and
a direction fitted in the same way to pairs whose sides were swapped at random; and prose says what the edit
costs on text that it is not meant for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actlas.core.contrast import Contrast, Where
from actlas.core.direction import Direction, Unit
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.core.methods import method as registered
from actlas.measure.samples import mean_measurement, rate_measurement
from actlas.steering.applying import Application, Apply, layer_weights, several
from actlas.steering.auto import auto, report
from actlas.steering.directions import fit_direction, fit_directions
from actlas.steering.fits import find_fit
from actlas.steering.preparing import candidate_layers, fitted, openings
from actlas.steering.price import PairSuffix, price
from actlas.steering.strength import BUDGET, kl_budget

if TYPE_CHECKING:
    from actlas.core.model import Model

__all__ = ["fit_direction", "fit_directions", "fit_steer"]
_LEAST_PAIRS = 4


@registered(
    "steer",
    room="steering",
    returns="Edit",
    data="pairs",
    summary="a steering vector from pairs of texts; layer and strength chosen for a price, with controls",
    example="actlas fit steer smollm2 sentiment --method mean_diff -o vec/",
    papers=("repe-reasoning", "east"),
)
def fit_steer(
    model: Model,
    data: Any,
    site: str | Sequence[str] | None = None,
    *,
    method: str = "mean_diff",
    position: Where = "last",
    budget: float = BUDGET,
    strength: float | Literal["auto"] = "auto",
    unit: Unit = "resid",
    apply: Apply = "add",
    keep_norm: bool = False,
    phase: Literal["prompt", "generated"] | None = None,
    positions: Any = None,
    weights: str | Sequence[float] | Mapping[str, float] | None = None,
    held_out: float = 0.25,
    controls: int = 3,
    seed: int = 0,
    **options: Any,
) -> Edit:
    """Fit a steering edit whose strength 1 is the automatic (or the given) strength.

    Args:
        model: a causal language model.
        data: pairs of a wanted and an unwanted text; anything `Contrast.of` takes.
        site: where; a pattern offers several to choose from. Default: up to 10 layers between a fifth and
            four fifths of the model's depth.
        method: how the direction is fitted; `steering.fits.fits()` lists the ways.
        position: which token stands for a text: `"last"`, `"first"`, a number, `"last3"` or `"mean"`.
        budget: KL per token that the edit may cost, nats.
        strength: `"auto"`, or a number, which then needs no budget.
        unit: what a given strength counts: `"resid"`, median norms of the site, or `"raw"`, displacements.
        apply: `"add"`, `"rotate"`, `"set"` or `"remove"`; see `steering.applying`.
        keep_norm: keep the activations' norms when adding.
        phase, positions: limits, as for `edit.at`.
        weights: edit all sites at once, each with this weight, instead of choosing one: `"equal"`, a
            number a site, or `{site: number}`.
        held_out: share of the pairs that is kept for measuring.
        controls: random directions of equal length to compare with; 0 leaves these out.
        seed: of the split, the controls and the intervals.
        options: of the fit.

    Returns:
        The edit; its `measurements` hold effect, price and controls on held-out pairs.

    Raises:
        InputError: fewer than 4 pairs, unfit pairs, an unknown fit, site or option, a budget or strength
            that is not a positive number.
        ModelError: not a causal language model.
    """
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is a {model.kind}; steering needs a causal language model")
    info = find_fit(method, options)
    application = Application(apply, keep_norm, phase, positions)
    _check_strength(strength)
    contrast = Contrast.of(data)
    if len(contrast) < _LEAST_PAIRS:
        raise InputError(
            f"{len(contrast)} pairs cannot be split into some to fit on and some to measure on; "
            f"give at least {_LEAST_PAIRS}, better 50"
        )
    fit, test = contrast.split(held_out, seed)
    sites = candidate_layers(model) if site is None else site
    directions, shuffled = fitted(model, fit, sites, info, position, options, seed)
    run = _Run(model, application, fit, test, budget, controls, seed)
    if weights is not None:
        edit, found = run.several(directions, layer_weights(weights, directions), strength, unit, shuffled)
    else:
        edit, found = run.one(directions, strength, unit, shuffled)
    return edit.with_measurements(found)


@dataclass(frozen=True)
class _Run:
    """What choosing and measuring have in common."""

    model: Model
    application: Application
    fit: Contrast
    test: Contrast
    budget: float
    controls: int
    seed: int

    @property
    def measured(self) -> Application:
        """How directions are applied while choosing and measuring."""
        return self.application.everywhere()

    def one(
        self, directions: Mapping[str, Direction], strength: Any, unit: Unit, shuffled: Any
    ) -> tuple[Edit, list[Measurement]]:
        """Choose one site (and the strength), and measure it."""
        common: dict[str, Any] = {"budget": self.budget, "make": self.measured, "seed": self.seed}
        about: dict[str, Any] = {"sites tried": list(directions)}
        if strength == "auto":
            chosen = auto(self.model, self.fit, directions, test=self.test, random=self.controls, **common)
            direction, factor, found = chosen.direction, chosen.strength, list(chosen.measurements)
            about |= {"curve": [dict(row) for row in chosen.curve], "choice": chosen.note}
        else:
            direction = self._only(directions, strength)
            factor = self.application.raw(direction, float(strength), unit)
            found = report(self.model, self.test, direction, factor, random=self.controls, **common)
        other = shuffled([direction.site])[direction.site]
        other = replace(other, vector=other.unit * direction.norm)
        effect, kl = PairSuffix(self.model, self.measured(other), self.test).effect(
            self.measured(other) * factor
        )
        control = {"control": "shuffled pairs"}
        found += [self._effect(effect, control), self._price(kl, control)]
        edit = self.application.at(direction, factor)
        about |= {
            "method": direction.method,
            "strength": factor,
            "resid": factor * direction.norm / direction.reference,
            "fitted on": len(self.fit),
            "data": direction.data,
        }
        first = replace(found[0], details={**found[0].details, **about})
        site, prose = {"site": direction.site}, self._prose(self.measured.at(direction, factor))
        return edit, [m.with_group(**site) for m in (first, *found[1:], prose)]

    def several(
        self,
        directions: Mapping[str, Direction],
        weights: Mapping[str, float],
        strength: Any,
        unit: Unit,
        shuffled: Any,
    ) -> tuple[Edit, list[Measurement]]:
        """Edit all sites at once, with one strength for all."""
        whole = several(self.measured, directions, weights)
        if strength == "auto":
            groups = list(range(len(self.fit))) * 2
            factor = float(kl_budget(self.model, whole, self.fit.texts, self.budget, groups=groups))
        elif unit == "raw":
            raise InputError("a strength for several sites counts median norms; use unit='resid'")
        else:
            factor = float(strength)
        run = PairSuffix(self.model, whole, self.test)
        effect, kl = run.effect(whole * factor)
        about = {"weights": dict(weights), "strength": factor, "fitted on": len(self.fit)}
        found = [
            replace(self._effect(effect, {}), details=about),
            self._price(kl, {}),
            rate_measurement(
                "within-budget", kl <= self.budget, seed=self.seed, better="higher",
                note=f"texts whose KL per token is at most {self.budget:g} nats",
            ),
        ]  # fmt: skip
        others = {"shuffled pairs": [shuffled(list(weights))], "flipped": [_each(directions, "flipped")]}
        if self.controls:
            others["random"] = [_each(directions, "random", self.seed + 1 + i) for i in range(self.controls)]
        for name, members in others.items():
            runs = [run.effect(several(self.measured, d, weights) * factor) for d in members]
            found.append(self._effect(np.mean([r[0] for r in runs], axis=0), {"control": name}))
            found.append(self._price(np.mean([r[1] for r in runs], axis=0), {"control": name}))
        sites = {"site": " ".join(weights)}
        edit = several(self.application, directions, weights) * factor
        return edit, [m.with_group(**sites) for m in (*found, self._prose(whole * factor))]

    def _only(self, directions: Mapping[str, Direction], strength: float) -> Direction:
        if len(directions) > 1:
            raise InputError(
                f"strength {strength:g} goes with one site, and there are {len(directions)} to choose from; "
                "name one, or leave strength at 'auto'"
            )
        return next(iter(directions.values()))

    def _prose(self, edit: Edit) -> Measurement:
        """Return what the edit costs on ordinary text."""
        from actlas.data import corpus

        texts = openings(self.model, corpus("prose", seed=self.seed))
        return self._price(price(self.model, edit, texts), {"texts": "prose"})

    def _effect(self, values: Any, group: dict[str, str]) -> Measurement:
        return mean_measurement(
            "steering-effect", "nats/token", values, seed=self.seed, over="pairs", better="higher",
            group=group, note="change of log p(positive) - log p(negative) per token",
        )  # fmt: skip

    def _price(self, values: Any, group: dict[str, str]) -> Measurement:
        return mean_measurement(
            "kl-per-token", "nats/token", values, seed=self.seed, over="texts", better="lower",
            group=group, note="KL(plain || edited)",
        )  # fmt: skip


def _each(directions: Mapping[str, Direction], change: str, *arguments: Any) -> dict[str, Direction]:
    return {name: getattr(d, change)(*arguments) for name, d in directions.items()}


def _check_strength(strength: Any) -> None:
    if strength == "auto":
        return
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < abs(strength) < 1e9:
        raise InputError(f"strength is {strength!r}; it must be 'auto' or a number other than 0, e.g. 0.1")
