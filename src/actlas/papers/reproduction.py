"""Reproductions: a claim, a criterion that is fixed before the run, what was measured, a verdict.

A reproduction is one function in `actlas.papers.reproductions` that measures, and one function that
judges. The judge sees only the measurements, so it can be tested on invented numbers, and its
docstring is the text that readers see:

    def judge(m: Measured) -> list[Check]:
        \"\"\"Holds if true skipping loses less than random skipping of as many layers.\"\"\"
        gap = m["true skip minus random skip"]
        return [Check.below("true skip beats random skip", gap, 0.0, central=True)]

    @reproduction("void", claim="...", judge=judge, quick={"windows": 8}, full={"windows": 64})
    def void(*, seed: int, windows: int) -> Findings: ...

The verdict follows from the checks by one rule for all papers (`verdict_of`).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from actlas.core.artifact import atomic_write
from actlas.core.errors import FailureError, InputError, did_you_mean
from actlas.core.measurement import Measurement, format_number
from actlas.papers.catalogue import RESULTS, Paper, forget_stored, paper
from actlas.papers.environment import environment

Verdict = Literal["holds", "partly", "does not hold here", "not testable here"]
RULE = (
    "holds: every check passes; does not hold here: every central check that could be decided fails; "
    "not testable here: no central check could be decided; partly: anything else"
)


@dataclass(frozen=True)
class Check:
    """One question that the measurements answer.

    Attributes:
        name: the question, e.g. `"true skip beats random skip"`.
        passed: the answer; `None` if the run could not decide it (not measured in this mode, or the
            interval covers the boundary).
        said: the numbers behind the answer.
        central: whether the paper's claim stands or falls with it.
    """

    name: str
    passed: bool | None
    said: str
    central: bool = False

    def __post_init__(self) -> None:
        if self.passed is not None:
            object.__setattr__(self, "passed", bool(self.passed))  # numpy's booleans are not JSON-able

    @classmethod
    def above(cls, name: str, value: Measurement | None, bound: float, *, central: bool = False) -> Check:
        """Pass if the whole interval lies above `bound`, fail if it lies below, else leave it open."""
        return cls._side(name, value, bound, central, sign=1)

    @classmethod
    def below(cls, name: str, value: Measurement | None, bound: float, *, central: bool = False) -> Check:
        """Pass if the whole interval lies below `bound`, fail if it lies above, else leave it open."""
        return cls._side(name, value, bound, central, sign=-1)

    @classmethod
    def _side(cls, name: str, value: Measurement | None, bound: float, central: bool, sign: int) -> Check:
        if value is None or value.value != value.value:
            return cls(name, None, "not measured in this run", central)
        low = value.value if value.low is None else value.low
        high = value.value if value.high is None else value.high
        worst, best = (low, high) if sign > 0 else (high, low)
        passed = True if sign * (worst - bound) > 0 else False if sign * (best - bound) < 0 else None
        relation = "above" if sign > 0 else "below"
        said = f"{value}; wanted {relation} {format_number(bound)}"
        return cls(name, passed, said, central)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {"name": self.name, "passed": self.passed, "said": self.said, "central": self.central}


class Measured:
    """Measurements by name and group, for judges: `m["gap"]`, `m.get("loss", mode="skip")`."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self.all = list(measurements)

    def get(self, name: str, **group: str) -> Measurement | None:
        """Return the one measurement of this name whose group has these labels, or `None`.

        Raises:
            InputError: several measurements fit.
        """
        found = self.every(name, **group)
        if len(found) > 1:
            raise InputError(f"{len(found)} measurements are called {name!r} with {group}; name one group")
        return found[0] if found else None

    def every(self, name: str, **group: str) -> list[Measurement]:
        """Return all measurements of this name whose group has these labels."""
        return [m for m in self.all if m.name == name and all(m.group.get(k) == v for k, v in group.items())]

    def __getitem__(self, name: str) -> Measurement:
        found = self.get(name)
        if found is None:
            names = {m.name for m in self.all}
            raise InputError(f"nothing called {name!r} was measured{did_you_mean(name, names)}")
        return found


