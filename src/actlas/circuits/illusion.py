"""The illusion test: does a subspace patch work because the variable is there, or by a dormant pathway?

A direction that was found by optimising a patch can mix a component that nothing reads, but that differs
between prompts, with a component that is read, but is normally silent: the first measures which prompt it
is, the second pushes the output. The patch succeeds, and the direction is not where the variable lives.

    v = v_row + v_null          v_row in the row space of what reads the site (`circuits.readers`)
    patch along v | v_row | v_null | the whole activation | random directions
    effect of a patch:  FLDD = 1 - LD_patched / LD_clean   (mean logit differences)

* Share of the parts: (effect(v_row) + effect(v_null)) / effect(v). Where the variable is, each part measures
  and pushes by itself and the two add up; in the illusion neither does what both do together. If the readers
  are all that reads the site, as for an MLP, effect(v_null) is exactly 0 and this is effect(v_row) /
  effect(v), the paper's comparison; if they are a few of many, v_null may be read by others.
* Dormant share (for neurons): the part of the effect, to first order g_j dx_j, that goes through neurons
  whose natural difference between the prompts is less than half of what the patch does to them.
* Natural share: how much of the change that the patch makes in the readable space the prompts make too,
  sum <P d, P dx> / sum |P dx|^2 with d the natural and dx the patched difference.

Verdict (fixed): "no effect" if the patch does no more than random directions do on average; "illusion" if
the share of the parts lies below 80% or the dormant share above 50%; "faithful" if the share of the parts
lies above 80% and the dormant share does not lie above 50%; "undecided" where the interval covers the
boundary, or where the readers see every direction, so that nothing can hide.

Source: Makelov, Lange and Nanda 2023, sections 2 to 5; the patch along v_row is along its unit vector (the
norm cancels), as in the paper's table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actlas.circuits.readers import Readers
from actlas.circuits.subspace import interchange, orthonormal
from actlas.core.errors import InputError, ShapeError
from actlas.core.intervals import Array, bootstrap_ratio
from actlas.core.measurement import Measurement
from actlas.measure.samples import rate_measurement

Verdict = Literal["illusion", "faithful", "no effect", "undecided"]
EFFECT, ACCURACY = "fractional logit difference decrease", "interchange accuracy"
PARTS, DORMANT, NATURAL = "share of the parts", "dormant share of the effect", "natural share"
READABLE, GAP = "readable share of the effect", "effect of the whole minus the subspace"
ENOUGH, TOO_MUCH = 0.8, 0.5


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run of all prompts gave: `metric` float64 `[n]` (a logit difference), `hits` bool `[n]`."""

    metric: Tensor
    hits: Tensor | None = None


Run = Callable[[Tensor], Outcome]


@dataclass(frozen=True)
class IllusionReport:
    """The parts of a subspace patch, measured, and what follows.

    Attributes:
        verdict: see the module docstring.
        said: the verdict in one sentence with its numbers.
        measurements: effects, accuracies, norms and shares, by `group["part"]`.
        readers: what reads the site.
    """

    verdict: Verdict
    said: str
    measurements: tuple[Measurement, ...]
    readers: tuple[str, ...]

    def effect(self, part: str) -> Measurement:
        """Return the effect of `"subspace"`, `"readable"`, `"unreadable"`, `"whole"` or `"random"`."""
        return self.get(EFFECT, part)

    def get(self, name: str, part: str = "") -> Measurement:
        """Return one measurement.

        Raises:
            InputError: there is none of that name and part.
        """
        for m in self.measurements:
            if m.name == name and (not part or m.group.get("part") == part):
                return m
        raise InputError(f"this report has no {name!r}{f' of the {part} part' if part else ''}")

    def __str__(self) -> str:
        return "\n".join([f"{self.verdict}: {self.said}", *map(str, self.measurements)])


