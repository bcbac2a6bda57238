"""What a language model can do, task by task and group by group, with intervals and the largest gap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.measure.statistics import mean_measurement
from actlas.report.content import DataUse, Figure, SectionResult, Tile, plain
from actlas.report.evaluation import Evaluation, changes, correct_gaps, evaluate, spoken
from actlas.report.plots import Row, dots
from actlas.report.registry import Context, section

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.data import Task

LEAST = 5
"""Groups of fewer items say nothing and are left out of the card."""
FEW = 15
"""Groups of fewer items are left out of the plot (they are among the numbers)."""

_ACCURACY: dict[str, Any] = {"axis": "accuracy", "domain": (0, 1), "percent": True, "wide": True}


@dataclass(frozen=True)
class Done:
    """One task: its results under the card's edits, and without them if there are any."""

    task: Task
    after: Evaluation
    difference: Measurement
    before: Evaluation | None = None


@section("behaviour", title="Results by task and group", order=30, needs=("causal-lm",), cost=3.3)
def behaviour(context: Context) -> SectionResult:
    """Run every task once and report accuracy for all items, each group and pairs of groups."""
    from actlas.data import task, tasks

    model = context.model
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it cannot read prompts")
    done: list[Done] = []
    notes: list[str] = []
    for name in tasks():
        try:
            made = task(name, model.tokenizer, n=context.budget.task_prompts, seed=context.seed)
            notes += context.notes_on(made)
            done.append(_run(context, made))
        except InputError as error:
            notes.append(f"Task `{name}` was left out: {plain(error)}")
        else:
            notes += [f"Task `{name}`: {plain(made.note)}"] if made.note else []
    if not done:
        raise InputError(f"none of the tasks fits the tokenizer of {model.name}: {notes[0] if notes else ''}")
    gaps = correct_gaps([g for d in done for g in d.after.gaps])
    mean, mean_tile = _mean(done, context.seed)
    measurements = [mean]
    for d in done:
        measurements += [d.after.overall, d.difference, *(c for c in d.after.cells if c.n >= LEAST)]
    measurements += [g for g in gaps if np.isfinite(g.value)][:10]
    figures = [_by_task(done), _by_group(done)]
    intro = (
        "Each prompt has one right continuation and some wrong ones, each a single token. A prompt "
        "counts as right when the right token has the greatest logit among them. Prompts come from "
        "templates, so a score says what the model does with these templates and words.\n\n" + _gap_line(gaps)
    )
    if context.edits:
        changed = [c for d in done if d.before for c in changes(d.before, d.after, seed=context.seed)]
        measurements += [c for c in changed if c.n >= LEAST]
        figures.insert(0, _changes(changed))
        intro += "\n\n" + _change_line(changed)
    data = [DataUse(d.task.name, len(d.task), "prompts", d.task.hash, d.task.metric_doc) for d in done]
    return SectionResult(intro, measurements, figures, (), notes, [mean_tile], data)


def _run(context: Context, task: Task) -> Done:
    after, difference = _evaluate(context.model, task, context.seed)
    before = None
    if context.edits:
        with context.model.without_edits():
            before, _ = _evaluate(context.model, task, context.seed)
    return Done(task, after, difference, before)


def _evaluate(model: Model, task: Task, seed: int) -> tuple[Evaluation, Measurement]:
    from actlas.measure.tasks import answer

    answers = answer(model, task)
    factors = [label for label, values in task.groups.items() if len(values) > 1]
    result = evaluate(
        answers.correct.astype(float),
        task.items,
        "mean",
        factors,
        2,
        minimum=1,
        name="task-accuracy",
        unit="fraction",
        better="higher",
        group={"task": task.name},
        seed=seed,
    )
    chance = float(task.chance)
    under = tuple(e.describe() for e in model.installed)
    overall = replace(result.overall, details={"chance": chance}, note=f"guessing reaches {chance:.0%}")
    cells = tuple(replace(c, under=under) for c in result.cells)
    gaps = tuple(replace(g, name="largest gap in task-accuracy", under=under) for g in result.gaps)
    difference = mean_measurement(
        "task-logit-difference",
        "logits",
        answers.difference,
        seed=seed,
        over="items",
        better="higher",
        group={"task": task.name},
        details={"chance": 0.0},
    )
    result = replace(result, overall=replace(overall, under=under), cells=cells, gaps=gaps)
    return result, replace(difference, under=under)


