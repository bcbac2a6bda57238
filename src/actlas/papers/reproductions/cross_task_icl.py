"""cross-task-icl: a labelled example of another task, for a task without labels.

Chatterjee et al. 2024, "Language Models can Exploit Cross-Task In-context Learning for Data-Scarce Novel
Tasks" (arXiv 2405.10548). Seven small tasks; each target is asked without examples, with one example of each
other task, and with one of its own. Examples are chosen by a sentence encoder. At this size an average gain
over all tasks is not expected: a foreign example can teach the format where few labels exist, and is copied
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.select.cross_task import Instructed

SITE = "blocks.19.resid_post"


def judge(m: Measured) -> list[Check]:
    """Holds if (1) an example of another task raises exact-match accuracy over zero-shot, on average over the
    sources and the three targets with two labels (central); (2) over all pairs of source and target, how
    alike the model's activations at the end of their prompts are (two thirds of the depth, last token, mean
    of all tasks taken out, fixed in advance) ranks with the gain: Spearman above 0 (central); (3)
    pseudo-labels by the vote of all sources, used as examples, beat zero-shot on the targets with two labels
    (central); (4) forced choice between the two labels gains from another task's example too, which format
    alone cannot explain. Gains are absolute. (1) fails if the mean gain is 0 or less. Intervals are over
    items, or pairs of tasks; a check whose interval covers its boundary is undecided."""
    return [
        Check.above("another task's example helps", _gain(m, "cross-task", "exact"), 0.0, central=True),
        Check.above(
            "the gain goes with similar activations",
            m.get("similarity against gain", site=SITE),
            0.0,
            central=True,
        ),
        Check.above("pseudo-labels by vote help", _gain(m, "pseudo-labels", "exact"), 0.0, central=True),
        Check.above("and it is not format alone", _gain(m, "cross-task", "forced choice"), 0.0),
    ]


def _gain(m: Measured, by: str, judged: str) -> Measurement | None:
    return m.get("gain over zero-shot, two-label targets", by=by, judged=judged)


@reproduction(
    "cross-task-icl",
    claim="One labelled example of another task raises accuracy on a task without labels, and the gain goes "
    "with how alike the model's activations on both tasks are.",
    judge=judge,
    quick={"items": 12, "open_items": 6, "pool": 16},
    full={"items": 60, "open_items": 40, "pool": 80},
)
def cross_task_icl(*, seed: int, items: int, open_items: int, pool: int) -> Findings:
    """Run it.

    Args:
        seed: seed of the examples and the intervals.
        items: inputs of each target with labels.
        open_items: inputs of each open target.
        pool: labelled examples of each source; the target's own inputs are none of them.
    """
    from actlas.data.single_token import Tokens
    from actlas.models import load
    from actlas.papers.reproductions.cross_task_sets import task_sets
    from actlas.select.cross_task import Instructed

    model, encoder = load("smollm2"), load("minilm")
    sets = task_sets(Tokens(model.tokenizer), n=pool + items, seed=seed)
    sources, targets = [], []
    for task in sets:
        count = min(items if task.labels else open_items, len(task.examples) // 2)
        count -= count % 2
        targets.append(Instructed(task.name, task.instruction, task.examples[:count], task.labels))
        sources.append(Instructed(task.name, task.instruction, task.examples[count:], task.labels))
    runs = {t.name: _Target(model, encoder, t, sources) for t in targets}
    measured: list[Measurement] = []
    for run in runs.values():
        measured += run.measurements(seed)
    closed = [run for run in runs.values() if run.target.labels]
    measured += _gains(closed, seed)
    rows, found = _against_similarity(model, runs, targets, seed)
    measured += found
    note = f"{NOTE} Tokens cut from prompts: none (the longest has far fewer than the context)."
    return Findings(measured, _headline(Measured(measured)), note, [_plot(rows)])


NOTE = (
    "Published: Llama-2 7B and 13B and GPT-3.5, ten source and five target data sets, several examples; "
    "gains of 107%, 19% and 3% relative to zero-shot. Ours: SmolLM2-135M-Instruct, seven small template "
    "tasks, one example chosen by MiniLM's cosine with the target's input; outputs are one token, exact "
    "match is on the first token of all tokens, so nothing is generated. Gains are absolute, since "
    "zero-shot is near 0 in some tasks. The target's part of the prompt is the same bytes in every "
    "condition, labels are balanced. Copied: the answer is the example's output (where that is wrong). "
    "Open targets have no forced choice. The card's pilot, with five other tasks, saw gains for labelled "
    "targets and copying for open ones. Tried before: one small run with seed 7 (four inputs a target)."
)


class _Target:
    """One target under every condition."""

    def __init__(
        self, model: Model, encoder: Model, target: Instructed, sources: Sequence[Instructed]
    ) -> None:
        from actlas.select.cross_task import answer_prompts, cross_task_demos, cross_task_prompt, vote

        self.target = target
        inputs, right = [list(side) for side in zip(*target.examples, strict=True)]

        def ask(demos: Sequence[Any]) -> Any:
            prompts = [
                cross_task_prompt(target, i, [] if d is None else [d])
                for i, d in zip(inputs, demos, strict=True)
            ]
            return answer_prompts(model, target, prompts, right)

        self.zero = ask([None] * len(inputs))
        self.by_source: dict[str, Any] = {}
        self.copied: dict[str, Any] = {}
        for source in sources:
            chosen = cross_task_demos(encoder, source, inputs)
            answered = ask([(source, c) for c in chosen])
            name = "own task" if source.name == target.name else source.name
            self.by_source[name] = answered
            shown = [c[-1][1] for c in chosen]
            self.copied[name] = np.array(
                [s == o and o != r for s, o, r in zip(answered.said, shown, right, strict=True)]
            )
        self.pseudo = None
        if target.labels:
            votes = vote([a.chosen for name, a in self.by_source.items() if name != "own task"])
            labelled = type(target)(
                target.name, target.instruction, tuple(zip(inputs, votes, strict=True)), target.labels
            )
            nearest = cross_task_demos(encoder, labelled, inputs, same=True)
            self.pseudo = ask([(labelled, c) for c in nearest])

    def gain(self, answered: Any, judged: str) -> Any:
        """Return the gain over zero-shot of each item."""
        name = "exact" if judged == "exact" else "forced"
        return getattr(answered, name).astype(float) - getattr(self.zero, name).astype(float)

    def cross(self, judged: str) -> Any:
        """Return each item's gain, averaged over the sources."""
        others = [self.gain(a, judged) for name, a in self.by_source.items() if name != "own task"]
        return np.mean(others, 0)

    def gains(self, by: str, judged: str) -> Any:
        """Return each item's gain by examples of other tasks, of pseudo-labels or of the task itself."""
        if by == "cross-task":
            return self.cross(judged)
        return self.gain(self.pseudo if by == "pseudo-labels" else self.by_source[by], judged)

    def measurements(self, seed: int) -> list[Measurement]:
        """Return accuracies under every condition and how often the example's output is copied."""
        from actlas.core.intervals import wilson

        found = []
        conditions = {"zero-shot": self.zero, **self.by_source}
        if self.pseudo is not None:
            conditions["pseudo-labels"] = self.pseudo
        for name, answered in conditions.items():
            kinds = {"accuracy, exact": answered.exact}
            if self.target.labels:
                kinds["accuracy, forced choice"] = answered.forced
            if name in self.copied:
                kinds["copied"] = self.copied[name]
            for kind, x in kinds.items():
                low, high = wilson(float(x.sum()), len(x))
                found.append(
                    Measurement(
                        kind, float(x.mean()), "fraction", len(x), low, high, "wilson", seed,
                        group={"target": self.target.name, "example": name},
                    )
                )  # fmt: skip
        return found


