"""Examples of another task: a labelled example of a task that has labels, for a task that has none.

    Definition: {source instruction}          k labelled examples of the source task
    Input: ...
    Output: ...

    Definition: {target instruction}          the same bytes with and without examples
    Input: ...
    Output:

Which examples: the k source items nearest to the target input in a sentence encoder (`cross_task_demos`).
Which source task: the one whose activations are most like the target's (`best_source`), which needs no label.
A target without labels can also be labelled by the vote of several sources (`vote`) and then give its own
examples.

Source: Chatterjee et al. 2024, "Language Models can Exploit Cross-Task In-context Learning for Data-Scarce
Novel Tasks" (arXiv 2405.10548), and its code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.measure.task_similarity import Tokens, task_similarity
from actlas.measure.tasks import last_logits

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(frozen=True)
class Instructed:
    """A task as an instruction and examples.

    Attributes:
        name: the task.
        instruction: what is to be done, one line.
        examples: (input, output).
        labels: the outputs that are allowed; empty for open tasks.
    """

    name: str
    instruction: str
    examples: tuple[tuple[str, str], ...]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.instruction.strip() or not self.examples:
            raise InputError(f"the task {self.name!r} needs an instruction and at least one example")
        wrong = [o for _, o in self.examples if not o.strip() or (self.labels and o not in self.labels)]
        if wrong:
            known = ", ".join(self.labels) or "those that say something"
            raise InputError(f"{wrong[0]!r} is an output of {self.name!r} but none of {known}")

    def ask(self, text: str) -> str:
        """Return the target part of a prompt: definition, input, and where the output goes."""
        return f"Definition: {self.instruction}\nInput: {text}\nOutput:"

    def shown(self, examples: Sequence[tuple[str, str]]) -> str:
        """Return examples with their outputs under one definition."""
        lines = "".join(f"\nInput: {i}\nOutput: {o}" for i, o in examples)
        return f"Definition: {self.instruction}{lines}"


Demo = tuple[Instructed, Sequence[tuple[str, str]]]


def cross_task_prompt(target: Instructed, text: str, demos: Sequence[Demo] = ()) -> str:
    """Return a prompt: the examples of other tasks (or of the same), then the target part.

    The target part is the same with and without examples, so that what changes is the examples alone.
    """
    return "\n\n".join([*(task.shown(examples) for task, examples in demos), target.ask(text)])


def cross_task_demos(
    encoder: Model, pool: Instructed, queries: Sequence[str], k: int = 1, *, same: bool = False
) -> list[list[tuple[str, str]]]:
    """Return, for each query, the k examples of a pool whose inputs are nearest to it, nearest last.

    Args:
        encoder: a sentence encoder, e.g. `actlas.load("minilm")`.
        pool: the source task.
        queries: inputs of the target task.
        k: how many.
        same: the pool is the target task itself; an example with the query's own input is then left out.

    Raises:
        InputError: k below 1 or above what the pool has, or no queries.
    """
    from actlas.measure.encoder import embed

    room = len(pool.examples) - (1 if same else 0)
    if not 1 <= k <= room or not queries:
        raise InputError(f"k={k} with {len(queries)} queries; k must be 1 to {room}, queries at least 1")
    near = embed(encoder, list(queries)) @ embed(encoder, [i for i, _ in pool.examples]).T
    found = []
    for query, row in zip(queries, near, strict=True):
        order = [j for j in np.argsort(-row, kind="stable") if not (same and pool.examples[j][0] == query)]
        found.append([pool.examples[j] for j in reversed(order[:k])])
    return found


@dataclass(frozen=True, eq=False)
class Answered:
    """What a model answered.

    Attributes:
        exact: whether the first token is the right answer's, bool `[n]`.
        forced: whether the right label has the greatest logit of all labels, bool `[n]`; the same as exact
            for open tasks.
        said: the first token as text.
        chosen: the label with the greatest logit; the token said for open tasks.
    """

    exact: np.ndarray
    forced: np.ndarray
    said: tuple[str, ...]
    chosen: tuple[str, ...]


def answer_prompts(
    model: Model, target: Instructed, prompts: Sequence[str], right: Sequence[str]
) -> Answered:
    """Let a model answer; outputs are judged by their first token.

    Args:
        model: a causal language model with a tokenizer.
        target: the task, whose labels are the choices.
        prompts: whole prompts.
        right: the right output of each.

    Raises:
        ModelError: not a causal language model with a tokenizer.
        InputError: labels that begin with the same token, or lengths that differ.
    """
    if model.kind != "causal-lm" or model.tokenizer is None:
        raise ModelError(
            f"{model.name} is a model of kind {model.kind}; a causal-lm with a tokenizer is needed"
        )
    if not prompts or len(prompts) != len(right):
        raise InputError(f"{len(prompts)} prompts and {len(right)} outputs; give as many of both")
    first = {o: _first(model, o) for o in {*right, *target.labels}}
    if len({first[o] for o in target.labels}) < len(target.labels):
        raise InputError(f"two labels of {target.name!r} begin with the same token; they must differ")
    logits = dict(last_logits(model, prompts, what=f"answers to {target.name}"))
    said = [int(logits[i].argmax()) for i in range(len(prompts))]
    exact = np.array([s == first[r] for s, r in zip(said, right, strict=True)])
    words = tuple(str(model.tokenizer.decode([s])).strip() for s in said)
    if not target.labels:
        return Answered(exact, exact, words, words)
    ids = [first[label] for label in target.labels]
    chosen = tuple(target.labels[int(logits[i][ids].argmax())] for i in range(len(prompts)))
    forced = np.array([c == r for c, r in zip(chosen, right, strict=True)])
    return Answered(exact, forced, words, chosen)


def vote(answers: Sequence[Sequence[str]]) -> list[str]:
    """Return the answer that most sources gave to each item; of equally many the one given first.

    Args:
        answers: one list a source, each with one answer an item.

    Raises:
        InputError: no sources, or lists of different lengths.
    """
    if not answers or len({len(a) for a in answers}) != 1 or not answers[0]:
        raise InputError("a vote needs answers of at least one source, one for each item")
    return [Counter(column).most_common(1)[0][0] for column in zip(*answers, strict=True)]


def best_source(
    model: Model,
    target: Instructed,
    sources: Sequence[Instructed],
    site: str | None = None,
    *,
    tokens: Tokens = "last",
    most: int = 32,
) -> list[tuple[str, float]]:
    """Return source tasks by how alike the model's activations on them and on the target are, most first.

    No label is read: prompts end where the output would begin.

    Args:
        model: the model.
        target: the task to be helped.
        sources: the tasks that could help, at least two.
        site: where; two thirds of the depth by default.
        tokens: which token stands for a prompt.
        most: prompts of each task.

    Raises:
        InputError: fewer than two sources, or one with the target's name.
    """
    if len(sources) < 2 or target.name in {s.name for s in sources}:
        raise InputError(f"{len(sources)} sources for {target.name!r}; give at least 2 with other names")
    prompts = {t.name: [t.ask(i) for i, _ in t.examples[:most]] for t in (target, *sources)}
    found = task_similarity(model, prompts, site, tokens=tokens)
    ranked = [(s.name, found.between(target.name, s.name)) for s in sources]
    return sorted(ranked, key=lambda r: -r[1])


def _first(model: Model, output: str) -> int:
    ids: list[int] = model.tokenizer(f" {output}", add_special_tokens=False)["input_ids"]
    return int(ids[0])


@method(
    "best-source",
    room="select",
    returns="Measurement",
    data="task",
    summary="which other tasks a model finds most like a task, to take examples from (no labels needed)",
    example="actlas fit best-source smollm2 sentiment --option sources=ioi,capitals,true-false",
    papers=("cross-task-icl",),
)
def fit_best_source(
    model: Model,
    data: Any,
    *,
    sources: str = "capitals,ioi,agreement,true-false,multiple-choice",
    site: str = "",
    prompts: int = 16,
    seed: int = 0,
) -> tuple[Measurement, ...]:
    """Return the similarity of a task with each of some others, most alike first.

    Args:
        model: a causal language model with a tokenizer.
        data: the target task.
        sources: names of tasks, with commas between.
        site: where; two thirds of the depth by default.
        prompts: prompts of each task.
        seed: of the tasks and the intervals.
    """
    from actlas.data import task

    names = [n.strip() for n in sources.split(",") if n.strip() and n.strip() != data.name]
    if len(names) < 2:
        raise InputError(f"sources={sources!r} names fewer than two tasks besides {data.name}; name more")
    texts = {data.name: [i.prompt for i in data][:prompts]}
    for name in names:
        texts[name] = [i.prompt for i in task(name, model.tokenizer, n=prompts, seed=seed)]
    found = task_similarity(model, texts, site or None).measurements(seed=seed)
    mine = [m for m in found if data.name in m.group["tasks"].split(" / ")]
    return tuple(sorted(mine, key=lambda m: -m.value))