@dataclass(frozen=True)
class Plot:
    """A small plot of a reproduction, as data: rows and which columns to draw.

    Attributes:
        title: what it shows, in words.
        rows: records.
        x, y: columns.
        color: column that tells series apart, or empty.
        mark: `"line"`, `"point"` or `"bar"`.
        log: axes that are logarithmic: `""`, `"x"`, `"y"` or `"xy"`.
    """

    title: str
    rows: list[dict[str, Any]]
    x: str
    y: str
    color: str = ""
    mark: Literal["line", "point", "bar"] = "line"
    log: str = ""


@dataclass(frozen=True)
class Findings:
    """What a reproduction's run hands back.

    Attributes:
        measured: the measurements, controls among them.
        headline: one line with the number that matters most.
        note: what differs between the published, the official and this setting, and what a reader
            must know to read the numbers.
        plots: small plots.
    """

    measured: list[Measurement]
    headline: str
    note: str
    plots: list[Plot] = field(default_factory=list)


@dataclass(frozen=True)
class Reproduction:
    """One finished reproduction.

    Attributes:
        slug, title: the paper.
        claim: the part of its claim that is tested here.
        criterion: the text of the criterion, fixed in code before the run.
        measured: what was measured, with intervals and controls.
        checks: the criterion's questions and their answers.
        verdict: `holds`, `partly`, `does not hold here` or `not testable here`.
        headline: one line.
        note: published against official against ours.
        settings: the sizes of the run.
        mode: `"quick"` or `"full"`.
        seed: seed of every random choice.
        command: what made it.
        seconds: wall-clock time.
        date: day of the run, ISO.
        environment: versions, processor, threads.
        plots: small plots as data.
    """

    slug: str
    title: str
    claim: str
    criterion: str
    measured: list[Measurement]
    checks: list[Check]
    verdict: Verdict
    headline: str
    note: str
    settings: Mapping[str, Any]
    mode: str
    seed: int
    command: str
    seconds: float
    date: str
    environment: Mapping[str, Any]
    plots: list[Plot] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary that `from_json` reads."""
        out = {k: v for k, v in vars(self).items() if k not in ("measured", "checks", "plots")}
        out["settings"], out["environment"] = dict(self.settings), dict(self.environment)
        out["checks"] = [c.to_json() for c in self.checks]
        out["measured"] = [m.to_json() for m in self.measured]
        out["plots"] = [vars(p) for p in self.plots]
        return out

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Reproduction:
        """Rebuild a reproduction from `to_json`'s dictionary."""
        fields = dict(record)
        fields["measured"] = [Measurement.from_json(m) for m in record["measured"]]
        fields["checks"] = [Check(**c) for c in record["checks"]]
        fields["plots"] = [Plot(**p) for p in record["plots"]]
        return cls(**fields)

    def to_markdown(self) -> str:
        """Return the lab page as Markdown, without plots."""
        from actlas.papers.render import page

        return page(self)

    def __str__(self) -> str:
        from actlas.papers.render import plain

        return plain(self)


Judge = Callable[[Measured], list[Check]]


@dataclass(frozen=True)
class Recipe:
    """A registered reproduction: how to run it and how to judge it."""

    slug: str
    claim: str
    judge: Judge
    run: Callable[..., Findings]
    quick: Mapping[str, Any]
    full: Mapping[str, Any]

    @property
    def criterion(self) -> str:
        """The criterion's text: the judge's docstring on one line."""
        return " ".join((self.judge.__doc__ or "").split())


_recipes: dict[str, Recipe] = {}


