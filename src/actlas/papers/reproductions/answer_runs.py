"""Answers under several edits, side by side: length, ends, rightness, each against its controls.

runs = AnswerRuns(model, questions, answers, cap=64, seed=0)
runs.write("base"); runs.write("steered", edit); runs.write("random 1", other)
runs.length_change("steered", "base")          # paired over prompts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.edit import Edit
from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.measure.answer_length import Written, holds_answer, measure_written, write_answers
from actlas.measure.statistics import bootstrap_ratio, mean_measurement, paired_difference


class AnswerRuns:
    """Writes answers to the same questions under one edit after the other and compares them.

    Args:
        model: a chat model.
        questions, answers: the questions with their right answers.
        cap: most tokens of an answer.
        seed: of the bootstraps (and of sampling).
        temperature: 0 is greedy.
        repeats: how often each question is answered (sampled); numbers are means over a question's answers.
        batch: answers that are written at once.
    """

    def __init__(
        self,
        model: Model,
        questions: Sequence[str],
        answers: Sequence[str],
        *,
        cap: int,
        seed: int,
        temperature: float = 0.0,
        repeats: int = 1,
        batch: int = 128,
    ) -> None:
        self.model, self.repeats, self.asked = model, repeats, len(questions)
        self.prompts = [q for q in questions for _ in range(repeats)]
        self.answers = [a for a in answers for _ in range(repeats)]
        self.cap, self.seed, self.temperature, self.batch = cap, seed, temperature, batch
        self.written: dict[str, Written] = {}

    def write(self, runs: Mapping[str, Edit | None]) -> None:
        """Write the answers under each edit and keep them by its name, all in the same batches."""
        names = list(runs)
        prompts = [p for p in self.prompts for _ in names]
        edits = [runs[name] for _ in self.prompts for name in names]
        self._keep(names, prompts, edits)

    def write_asked(self, name: str, instruction: str) -> None:
        """Write the answers to the questions with a line before them, without an edit."""
        self._keep([name], [f"{instruction}\n{p}" for p in self.prompts], None)

    def _keep(self, names: list[str], prompts: list[str], edits: list[Edit | None] | None) -> None:
        whole = write_answers(
            self.model,
            prompts,
            max_new_tokens=self.cap,
            temperature=self.temperature,
            seed=self.seed,
            batch=self.batch,
            edits=edits,
        )
        for k, name in enumerate(names):
            own = slice(k, None, len(names))
            self.written[name] = replace(
                whole,
                prompts=whole.prompts[own],
                texts=whole.texts[own],
                tokens=whole.tokens[own],
                ended=whole.ended[own],
            )

    def tokens(self, *names: str) -> NDArray[np.float64]:
        """Return the length of each answer, averaged over runs, `[n]`."""
        return self._by_question([self.written[name].tokens for name in names])

    def right(self, *names: str) -> NDArray[np.float64]:
        """Return whether each answer is right, averaged over runs, `[n]`."""
        rows = [
            [holds_answer(t, a) for t, a in zip(self.written[n].texts, self.answers, strict=True)]
            for n in names
        ]
        return self._by_question(rows)

    def ended(self, *names: str) -> NDArray[np.float64]:
        """Return whether each answer ended by itself, averaged over runs, `[n]`."""
        return self._by_question([self.written[name].ended for name in names])

    def measured(self, name: str) -> list[Measurement]:
        """Return length, ends and accuracy of a run, `group["run"]` its name."""
        if self.repeats == 1:
            return measure_written(self.written[name], self.answers, cap=self.cap, seed=self.seed, run=name)
        rows = (
            ("answer-length", "tokens", self.tokens(name)),
            ("answer-ended", "fraction", self.ended(name)),
            ("answer-accuracy", "fraction", self.right(name)),
        )
        note = f"mean of {self.repeats} sampled answers a question"
        return [
            mean_measurement(
                what, unit, values, seed=self.seed, over="questions", group={"run": name}, note=note
            )
            for what, unit, values in rows
        ]

    def length_change(self, name: str, *others: str, label: str) -> Measurement:
        """Return the length of a run minus the mean of others, paired over prompts."""
        return self._change(label, "tokens", self.tokens(*others), self.tokens(name), "lower")

    def accuracy_change(self, name: str, *others: str, label: str) -> Measurement:
        """Return the share of right answers of a run minus that of others, paired over prompts."""
        return self._change(label, "fraction", self.right(*others), self.right(name), "higher")

    def length_ratio(self, name: str, other: str, *, label: str) -> Measurement:
        """Return the tokens of a run over those of another, whole questions drawn."""
        one, base = self.tokens(name), self.tokens(other)
        low, high = bootstrap_ratio(one, base, seed=self.seed)
        return Measurement(
            label,
            float(one.sum() / base.sum()),
            "ratio",
            len(one),
            low,
            high,
            "bootstrap over questions",
            self.seed,
            better="lower",
        )

    def _by_question(self, rows: Sequence[Any]) -> NDArray[np.float64]:
        return np.mean(rows, axis=0).astype(np.float64).reshape(self.asked, self.repeats).mean(1)

    def _change(
        self, label: str, unit: str, base: NDArray[np.float64], other: NDArray[np.float64], better: str
    ) -> Measurement:
        gap = paired_difference(base, other, seed=self.seed)
        return Measurement(
            label,
            gap.value,
            unit,
            gap.n,
            gap.low,
            gap.high,
            "paired bootstrap over prompts",
            self.seed,
            better="lower" if better == "lower" else "higher",
        )
