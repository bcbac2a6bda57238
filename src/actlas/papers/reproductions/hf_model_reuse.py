"""hf-model-reuse: what readers of model documentation miss, and whether documentation is there.

Taraghi et al. 2024, "Deep Learning Model Reuse in the HuggingFace Community: Challenges, Benefit and
Trends". The paper codes forum threads by hand and follows uploads and model-card text of a hub over
time. Neither can be done again here, so the verdict is never "holds". What can be tested is the
instrument (does the section detector tell text from template, do the statistics keep their promises)
and, on the handful of model packages that Actlas uses, how much of a model card they carry.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.statistics import mann_kendall, rate_measurement, spearman
from actlas.papers.reproduction import Check, Findings, Measured, reproduction
from actlas.papers.reproductions.model_texts import actlas_cards, package_texts
from actlas.papers.reproductions.report_room import completeness
from actlas.papers.reproductions.synthetic_cards import labelled_cards


def judge(m: Measured) -> list[Check]:
    """The survey and the hub's history cannot be rerun, so their check stays open and the verdict is at
    most "partly". Central: the better text of each third-party package holds less than half of the nine
    sections on average, decided only if the detector is valid (precision and recall of at least 0.95 on 30
    labelled cards and a score of 0 for every unfilled template). Also: generated Actlas cards hold at least
    0.9; Spearman and Mann-Kendall agree with brute force over all orders of up to 8 values (values and
    variance to 1e-9, p to 0.05); and the trend test calls 5% of flat series a trend, within its interval.
    """
    precision, recall = m["section precision"], m["section recall"]
    template = m["greatest score of an unfilled template"]
    valid = precision.value >= 0.95 and recall.value >= 0.95 and template.value == 0
    packages = m.every("completeness", source="package")
    best = _best(packages)
    mean = sum(best.values()) / len(best) if best else math.nan
    listed = ", ".join(f"{name} {value:.2f}" for name, value in best.items()) or "no package could be read"
    cards = m.every("completeness", source="actlas card")
    checks = [
        Check("the survey and the hub's history", None, "cannot be rerun here", central=True),
        Check(
            "packages carry less than half of a card",
            mean < 0.5 if best and valid else None,
            listed,
            central=True,
        ),
        Check(
            "the detector finds sections",
            min(precision.value, recall.value) >= 0.95,
            f"{precision}; {recall}",
        ),
        Check("templates score nothing", template.value == 0, f"{template}"),
        _exact("Spearman's correlation is exact", m["Spearman, greatest error"], 1e-9),
        _exact("Mann-Kendall's S and variance are exact", m["Mann-Kendall, greatest error"], 1e-9),
        _exact("p-values are close to exact ones", m["p-value, greatest error"], 0.05),
    ]
    flat = m["flat series called a trend"]
    fits = flat.low is not None and flat.high is not None and flat.low <= 0.05 <= flat.high
    checks.append(Check("flat series are called a trend in 5% of cases", fits, f"{flat}"))
    filled = [c for c in cards if c.group.get("fill") == "filled in"]
    said = ", ".join(f"{c.group['model']} {c.value:.2f}" for c in filled) or "not made in this run"
    passed = all(c.value >= 0.9 for c in filled) if filled else None
    checks.append(Check("Actlas cards are at least 0.9 complete", passed, said))
    return checks


def _best(packages: list[Measurement]) -> dict[str, float]:
    """The completeness of the better text of each package."""
    best: dict[str, float] = {}
    for p in packages:
        best[p.group["package"]] = max(p.value, best.get(p.group["package"], 0.0))
    return best


def _exact(name: str, error: Measurement, bound: float) -> Check:
    return Check(name, error.value <= bound, f"{error}; at most {bound:g}")


@reproduction(
    "hf-model-reuse",
    claim="Documentation that reaches people who reuse models leaves most of a model card out.",
    judge=judge,
    quick={
        "series": 500,
        "longest": 7,
        "models": ("minilm", "efficientnet-lite0", "smollm2"),
        "cards": ("minilm",),
    },
    full={
        "series": 5000,
        "longest": 8,
        "models": ("minilm", "efficientnet-lite0", "smollm2"),
        "cards": ("minilm", "efficientnet-lite0", "smollm2"),
    },
)
def hf_model_reuse(
    *, seed: int, series: int, longest: int, models: tuple[str, ...], cards: tuple[str, ...]
) -> Findings:
    """Run it.

    Args:
        seed: seed of every random choice.
        series: flat series for the false-positive rate.
        longest: longest series that is checked against every order of its values (8 means 40,320).
        models: bundled models whose packages are audited.
        cards: bundled models that Actlas makes a card of.
    """
    measured = [*detector(seed), *statistics(seed, longest), *flat_series(seed, series)]
    for (wheel, kind), text in package_texts(models).items():
        measured.append(_completeness(text, {"source": "package", "package": wheel, "text": kind}))
    for (name, fill), text in actlas_cards(cards, seed).items():
        measured.append(_completeness(text, {"source": "actlas card", "model": name, "fill": fill}))
    scores = _best(Measured(measured).every("completeness", source="package"))
    found = (
        f"{len(scores)} model packages carry {np.mean(list(scores.values())):.2f} of a card on average"
        if scores
        else "no text read"
    )
    return Findings(measured, headline=f"{found}; the survey itself cannot be rerun", note=NOTE)


NOTE = (
    "Published: 17 kinds of challenges and 6 of benefits coded from forum threads, a correlation of about"
    " 0.70 between forum mentions and uploads of model families, and no growth of model-card text; none "
    "of that can be tested without the forum and the hub. Ours: a handful of packages is an observation, "
    "not evidence about a hub, and presence of a section says nothing about its quality. The detector is "
    "that of the report room; the labelled cards were written without looking at its word lists. The "
    "trend test takes its values as independent: on series with autocorrelation 0.5 it cries wolf far "
    "more often, as the control shows."
)


def detector(seed: int) -> list[Measurement]:
    """Compare the section detector with 30 labelled cards."""
    found, right, wanted, template = 0, 0, 0, []
    missed: set[str] = set()
    with tempfile.TemporaryDirectory() as work:
        for card in labelled_cards(seed):
            share, present, _ = completeness(card.text, Path(work))
            found, right, wanted = (
                found + len(present),
                right + len(card.sections & present),
                wanted + len(card.sections),
            )
            missed |= {f"{section} ({card.kind})" for section in card.sections - present}
            if card.kind == "template only":
                template.append(share)
    note = "30 labelled cards" + ("; missed: " + ", ".join(sorted(missed)) if missed else "")
    outcomes = {"section precision": (right, found), "section recall": (right, wanted)}
    return [
        *(
            rate_measurement(name, np.arange(n) < k, seed=seed, better="higher", note=note)
            for name, (k, n) in outcomes.items()
        ),
        Measurement(
            "greatest score of an unfilled template", max(template), "fraction", len(template), seed=seed
        ),
    ]


def statistics(seed: int, longest: int) -> list[Measurement]:
    """Compare Spearman and Mann-Kendall with brute force over all orders of short series, ties among them."""
    rng = np.random.default_rng(seed)
    rho_error, kendall_error, p_error, cases = 0.0, 0.0, 0.0, 0
    with progress("brute force over orders", longest - 3) as advance:
        for n in range(4, longest + 1):
            orders = np.array(list(itertools.permutations(range(n))))
            for ties in (False, True):
                x = rng.integers(0, 3, n).astype(float) if ties else rng.normal(size=n)
                y = rng.normal(size=n)
                if np.ptp(x) == 0:
                    continue
                rho, s = _brute_spearman(x, y), _brute_s(x)
                trend, correlation = mann_kendall(x), spearman(x, y, resamples=10)
                every_s = np.array([_brute_s(x[o]) for o in orders])
                rho_error = max(rho_error, abs(rho - correlation.value))
                if trend.z:
                    variance = ((trend.s - math.copysign(1, trend.s)) / trend.z) ** 2
                    kendall_error = max(kendall_error, abs(s - trend.s), abs(every_s.var() - variance))
                if n >= 6:
                    exact = float((np.abs(every_s) >= abs(s)).mean())
                    every_rho = np.array([_brute_spearman(x[o], y) for o in orders])
                    exact_rho = float((np.abs(every_rho) >= abs(rho) - 1e-12).mean())
                    p_error = max(p_error, abs(exact - trend.p), abs(exact_rho - correlation.p))
                cases += 1
            advance()
    return [
        Measurement("Spearman, greatest error", rho_error, "correlation", cases, seed=seed, better="lower"),
        Measurement("Mann-Kendall, greatest error", kendall_error, "pairs", cases, seed=seed, better="lower"),
        Measurement(
            "p-value, greatest error",
            p_error,
            "probability",
            cases,
            seed=seed,
            better="lower",
            note="from 6 values on",
        ),
    ]


def _brute_spearman(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """Pearson's correlation of mid-ranks, by counting."""
    a, b = ([sum(u < v for u in w) + (sum(u == v for u in w) + 1) / 2 for v in w] for w in (x, y))
    return float(np.corrcoef(a, b)[0, 1])


def _brute_s(x: np.ndarray[Any, Any]) -> int:
    return sum(int(x[j] > x[i]) - int(x[j] < x[i]) for i in range(len(x)) for j in range(i + 1, len(x)))


def flat_series(seed: int, series: int, length: int = 24) -> list[Measurement]:
    """Return how often the trend test (5%) fires on series without a trend; control: autocorrelated ones."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(series, length))
    drifting = noise.copy()
    for t in range(1, length):
        drifting[:, t] = 0.5 * drifting[:, t - 1] + math.sqrt(0.75) * noise[:, t]
    named: Mapping[str, Any] = {
        "flat series called a trend": noise,
        "flat series called a trend, autocorrelation 0.5": drifting,
    }
    return [
        rate_measurement(
            name, [mann_kendall(x).p < 0.05 for x in values], seed=seed, note=f"{length} values each"
        )
        for name, values in named.items()
    ]


def _completeness(text: bytes, group: Mapping[str, str]) -> Measurement:
    with tempfile.TemporaryDirectory() as work:
        share, present, note = completeness(text, Path(work))
    return Measurement(
        "completeness",
        share,
        "fraction",
        9,
        group=dict(group),
        better="higher",
        note=note,
        details={"present": sorted(present)},
    )