def reproduction(
    slug: str, *, claim: str, judge: Judge, quick: Mapping[str, Any], full: Mapping[str, Any]
) -> Callable[[Callable[..., Findings]], Callable[..., Findings]]:
    """Register a function as the reproduction of a paper; it stays directly callable.

    Args:
        slug: the paper.
        claim: what is tested, in one sentence.
        judge: measurements -> checks; its docstring is the criterion that readers see.
        quick, full: the keyword arguments of the function in either mode.

    Raises:
        InputError: an unknown slug, a judge without a docstring, modes with different settings.
    """
    paper(slug)
    if not judge.__doc__:
        raise InputError(f"the judge of {slug!r} has no docstring; the criterion must be written down")
    if set(quick) != set(full):
        raise InputError(f"quick and full mode of {slug!r} differ in {sorted(set(quick) ^ set(full))}")

    def register(run: Callable[..., Findings]) -> Callable[..., Findings]:
        _recipes[slug] = Recipe(slug, claim, judge, run, dict(quick), dict(full))
        return run

    return register


def recipe(slug: str) -> Recipe:
    """Return the registered reproduction of a paper.

    Raises:
        InputError: an unknown paper, or one whose reproduction is only planned.
    """
    which = paper(slug)
    if which.status == "planned":
        raise InputError(
            f"{slug} ({_short(which)}) is planned and has no reproduction yet; "
            "'actlas papers --status reproduced' lists those that can be run"
        )
    importlib.import_module(which.module)
    if slug not in _recipes:
        raise FailureError(f"{which.module} does not register a reproduction of {slug!r}")
    return _recipes[slug]


def reproduce(
    slug: str,
    *,
    quick: bool = True,
    seed: int = 0,
    store: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Reproduction:
    """Run one reproduction and judge it.

    Args:
        slug: the paper, e.g. `"void"`.
        quick: minutes on two cores; `False` runs the full mode.
        seed: seed of every random choice.
        store: write the result to `papers/results/`, where the catalogue and the docs find it.
        settings: other sizes than the mode's, e.g. to try it out; such a run cannot be stored.

    Raises:
        InputError: an unknown or planned paper, an unknown setting, storing a run with other settings.
        FailureError: the result cannot be written.
    """
    which, made = paper(slug), recipe(slug)
    sizes = dict(made.quick if quick else made.full)
    for name in settings or {}:
        if name not in sizes:
            raise InputError(
                f"{slug} has no setting {name!r}{did_you_mean(name, sizes) or '; it has ' + ', '.join(sizes)}"
            )
    if settings and store:
        raise InputError(f"a run of {slug} with settings of its own cannot be stored; leave them out")
    sizes.update(settings or {})
    start = time.perf_counter()
    findings = made.run(seed=seed, **sizes)
    seconds = time.perf_counter() - start
    checks = made.judge(Measured(findings.measured))
    mode = "quick" if quick else "full"
    result = Reproduction(
        slug=slug,
        title=which.title,
        claim=made.claim,
        criterion=made.criterion,
        measured=findings.measured,
        checks=checks,
        verdict=verdict_of(checks),
        headline=findings.headline,
        note=findings.note,
        settings=sizes,
        mode=mode,
        seed=seed,
        command=f"{which.command} --{mode} --seed {seed}{' --store' if store else ''}",
        seconds=round(seconds, 1),
        date=date.today().isoformat(),
        environment=environment(),
        plots=findings.plots,
    )
    if store:
        import json

        text = json.dumps(result.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        atomic_write(RESULTS / f"{slug}.json", text)
        forget_stored()
    return result


def stored(slug: str) -> Reproduction | None:
    """Return the stored result of a paper, or `None`."""
    record = paper(slug).stored
    return None if record is None else Reproduction.from_json(record)


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """Return the verdict that follows from the checks (`RULE`).

    Raises:
        InputError: no check is central, so nothing decides the claim.
    """
    checks = list(checks)
    central = [c.passed for c in checks if c.central]
    if not central:
        raise InputError("no check of this criterion is central; mark those that the claim stands on")
    decided = [p for p in central if p is not None]
    if not decided:
        return "not testable here"
    if not any(decided):
        return "does not hold here"
    return "holds" if all(c.passed for c in checks) else "partly"


def _short(which: Paper) -> str:
    return which.title if len(which.title) <= 70 else which.title[:67].rstrip() + "..."