def illusion_test(
    run: Run,
    base: Tensor,
    source: Tensor,
    directions: Tensor,
    readers: Readers,
    *,
    scale: Tensor | None = None,
    neurons: bool = True,
    controls: int = 5,
    seed: int = 0,
    group: Mapping[str, str] | None = None,
) -> IllusionReport:
    """Test a subspace at one site of anything that can be run.

    Args:
        run: activations `[n, d]` -> Outcome; it must be differentiable if `neurons`.
        base, source: `[n, d]`, activations of the prompts and of the prompts that are patched in.
        directions: `[d]` or `[r, d]`.
        readers: what reads the site.
        scale: `[n]`, the change of the metric that counts as 1; `None`: the clean metric, so that the
            effect is the fractional logit difference decrease.
        neurons: whether the site's channels are neurons (`mlp.act`), which makes the dormant share mean
            something; a residual stream has no such basis.
        controls: how many random subspaces of equal rank.
        seed: of random subspaces and intervals.
        group: labels for the measurements.

    Raises:
        InputError: fewer than two prompts, source and base are the same, or the clean metric is 0.
        ShapeError: shapes that do not fit.
    """
    _check(base, source, directions)
    rows = directions.reshape(-1, directions.shape[-1]).double()
    basis = orthonormal(rows)
    seen, unseen = readers.split(basis.T)
    test = _Test(run, base, source, scale, dict(group or {}), seed)
    parts: dict[str, Tensor | None] = {
        "subspace": rows,
        "readable": _part(seen),
        "unreadable": _part(unseen),
        "whole": torch.eye(base.shape[1], dtype=torch.float64),
    }
    effects, found = {}, []
    for name, part in parts.items():
        effects[name] = test.effect(part, whole=name == "whole")
        found += test.measurements(name, effects[name])
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(rows.shape, generator=generator, dtype=torch.float64) for _ in range(controls)]
    random = [test.effect(r) for r in drawn]
    if random:
        found.append(test.random(random))
        lengths = np.array([float(readers.split(r)[0].norm() / r.norm()) for r in drawn])
        found.append(test.plain("norm of the part", float(lengths.mean()), "random, readable"))
    for name, part in (("readable", seen), ("unreadable", unseen)):
        found.append(test.plain("norm of the part", float(part.norm() / math.sqrt(len(rows))), name))
    apart = effects["readable"][0] + effects["unreadable"][0]
    share = test.ratio(PARTS, apart, effects["subspace"][0])
    found.append(test.ratio(READABLE, effects["readable"][0], effects["subspace"][0]))
    found.append(test.ratio(GAP, effects["whole"][0] - effects["subspace"][0], test.scale))
    dormant = test.dormant(rows) if neurons else None
    found += [share, test.natural(rows, readers), *([dormant] if dormant is not None else [])]
    chance = float(np.mean([e[0].mean() / test.scale.mean() for e in random])) if random else 0.0
    verdict, said = _judge(test, effects, share, dormant, chance, readers)
    found = [m for m in found if m.name != PARTS] + [_noted(share, f"{verdict}: {said}")]
    return IllusionReport(verdict, said, tuple(found), readers.names)


