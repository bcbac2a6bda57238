"""repe-reasoning: a vector read from solved reasoning items, added back at one middle layer.

Hojer et al. 2025, "Improving Reasoning Performance in Large Language Models via Representation Engineering".
Two of the paper's tasks: basic deduction after bAbI task 15 (four answers), and indirect-object
identification (two). Positive texts are items with their right answers, negative ones random letters of the
same length; three vectors are read from them. Strength and vector are chosen on one half of the test items
and judged on the other, beside the plain model, random directions of equal norm and the vector backwards.
What the vector does to the next-token distribution is checked against the closed form for small strengths.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.contrast import Contrast, read_contrast
from actlas.core.intervals import bootstrap_ratio
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.samples import mean_measurement, rate_measurement
from actlas.measure.statistics import paired_difference
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.deduction_items import deduction_items, random_text
from actlas.papers.reproductions.prompt_only import LINE, WISHES, before, in_words, said
from actlas.steering.alpha_curve import Answered, AnswerRuns
from actlas.steering.directions import fit_readings
from actlas.steering.price import Suffix

if TYPE_CHECKING:
    from actlas.core.direction import Direction
    from actlas.core.model import Model
    from actlas.data.task_items import TaskItem

SITE = "blocks.15.resid_post"
VECTORS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "reading": ("mean", {}),
    "reading-contrast": ("mean_diff", {}),
    "PCA-contrast": ("pca_diff", {}),
    "PCA-contrast, centred": ("pca_diff", {"centre": True}),
}
SMALL = 0.01
TASKS = ("deduction", "ioi")
OVER_BASE, OVER_RANDOM = "accuracy over the plain model", "accuracy over random directions"


def judge(m: Measured) -> list[Check]:
    """Central, for either task: the vector and strength above 0 with the highest accuracy on one half of the
    test items (the higher probability of the right answer among those offered decides between equals) has,
    on the other half, a higher accuracy than the plain model, and than random directions of equal norm (their
    mean), by paired intervals above 0. An interval that covers 0 leaves the question open. Also: the right
    answer's probability among those offered rises over the plain model's, on the same half; strength 0 costs
    exactly nothing; KL grows with strength for every vector (intervals of the paired rise above 0); at a
    strength of 0.01 median norms the KL is within 10% of the closed form Var_p(u)/2, and twice the strength
    costs 4 times as much, to within 10%.
    """
    checks = []
    for task in TASKS:
        for name, what in (("the plain model", OVER_BASE), ("random directions", OVER_RANDOM)):
            found = m.get(what, task=task)
            checks.append(Check.above(f"{task}: more right answers than {name}", found, 0.0, central=True))
        likelier = m.get("answer probability over the plain model", task=task)
        checks.append(Check.above(f"{task}: the right answer is more likely", likelier, 0.0))
    zero = m.get("KL at strength 0")
    checks.append(Check("strength 0 costs nothing", None if zero is None else zero.value == 0.0, str(zero)))
    rises = m.every("KL rise with strength")
    worst = min(rises, key=lambda x: x.value if x.low is None else x.low, default=None)
    checks.append(Check.above("KL grows with strength (the least rise)", worst, 0.0))
    for name in ("KL over the closed form", "a quarter of KL at twice the strength, over KL"):
        found = m.get(name)
        checks.append(Check.above(f"{name}: at least 0.9", found, 0.9))
        checks.append(Check.below(f"{name}: at most 1.1", found, 1.1))
    return checks


@reproduction(
    "repe-reasoning",
    claim="A vector read from solved items of a deductive or an inductive task and added at a middle layer "
    "raises the accuracy on others.",
    judge=judge,
    quick={
        "tasks": TASKS,
        "fit": 40,
        "test": 88,
        "sites": (SITE,),
        "vectors": ("reading", "reading-contrast", "PCA-contrast"),
        "alphas": (0.1, 0.2, 0.4),
        "randoms": 3,
        "small": 12,
    },
    full={
        "tasks": TASKS,
        "fit": 200,
        "test": 800,
        "sites": ("blocks.10.resid_post", SITE, "blocks.20.resid_post"),
        "vectors": tuple(VECTORS),
        "alphas": (0.05, 0.1, 0.2, 0.4),
        "randoms": 10,
        "small": 64,
    },
)
def repe_reasoning(
    *,
    seed: int,
    tasks: Sequence[str],
    fit: int,
    test: int,
    sites: Sequence[str],
    vectors: Sequence[str],
    alphas: Sequence[float],
    randoms: int,
    small: int,
) -> Findings:
    """Run it.

    Args:
        seed: of items, controls and intervals.
        tasks: which of `TASKS`.
        fit: solved items that the vectors are read from, of each task.
        test: items to answer, of each; strength, vector and layer are chosen on one half of them.
        sites: layers to choose from.
        vectors: which vectors, of `VECTORS`.
        alphas: strengths to choose from, in median residual norms.
        randoms: random directions.
        small: items for the check of the closed form, which is made on the first task.
    """
    from actlas.data import task as make_task
    from actlas.models import load

    model = load("smollm2")
    measured: list[Measurement] = []
    rows: list[dict[str, Any]] = []
    for task in tasks:
        n = fit + test
        items = (
            deduction_items(n, seed)
            if task == "deduction"
            else make_task(task, model.tokenizer, n=n, seed=seed)
        )
        directions = read_vectors(model, list(items[:fit]), sites, vectors, seed)
        tried, judged = list(items[fit : fit + test // 2]), list(items[fit + test // 2 :])
        best, found, points = _choose(model, directions, tried, alphas, seed)
        runs = AnswerRuns(model, directions[best[:2]].steer(1.0), judged)
        group = {"site": best[0], "vector": best[1], "alpha": f"{best[2]:g}"}
        found += [_cosine(directions, site) for site in sites]
        found += _judged(runs, directions[best[:2]], best[2], randoms, group, seed)
        found += _asked(model, judged, task, runs.under(directions[best[:2]].steer(best[2])), seed)
        if task == tasks[0]:
            found += closed_form(model, directions[best[:2]], judged[:small], seed)
        measured += [m.with_group(task=task) for m in found]
        rows += [{**row, "series": f"{task}: {row['series']}"} for row in points]
    plot = Plot("Accuracy by strength, on the items that the choice is made on", rows,
                "strength (median norms)", "accuracy", "series")  # fmt: skip
    return Findings(measured, _headline(Measured(measured)), f"{NOTE} {said(measured)}", [plot])


def read_vectors(
    model: Model, items: Sequence[TaskItem], sites: Sequence[str], vectors: Sequence[str], seed: int
) -> dict[tuple[str, str], Direction]:
    """Return the vectors by site and name, read from solved items and random letters of the same length."""
    draw = random.Random(f"letters/{seed}")
    pairs = Contrast.of([(item.text, random_text(len(item.text), draw)) for item in items])
    readings = read_contrast(model, pairs, list(sites))
    return {
        (site, name): fit_readings(rows, method=VECTORS[name][0], **VECTORS[name][1])
        for name in vectors
        for site, rows in readings.items()
    }


def _choose(
    model: Model,
    directions: Mapping[tuple[str, str], Direction],
    items: Sequence[TaskItem],
    alphas: Sequence[float],
    seed: int,
) -> tuple[tuple[str, str, float], list[Measurement], list[dict[str, Any]]]:
    """Return the best site, vector and strength on these items, what was measured, and rows for a plot."""
    points: dict[tuple[str, str, float], Answered] = {}
    measured: list[Measurement] = []
    with progress("choosing", total=len(directions) * len(alphas), unit="runs") as advance:
        for site in dict.fromkeys(site for site, _ in directions):
            here = {name: d for (where, name), d in directions.items() if where == site}
            runs = AnswerRuns(model, [d.steer(1.0) for d in here.values()], items)
            for name, d in here.items():
                for alpha in alphas:
                    points[site, name, alpha] = runs.under(d.steer(alpha))
                    advance()
            mine = {k: v for k, v in points.items() if k[0] == site}
            measured += _curve(runs.base, mine, site, seed)
    best = max(points, key=lambda k: (points[k].correct.mean(), points[k].probability.mean()))
    shown = [(0.0, name, runs.base) for _, name in directions]
    shown += [(alpha, name, point) for (site, name, alpha), point in points.items() if site == best[0]]
    rows = [
        {"strength (median norms)": alpha, "accuracy": float(point.correct.mean()), "series": name}
        for alpha, name, point in shown
    ]
    return best, measured, rows


NOTE = (
    "Published: Pythia-14m to 2.8b on bAbI task 15 and on indirect-object identification, Mistral-7B on "
    "GSM8K; the abstract gives no figures. Official code: rows are not padded on the left when they are "
    "read, so that the last token of a short row can be padding; the last layer's state is taken after the "
    "final norm; and PCA centres the differences, so that its component need not resemble their mean, and "
    "has an arbitrary sign. Here the component is of the differences themselves, its sign that of the mean "
    "('centred' is the official form, in full mode). With random letters as negatives the vector mostly says "
    "that a text is a text; the positives-only vector mainly rescales what all texts share. Strengths are in "
    "median residual norms and not in multiples of each vector, so that the three can be compared. The plain "
    "model answers basic deduction at chance, asked in six ways (completion, question, both, one and two "
    "solved items before it, chat), so that there is little to build on. Tried before the stored run: those "
    "six ways on 48 items, and runs with 8 + 16 items to see that it works."
)


def closed_form(
    model: Model, direction: Direction, items: Sequence[TaskItem], seed: int
) -> list[Measurement]:
    """Return KL at strengths 0, small and twice small, beside the closed form Var_p(u)/2 * strength^2."""
    edit = direction.steer(1.0)
    run = Suffix(model, edit, [item.prompt for item in items])
    kl = {a: run.outcome(edit * a).kl for a in (0.0, SMALL, 2 * SMALL)}
    predicted = run.fisher(edit, SMALL / 2) / 2 * SMALL**2
    return [
        Measurement("KL at strength 0", float(kl[0.0].max()), "nats", len(items), note="the largest"),
        _ratio("KL over the closed form", kl[SMALL], predicted, seed),
        _ratio("a quarter of KL at twice the strength, over KL", kl[2 * SMALL] / 4, kl[SMALL], seed),
    ]


def _ratio(name: str, over: Any, under: Any, seed: int) -> Measurement:
    low, high = bootstrap_ratio(over, under, seed=seed)
    value = float(np.sum(over) / np.sum(under))
    return Measurement(name, value, "ratio", len(over), low, high, "bootstrap over items", seed)


def _curve(
    base: Answered, points: Mapping[tuple[str, str, float], Answered], site: str, seed: int
) -> list[Measurement]:
    """Return accuracy, KL and entropy on the items of the choice, and by how much KL rises with strength."""
    part = {"part": "choice", "site": site}
    out = [rate_measurement("accuracy", base.correct, seed=seed, group={**part, "vector": "none"})]
    last: dict[tuple[str, str], tuple[float, Any]] = {}
    for (site, name, alpha), point in points.items():
        group = {**part, "vector": name, "alpha": f"{alpha:g}"}
        out.append(rate_measurement("accuracy", point.correct, seed=seed, group=group))
        for what, values in (("KL", point.kl), ("next-token entropy", point.entropy)):
            out.append(mean_measurement(what, "nats", values, seed=seed, over="items", group=group))
        if (site, name) in last:
            before, kl = last[site, name]
            gap = paired_difference(kl, point.kl, seed=seed)
            group = {"vector": name, "site": site, "from": f"{before:g}", "to": f"{alpha:g}"}
            out.append(
                Measurement("KL rise with strength", gap.value, "nats", gap.n, gap.low, gap.high,
                            "paired bootstrap over items", seed, group=group)
            )  # fmt: skip
        last[site, name] = alpha, point.kl
    return out


def _judged(
    runs: AnswerRuns, direction: Direction, alpha: float, randoms: int, group: dict[str, str], seed: int
) -> list[Measurement]:
    """Return what the chosen vector does on the other items, beside its controls."""
    own, back = runs.under(direction.steer(alpha)), runs.under(direction.steer(-alpha))
    drawn = [runs.under(direction.random(seed + 1 + i).steer(alpha)) for i in range(randoms)]
    out = []
    for label, found in {
        "plain model": [runs.base],
        "chosen": [own],
        "backwards": [back],
        "random": drawn,
    }.items():
        part = {"part": "judged", "of": label}
        correct, probability, mass, kl, entropy = (
            np.mean([getattr(f, a) for f in found], axis=0)
            for a in ("correct", "probability", "mass", "kl", "entropy")
        )
        if len(found) == 1:
            out.append(rate_measurement("accuracy", correct, seed=seed, group=part))
        else:
            out.append(mean_measurement("accuracy", "fraction", correct, seed=seed, over="items", group=part))
        for what, unit, values in (
            ("answer probability", "fraction", probability), ("answer mass", "fraction", mass),
            ("KL", "nats", kl), ("next-token entropy", "nats", entropy),
        ):  # fmt: skip
            out.append(mean_measurement(what, unit, values, seed=seed, over="items", group=part))
    noise = np.mean([d.correct for d in drawn], axis=0)
    for what, rival, mine in (
        (OVER_BASE, runs.base.correct, own.correct),
        (OVER_RANDOM, noise, own.correct),
        ("accuracy backwards over the plain model", runs.base.correct, back.correct),
        ("answer probability over the plain model", runs.base.probability, own.probability),
    ):
        gap = paired_difference(rival, mine, seed=seed)
        out.append(
            Measurement(what, gap.value, "fraction", gap.n, gap.low, gap.high, "paired bootstrap over items",
                        seed, group=group, better="higher")
        )  # fmt: skip
    return out


def _asked(model: Model, items: Sequence[TaskItem], task: str, own: Answered, seed: int) -> list[Measurement]:
    """Return what a line before each item does to the plain model's answers, and the vector's minus that."""
    wish = WISHES[f"repe-reasoning, {task}"]
    words = AnswerRuns(model, (), [replace(i, prompt=before(wish, i.prompt)) for i in items]).base
    out = in_words("accuracy", "fraction", own.correct, words.correct, asked=LINE, seed=seed)
    return out + in_words(
        "answer probability", "fraction", own.probability, words.probability, asked=LINE, seed=seed
    )


def _cosine(directions: Mapping[tuple[str, str], Direction], site: str) -> Measurement:
    here = {name: d for (where, name), d in directions.items() if where == site}
    mean = here.get("reading-contrast") or next(iter(here.values()))
    said = {name: round(mean.cosine(d), 3) for name, d in here.items()}
    return Measurement(
        "least cosine of the vectors with the mean contrast", min(said.values()), "cosine", mean.n,
        group={"site": site}, note=", ".join(f"{name} {value}" for name, value in said.items()),
    )  # fmt: skip


def _headline(m: Measured) -> str:
    said = []
    for gain in m.every(OVER_BASE):
        task = gain.group["task"]
        base, noise = m.get("accuracy", task=task, of="plain model"), m.get(OVER_RANDOM, task=task)
        assert base is not None and noise is not None
        said.append(
            f"{task}: {gain.group['vector']} at strength {gain.group['alpha']}, accuracy {base.value:.2f} "
            f"{gain.value:+.3f}, over random directions {noise.value:+.3f}"
        )
    return "; ".join(said)