def _gains(closed: Sequence[_Target], seed: int) -> list[Measurement]:
    from actlas.core.intervals import bootstrap_mean

    found = []
    for by in ("cross-task", "pseudo-labels", "own task"):
        for judged in ("exact", "forced choice"):
            x = np.concatenate([run.gains(by, judged) for run in closed])
            low, high = bootstrap_mean(x, seed=seed)
            found.append(
                Measurement(
                    "gain over zero-shot, two-label targets", float(x.mean()), "fraction", len(x), low, high,
                    "bootstrap over items", seed, group={"by": by, "judged": judged},
                )
            )  # fmt: skip
    return found


def _against_similarity(
    model: Model, runs: dict[str, _Target], targets: Sequence[Instructed], seed: int
) -> tuple[list[dict[str, Any]], list[Measurement]]:
    """Rank similarity of activations against gain over all pairs of source and target."""
    from scipy.stats import rankdata

    from actlas.core.intervals import bootstrap_statistic, divide
    from actlas.measure.task_similarity import task_similarity

    sites = [f"blocks.{b}.resid_post" for b in (4, 9, 14, 19, 24, 29)]
    prompts = {t.name: [t.ask(i) for i, _ in t.examples] for t in targets}
    similar = task_similarity(model, prompts, sites)
    pairs = [(s, t) for t in runs for s in runs if s != t]
    gain = np.array([float(runs[t].gain(runs[t].by_source[s], "exact").mean()) for s, t in pairs])
    measured = []
    for site in sites:
        near = np.array([similar.between(s, t, site) for s, t in pairs])

        def spearman(counts: Any, near: Any = near) -> Any:
            x, y = rankdata(near), rankdata(gain)
            total = counts.sum(1, keepdims=True)
            mx, my = counts @ x[:, None] / total, counts @ y[:, None] / total
            dx, dy = x[None] - mx, y[None] - my
            spread = np.sqrt((counts * dx**2).sum(1) * (counts * dy**2).sum(1))
            return divide((counts * dx * dy).sum(1), spread)

        value = float(spearman(np.ones((1, len(pairs))))[0])
        low, high = bootstrap_statistic(spearman, len(pairs), seed=seed)
        measured.append(
            Measurement(
                "similarity against gain", value, "rank correlation", len(pairs), low, high,
                "bootstrap over pairs of tasks", seed, group={"site": site},
                note="pairs share tasks, so the interval is narrower than it should be",
            )
        )  # fmt: skip
    rows = [
        {
            "similarity of activations": similar.between(s, t, SITE),
            "gain over zero-shot": float(g),
            "target": t,
        }
        for (s, t), g in zip(pairs, gain, strict=True)
    ]
    return rows, measured


def _headline(m: Measured) -> str:
    cross, own = _gain(m, "cross-task", "exact"), _gain(m, "own task", "exact")
    rank = m.get("similarity against gain", site=SITE)
    assert cross is not None and own is not None and rank is not None
    return (
        f"on targets with two labels an example of another task changes accuracy by {cross.value:+.0%} "
        f"points (of the same task {own.value:+.0%}); similarity ranks with gain at {rank.value:+.2f}"
    )


def _plot(rows: list[dict[str, Any]]) -> Plot:
    return Plot(
        "Gain from another task's example, by how alike the tasks are",
        rows,
        "similarity of activations",
        "gain over zero-shot",
        "target",
        mark="point",
    )