class _Test:
    """Runs the patches of one test and turns them into measurements."""

    def __init__(
        self,
        run: Run,
        base: Tensor,
        source: Tensor,
        scale: Tensor | None,
        group: dict[str, str],
        seed: int,
    ) -> None:
        self.run, self.base, self.source, self.group, self.seed = run, base, source, group, seed
        self.clean = run(base)
        self.scale: Array = _array(self.clean.metric if scale is None else scale)
        if abs(self.scale.mean()) < 1e-9:
            raise InputError("the metric of the unpatched prompts is 0 on average; nothing can decrease")

    def effect(self, part: Tensor | None, whole: bool = False) -> tuple[Array, Array | None]:
        """Return each prompt's change of the metric and whether the patched run gives the other answer."""
        if part is None:  # no such component: the patch does nothing
            outcome = self.clean
        else:
            outcome = self.run(self.source if whole else interchange(self.base, self.source, part))
        change = _array(self.clean.metric) - _array(outcome.metric)
        return change, None if outcome.hits is None else _array(outcome.hits)

    def measurements(self, part: str, effect: tuple[Array, Array | None]) -> list[Measurement]:
        change, hits = effect
        out = [self.ratio(EFFECT, change, self.scale, part)]
        if hits is not None:
            out.append(rate_measurement(ACCURACY, hits, seed=self.seed, group={**self.group, "part": part}))
        return out

    def ratio(self, name: str, top: Array, bottom: Array, part: str = "") -> Measurement:
        """Return mean(top) / mean(bottom) with a bootstrap over prompts."""
        n, below = len(top), float(bottom.mean())
        group = {**self.group, **({"part": part} if part else {})}
        if abs(below) < 1e-9:
            return Measurement(name, math.nan, "fraction", 0, group=group, note="the patch has no effect")
        low, high = bootstrap_ratio(top, bottom, seed=self.seed)
        least, most = (None, None) if math.isnan(low) else (low, high)
        how, value = "bootstrap over prompts", float(top.mean()) / below
        return Measurement(name, value, "fraction", n, least, most, how, self.seed, group=group)

    def random(self, effects: list[tuple[Array, Array | None]]) -> Measurement:
        """Return the mean effect of the random subspaces; prompts are drawn for all of them together."""
        mean = np.mean([change for change, _ in effects], axis=0)
        made = self.ratio(EFFECT, mean, self.scale, "random")
        each = [float(change.mean() / self.scale.mean()) for change, _ in effects]
        return _noted(made, f"mean of {len(effects)} random subspaces of equal rank", each=each)

    def natural(self, rows: Tensor, readers: Readers) -> Measurement:
        natural = (self.source - self.base).double()
        patched = (interchange(self.base.double(), self.source.double(), rows) - self.base).double()
        a, b = readers.split(natural)[0], readers.split(patched)[0]
        return self.ratio(NATURAL, _array((a * b).sum(1)), _array((b * b).sum(1)))

    def dormant(self, rows: Tensor) -> Measurement:
        """Return the share of the first-order effect through neurons that hardly differ by themselves."""
        x = self.base.detach().clone().requires_grad_()
        with torch.enable_grad():
            metric = self.run(x).metric
            gradient = torch.autograd.grad(metric.sum(), x)[0].detach().double()
        natural = (self.source - self.base).double()
        patched = interchange(self.base.double(), self.source.double(), rows) - self.base.double()
        silent = natural.square().mean(0).sqrt() < 0.5 * patched.square().mean(0).sqrt()
        through = -(gradient * patched)
        made = self.ratio(DORMANT, _array(through[:, silent].sum(1)), _array(through.sum(1)))
        return _noted(made, f"{int(silent.sum())} of {len(silent)} channels are dormant")

    def plain(self, name: str, value: float, part: str) -> Measurement:
        return Measurement(name, value, "fraction", 1, group={**self.group, "part": part})


def _judge(
    test: _Test,
    effects: Mapping[str, tuple[Array, Array | None]],
    share: Measurement,
    dormant: Measurement | None,
    random: float,
    readers: Readers,
) -> tuple[Verdict, str]:
    change = effects["subspace"][0]
    effect = test.ratio(EFFECT, change, test.scale)
    low = effect.value if effect.low is None else effect.low
    whole = float(effects["whole"][0].mean() / test.scale.mean())
    said = f"the patch has an effect of {effect.value:.0%}, its two parts alone {share.value:.0%} of it"
    said += f", the whole activation an effect of {whole:.0%}"
    if not low > max(random, 0.0):
        return "no effect", f"{said}; random directions do as much"
    silent = dormant is not None and dormant.value > TOO_MUCH
    if dormant is not None:
        said += f", and {dormant.value:.0%} of it goes through neurons that are silent otherwise"
    least = share.value if share.low is None else share.low
    most = share.value if share.high is None else share.high
    if most < ENOUGH or silent:
        return "illusion", said
    if readers.hidden == 0:
        return "undecided", f"{said}; these readers see every direction, so nothing could hide: name a few"
    return ("faithful" if least >= ENOUGH - 1e-9 else "undecided"), said


def _part(rows: Tensor) -> Tensor | None:
    """Return an orthonormal basis `[r, d]` of the span of some components, or `None` if they vanish."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = basis[values > 1e-6]
    return kept if len(kept) else None


def _check(base: Tensor, source: Tensor, directions: Tensor) -> None:
    if base.ndim != 2 or base.shape != source.shape:
        raise ShapeError(
            f"base and source are {list(base.shape)} and {list(source.shape)}; both must be [n, d]"
        )
    if directions.shape[-1] != base.shape[1]:
        raise ShapeError(f"directions have {directions.shape[-1]} channels, the activations {base.shape[1]}")
    if len(base) < 2:
        raise InputError(f"{len(base)} prompt cannot be tested; give at least 2")
    if torch.equal(base, source):
        raise InputError("the prompts of each pair have the same activations here; a patch changes nothing")


def _array(x: Tensor) -> Array:
    out: Array = x.detach().double().cpu().numpy()
    return out


def _noted(m: Measurement, note: str, **details: object) -> Measurement:
    from dataclasses import replace

    return replace(m, note=note, details={**m.details, **details})
