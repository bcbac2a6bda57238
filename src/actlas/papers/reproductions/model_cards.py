"""model-cards: averages hide group failures; evaluation by group and intersection shows them.

Mitchell et al. 2019, "Model Cards for Model Reporting". The paper proposes a document and reports no
benchmark, so what is tested is the reason for it, with Actlas' own cards (`actlas.report`): a failure is
planted in one intersection of two factors, and the largest-gap line of the evaluation must name it. Beside
that, the arithmetic that every table by group rests on, the coverage of its intervals, and an edit of a
language model whose average effect differs from its effect on each kind of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.intervals import divide, resample_counts
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.statistics import (
    bootstrap_mean,
    mean_measurement,
    percentiles,
    rate_measurement,
    wilson,
)
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.planted_cell import THICKNESS, Digits, draw_digits, predictions
from actlas.papers.reproductions.report_room import public, reads_back

if TYPE_CHECKING:
    from torch import Tensor

    from actlas.core.model import Model
    from actlas.data.documents import Corpus

PLANTED = (1, "thick")
SITE = "blocks.14.resid_post"
TOWARDS = "towards code"
FAILS = 0.2


def judge(m: Measured) -> list[Check]:
    """Central: with a cell planted, the largest-gap line names it (p < 0.05 after Holm's correction) in at
    least 90% of the seeds; and with the cells shuffled among the images, so that no group differs, it calls
    a gap more than chance in 5% of them, within the interval. Also: without planting, the line names that
    cell in at most 10% of the seeds; the planted cell costs less than 2 points of overall accuracy but has
    at least 3 times the overall error; all identities (counts, weighted means, error rates, a card read
    back from Markdown) are exact; intervals cover 93-97% of simulated truths; and an edit that pushes
    SmolLM2 towards code costs more on prose than on code, by an interval above 0.
    """
    named, shuffled = m["planted cell named"], m["a gap flagged, cells shuffled"]
    falsely = m["that cell named without planting"]
    fits = shuffled.low is not None and shuffled.low <= 0.05
    checks = [
        Check("the planted cell is named", named.value >= 0.9, f"{named}", central=True),
        Check("shuffled cells are flagged by chance only", fits, f"{shuffled}", central=True),
        Check("the cell is not named without planting", falsely.value <= 0.1, f"{falsely}"),
        Check.below("the average hardly shows it", m["overall accuracy lost"], 0.02),
        Check.above(
            "the cell's error is several times the overall one", m["cell error over overall error"], 3.0
        ),
        Check("identities are exact", m["identities broken"].value == 0, f"{m['identities broken']}"),
    ]
    for coverage in m.every("interval coverage"):
        good = 0.93 <= coverage.value <= 0.97
        checks.append(Check(f"{coverage.group['interval']} intervals cover 93-97%", good, f"{coverage}"))
    gap = m.get("extra cost of the edit on prose over code")
    checks.append(Check.above("an edit's average effect hides its effect on a group", gap, 0.0))
    return checks


@reproduction(
    "model-cards",
    claim="A failure in one intersection of two factors hardly moves averages; evaluation by group shows it.",
    judge=judge,
    quick={"seeds": 5, "shuffles": 60, "sweep_seeds": 1, "simulations": 1000, "documents": 24},
    full={"seeds": 20, "shuffles": 300, "sweep_seeds": 4, "simulations": 5000, "documents": 120},
)
def model_cards(
    *, seed: int, seeds: int, shuffles: int, sweep_seeds: int, simulations: int, documents: int
) -> Findings:
    """Run it.

    Args:
        seed: seed of every random choice.
        seeds: classifiers with and without the planted cell.
        shuffles: evaluations in which no group differs.
        sweep_seeds: how often every one of the 30 cells is planted in turn.
        simulations: simulated groups for the coverage of intervals.
        documents: documents on which an edit of SmolLM2 is evaluated; 0 leaves that part out.
    """
    measured = [identities(seed), *coverage(seed, simulations)]
    planted = plant(seed, seeds, shuffles)
    swept, plot = sweep(seed, sweep_seeds)
    measured += [*planted, *swept]
    if documents:
        measured += edit_by_group(seed, documents)
    found = Measured(measured)
    named, lost = found["planted cell named"], found["overall accuracy lost"]
    return Findings(
        measured,
        headline=f"the gap line named the planted cell in {named.value:.0%} of {named.n} seeds, "
        f"while overall accuracy fell by {100 * lost.value:.1f} points",
        note=NOTE,
        plots=[plot],
    )


NOTE = (
    "Published: a framework and two example cards, with no number to match, so only its reason is tested."
    " Ours: natural stroke thickness of these small digits hardly matters to a classifier, so thickness "
    "is drawn. The planted cell (thick ones) and the drawing were chosen in trials with other seeds, "
    "because the classifier needs its own examples there; for many cells the other thicknesses of the "
    "same digit suffice, nothing fails, and nothing can be named: the sweep plants each of the 30 cells "
    "in turn and shows it. Some cells are harder by nature (thick eights and nines), and the line flags "
    "such gaps without any planting, rightly; its false alarms are therefore counted with the cells "
    "shuffled among the images, where no group differs by construction."
)


def identities(seed: int) -> Measurement:
    """Check counts, weighted means, error rates and the way back from Markdown on random groups."""
    rng = np.random.default_rng(seed)
    broken, checked = [], 0

    def check(what: str, a: float, b: float) -> None:
        nonlocal checked
        checked += 1
        if not (math.isclose(a, b, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))):
            broken.append(what)

    evaluate = public("evaluate")
    with progress("identities", 20, "evaluations") as advance:
        for _ in range(20):
            n = int(rng.integers(20, 300))
            truth, said = (
                (rng.random(n) < rng.random()).astype(int),
                (rng.random(n) < rng.random()).astype(int),
            )
            items = [
                {"label": int(t), "a": str(rng.integers(0, 3)), "b": str(rng.integers(0, 2))} for t in truth
            ]
            options: dict[str, Any] = {"factors": ["a", "b"], "minimum": 1, "seed": seed}
            result = evaluate([int(s) for s in said], items, "accuracy", **options)
            cells = [c for c in result.cells if set(c.group) == {"a", "b"}]
            check("counts", sum(c.n for c in cells), n)
            check("weighted mean", sum(c.n * c.value for c in cells) / n, result.overall.value)
            for name, (hit, among) in _BRUTE.items():
                rates = evaluate([int(s) for s in said], items, name, **options)
                for cell in rates.cells:
                    rows = [i for i in range(n) if all(items[i][k] == v for k, v in cell.group.items())]
                    rows = [i for i in rows if among(truth[i], said[i])]
                    value = sum(hit(truth[i], said[i]) for i in rows) / len(rows) if rows else math.nan
                    check(name, cell.value, value)
            check("card read back from Markdown", 1, float(reads_back(result)))
            advance()
    note = ", ".join(sorted(set(broken))) or "counts, weighted means, FPR, FNR, FDR, FOR, cards read back"
    return Measurement(
        "identities broken", len(broken), "count", checked, seed=seed, better="lower", note=note
    )


_BRUTE = {
    "fpr": (lambda t, d: bool(d), lambda t, d: not t),
    "fnr": (lambda t, d: not d, lambda t, d: bool(t)),
    "fdr": (lambda t, d: not t, lambda t, d: bool(d)),
    "for": (lambda t, d: bool(t), lambda t, d: not d),
}


def coverage(seed: int, simulations: int) -> list[Measurement]:
    """Return how often intervals hold the truth, on simulated groups of 30 to 300 items."""
    rng = np.random.default_rng(seed)
    wilson_hits, bootstrap_hits = [], []
    with progress("interval coverage", simulations, "groups") as advance:
        for i in range(simulations):
            n, p = int(rng.integers(30, 301)), rng.uniform(0.02, 0.98)
            low, high = wilson(int(rng.binomial(n, p)), n)
            wilson_hits.append(low <= p <= high)
            shape = rng.uniform(2, 10)
            low, high = bootstrap_mean(rng.gamma(shape, size=n), seed=i, resamples=500)
            bootstrap_hits.append(low <= shape <= high)
            advance()
    said = {"wilson": wilson_hits, "bootstrap": bootstrap_hits}
    return [
        rate_measurement("interval coverage", h, seed=seed, group={"interval": k}) for k, h in said.items()
    ]


def plant(seed: int, seeds: int, shuffles: int) -> list[Measurement]:
    """Plant one cell in every seed, beside no planting, random images left out, and shuffled cells."""
    named, falsely, natural, shuffled = [], [], [], []
    lost, lost_at_random, ratio = [], [], []
    with progress("planted cell", seeds, "seeds") as advance:
        for i, s in enumerate(_seeds(seed, seeds)):
            data = draw_digits(s)
            whole, cut = predictions(data, s), predictions(data, s, cell=PLANTED)
            drop = round(0.95 * data.inside(PLANTED).sum() * 4 / 5)
            dropped = predictions(data, s, drop=int(drop))
            named.append(_flagged(data.items, cut, s) == PLANTED)
            found = _flagged(data.items, whole, s)
            natural.append(found is not None)
            falsely.append(found == PLANTED)
            error = {k: _wrong(data, v) for k, v in (("whole", whole), ("cut", cut), ("dropped", dropped))}
            lost.append(float(error["cut"].mean() - error["whole"].mean()))
            lost_at_random.append(float(error["dropped"].mean() - error["whole"].mean()))
            ratio.append(float(error["cut"][data.inside(PLANTED)].mean() / error["cut"].mean()))
            for k in range(shuffles * i // seeds, shuffles * (i + 1) // seeds):
                shuffled.append(_flagged(_shuffle(data.items, k), cut, k) is not None)
            advance()
    said = " ".join(map(str, PLANTED))
    control = mean_measurement(
        "overall accuracy lost, as many random images left out",
        "fraction",
        lost_at_random,
        seed=seed,
        over="seeds",
    )
    return [
        rate_measurement("planted cell named", named, seed=seed, better="higher", note=said),
        rate_measurement("that cell named without planting", falsely, seed=seed, better="lower"),
        rate_measurement("a gap flagged without planting", natural, seed=seed),
        rate_measurement("a gap flagged, cells shuffled", shuffled, seed=seed),
        mean_measurement("overall accuracy lost", "fraction", lost, seed=seed, over="seeds"),
        control,
        mean_measurement("cell error over overall error", "ratio", ratio, seed=seed, over="seeds"),
    ]


def sweep(seed: int, seeds: int) -> tuple[list[Measurement], Plot]:
    """Plant each of the 30 cells in turn; return how often it is named by the error it then has."""
    cells = [(d, t) for d in range(10) for t in THICKNESS]
    rows, strong = [], []
    with progress("planting every cell", seeds * len(cells), "cells") as advance:
        for s in _seeds(seed, seeds, offset=2500):
            data = draw_digits(s)
            for cell in cells:
                said = predictions(data, s, cell=cell)
                error = float(_wrong(data, said)[data.inside(cell)].mean())
                hit = _flagged(data.items, said, s) == cell
                outcome = "named" if hit else "not named"
                name = " ".join(map(str, cell))
                rows.append({"cell": name, "error of the planted cell": error, "gap line": outcome})
                if error >= FAILS:
                    strong.append(hit)
                advance()
    note = "cells that planting made wrong at least once in five images"
    named = rate_measurement("planted cell named, any cell that fails", strong, seed=seed, note=note)
    every = rate_measurement(
        "planted cell named, any cell", [r["gap line"] == "named" for r in rows], seed=seed
    )
    plot = Plot(
        "Each of 30 cells planted in turn: is it named?",
        rows,
        x="error of the planted cell",
        y="gap line",
        color="gap line",
        mark="point",
    )
    return [named, every], plot


def _seeds(seed: int, n: int, offset: int = 0) -> range:
    start = 30_000 + 5000 * seed + offset
    return range(start, start + n)


def _flagged(items: list[dict[str, str]], said: Sequence[str], seed: int) -> tuple[int, str] | None:
    """Return the cell that the card's gap line over digit x thickness names, if it is more than chance."""
    factors = ["digit", "thickness"]
    result = public("evaluate")(list(said), items, "error rate", factors=factors, minimum=1, seed=seed)
    gap = next(g for g in result.gaps if g.details["factor"] == "digit x thickness")
    if gap.details["p_holm"] >= 0.05:
        return None
    digit, thickness = (part.split("=")[1] for part in gap.details["highest"].split(" and "))
    return int(digit), thickness


def _shuffle(items: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Give the cells to other images: labels and predictions stay, groups become random."""
    order = np.random.default_rng(seed).permutation(len(items))
    return [
        {**item, "digit": items[o]["digit"], "thickness": items[o]["thickness"]}
        for item, o in zip(items, order, strict=True)
    ]


def _wrong(data: Digits, said: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array([int(s) for s in said]) != data.digits


def edit_by_group(seed: int, documents: int) -> list[Measurement]:
    """Push SmolLM2 towards code and evaluate the loss per byte by kind of text, before and after.

    The push is the difference of mean activations, code minus prose, at the middle of the model; the
    control is a random direction of equal norm. It is fitted on other documents than it is judged on.
    """
    import torch

    from actlas.core.edits import Add
    from actlas.data import corpus
    from actlas.data.documents import Corpus
    from actlas.models import load

    model = load("smollm2")
    fit, held_out = corpus("mixed", seed=seed).split(seed=seed)
    texts = Corpus("mixed", [replace(d, text=d.text[:700]) for d in held_out.take(documents)])
    vector = _mean_activation(model, fit.where(domain="code")) - _mean_activation(
        model, fit.where(domain="prose")
    )
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    edits = {TOWARDS: vector, "random direction": noise * vector.norm() / noise.norm()}
    evaluate, changes = public("evaluate"), public("changes")
    options: dict[str, Any] = {"factors": ["domain"], "minimum": 1, "seed": seed}
    before = evaluate(model, texts, "loss per byte", group={"edit": "none"}, **options)
    out = [before.overall, *before.cells]
    for name, direction in edits.items():
        with progress(f"loss per byte, {name}"), model.edit(Add(SITE, direction)):
            after = evaluate(model, texts, "loss per byte", group={"edit": "none"}, **options)
        out += [m.with_group(edit=name) for m in changes(before, after, seed=seed)]
        if name == TOWARDS:
            out.append(_spread(before, after, seed))
    return out


def _mean_activation(model: Model, texts: Corpus, documents: int = 12, characters: int = 400) -> Tensor:
    """Return the mean activation at `SITE`, float32 [d], first tokens left out."""
    import torch

    rows = []
    for document in texts.take(documents):
        trace = model.trace(document.text[:characters], [SITE])
        rows.append(trace[SITE][0, 1:].double())
    return torch.cat(rows).mean(0).float()


def _spread(before: Any, after: Any, seed: int) -> Measurement:
    """Return how much more the edit costs on prose than on code; the groups hold different documents."""
    value, draws, n = {}, {}, {}
    for i, domain in enumerate(("prose", "code")):
        a, b = (next(c for c in e.cells if c.group["domain"] == domain) for e in (before, after))
        change, size = (b.samples - a.samples) * a.weights, a.weights
        value[domain], n[domain] = float(change.sum() / size.sum()), len(size)
        blocks = resample_counts(len(size), 1000, seed + i)
        draws[domain] = np.concatenate([divide(c @ change, c @ size) for c in blocks])
    low, high = percentiles(draws["prose"] - draws["code"], min(n.values()))
    return Measurement(
        "extra cost of the edit on prose over code",
        value["prose"] - value["code"],
        "bits/byte",
        sum(n.values()),
        low,
        high,
        "bootstrap over documents within each kind",
        seed,
        group={"edit": TOWARDS},
    )