def _mean(done: list[Done], seed: int) -> tuple[Measurement, Tile]:
    """The mean over tasks, each task weighing the same; the interval resamples prompts within tasks."""
    tasks = [d.after.overall.samples for d in done]
    arrays = [np.asarray(t, dtype=float) for t in tasks if t is not None]
    generator = np.random.default_rng(seed)
    draws = np.mean([generator.binomial(len(a), a.mean(), 2000) / len(a) for a in arrays], axis=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    chance = float(np.mean([d.after.overall.details["chance"] for d in done]))
    m = Measurement(
        "mean task-accuracy",
        float(np.mean([a.mean() for a in arrays])),
        "fraction",
        sum(len(a) for a in arrays),
        float(low),
        float(high),
        "bootstrap over prompts within tasks",
        seed,
        done[0].after.overall.under,
        {},
        "higher",
        f"mean over {len(done)} tasks; guessing reaches {chance:.0%}",
        details={"chance": chance},
    )
    return m, Tile("Task accuracy", m, remark=f"{len(done)} tasks, guessing {100 * chance:.0f} %", rank=10)


def _by_task(done: list[Done]) -> Figure:
    ordered = sorted(done, key=lambda d: -d.after.overall.value)
    rows = [
        Row.of(d.after.overall, d.task.name, reference=d.after.overall.details["chance"]) for d in ordered
    ]
    best, worst = ordered[0], ordered[-1]
    above = sum(1 for d in done if (d.after.overall.low or 0.0) > d.after.overall.details["chance"])
    text = (
        f"Share of prompts with the right answer ahead, with 95% intervals; the tick is guessing. Highest: "
        f"{best.task.name} ({best.after.overall.value:.0%}), lowest: {worst.task.name} "
        f"({worst.after.overall.value:.0%}). {above} of {len(done)} tasks are clearly above guessing."
    )
    return dots("Accuracy by task", text, rows, reference="guessing", **_ACCURACY)


def _by_group(done: list[Done]) -> Figure:
    rows = []
    for d in done:
        for cell in d.after.cells:
            factors = {k: v for k, v in cell.group.items() if k != "task"}
            if len(factors) == 1 and cell.n >= FEW:
                ((factor, value),) = factors.items()
                rows.append(Row.of(cell, f"{d.task.name}: {factor} {value}", reference=d.after.overall.value))
    text = (
        f"The same accuracy for each group of at least {FEW} prompts; the tick is the task's overall "
        "accuracy. Groups with few prompts have wide intervals."
    )
    return dots("Accuracy by group", text, rows, reference="overall", **_ACCURACY)


def _gap_line(gaps: list[Measurement]) -> str:
    found = [g for g in gaps if np.isfinite(g.value)]
    if not found:
        return "No gap between groups was computed: it needs two groups of at least 30 prompts."
    g = found[0]
    d = g.details
    low, high = g.low or 0.0, g.high or 0.0
    verdict = "unlikely to be chance" if d["p_holm"] < 0.05 else "it may be chance"
    return (
        f"Largest gap: in {g.group['task']}, {spoken(d['highest'])} is {100 * g.value:.0f} points ahead of "
        f"{spoken(d['lowest'])} (95% interval {100 * low:.0f} to {100 * high:.0f}); {verdict} (p = "
        f"{d['p_holm']:.2g}, corrected for {len(found)} comparisons between groups of at least 30 "
        "prompts)."
    )


def _changes(changed: list[Measurement]) -> Figure:
    rows = []
    for m in changed:
        factors = {k: v for k, v in m.group.items() if k != "task"}
        if len(factors) <= 1 and m.n >= FEW:
            part = "all" if not factors else " ".join(next(iter(factors.items())))
            rows.append(Row.of(m, f"{m.group['task']}: {part}", reference=0.0))
    text = (
        "Accuracy with the edits minus accuracy without them, on the same prompts, with paired 95% intervals."
    )
    plot = {**_ACCURACY, "domain": None, "axis": "change of accuracy"}
    return dots("What the edits change", text, rows, reference="no change", **plot)


def _change_line(changed: list[Measurement]) -> str:
    harmed = [m for m in changed if m.high is not None and m.high < 0]
    helped = [m for m in changed if m.low is not None and m.low > 0]
    line = f"With the edits, {len(helped)} groups do clearly better and {len(harmed)} clearly worse."
    if harmed:
        worst = min(harmed, key=lambda m: m.value)
        who = ", ".join(f"{k} {v}" for k, v in worst.group.items())
        line += f" Worst: {who} ({worst.value:+.0%})."
    return line
