"""How well a language model does tasks: prompts with one right answer token and some wrong ones.

    task_measures(model, task)           # the four below from one pass, per group of items too
    task_accuracy(model, task)           the answer's logit is the greatest among answer and wrong ones
    task_top1(model, task)               the answer's logit is the greatest of the whole vocabulary
    task_logit_difference(model, task)   logit(answer) - mean logit(wrong)
    task_probability(model, task)        softmax probability of the answer

Prompts run in right-padded batches, which every causal model handles without position ids, and only
the logits of each prompt's last token are computed (`logits_to_keep`, where the model takes it). A
tie does not count as right: a model with constant logits scores 0, not chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.data.single_token import Tokens
from actlas.measure.likelihood import LOGIT_BYTES, output_logits, takes_option
from actlas.measure.registry import mark_under, measure
from actlas.measure.samples import mean_measurement, rate_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.data.task_items import Task, TaskItem

BATCH = 16


@dataclass(frozen=True)
class Answers:
    """What the model said about each item; arrays of shape [items].

    `correct` and `top1` are bool; `difference` is in logits, `probability` between 0 and 1.
    """

    correct: NDArray[np.bool_]
    top1: NDArray[np.bool_]
    difference: NDArray[np.float64]
    probability: NDArray[np.float64]


def answer(model: Model, task: Task, *, batch: int = BATCH) -> Answers:
    """Run every prompt of a task and compare the answer's logit with the others.

    Args:
        model: a causal language model with a tokenizer.
        task: items with `.prompt`, `.answer`, `.wrong`; answers must be one token each.
        batch: prompts in one forward pass.

    Raises:
        InputError: a task without items, an answer that is not one token, a wrong answer that is
            the same token as the right one, or a prompt longer than the model's context.
        ModelError: not a causal language model, or no tokenizer.
        NonFiniteError: NaN or infinity in the logits.
    """
    if model.kind != "causal-lm" or model.tokenizer is None:
        raise ModelError(
            f"{model.name} is a model of kind {model.kind}; a causal-lm with a tokenizer is needed"
        )
    items: list[TaskItem] = list(task.items)
    if not items:
        raise InputError(f"the task {task.name!r} has no items; at least one is needed")
    right, wrong = _answer_ids(model, items)
    correct, top1 = np.zeros(len(items), bool), np.zeros(len(items), bool)
    difference, probability = np.zeros(len(items)), np.zeros(len(items))
    rows = last_logits(model, [item.prompt for item in items], batch=batch, what=f"task {task.name}")
    for i, z in rows:
        z = z.double()
        others_z = z[wrong[i]]
        correct[i] = bool(z[right[i]] > others_z.max())
        top1[i] = int(z.argmax()) == right[i]
        difference[i] = float(z[right[i]] - others_z.mean())
        probability[i] = float((z[right[i]] - z.logsumexp(-1)).exp())
    return Answers(correct, top1, difference, probability)


def last_logits(
    model: Model, prompts: Sequence[str], *, batch: int = BATCH, what: str = "prompts"
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(index, logits [vocab])` of each prompt's last token, prompts of like length together."""
    lengths = [len(ids) for ids in model.tokenizer(list(prompts), verbose=False)["input_ids"]]
    if 0 in lengths:
        raise InputError(f"prompt {lengths.index(0)} of {what} is empty; a prompt needs at least one token")
    order = sorted(range(len(prompts)), key=lambda i: (lengths[i], i))
    takes_keep = takes_option(model, "logits_to_keep")
    with progress(what, total=len(prompts), unit="prompts") as advance:
        for some in _batches(order, lengths, batch, model.vocab_size or 50_000, takes_keep):
            inputs = model.encode([prompts[i] for i in some], padding_side="right")
            last = inputs["attention_mask"].sum(-1) - 1
            if takes_keep:
                keep, column = last.unique(return_inverse=True)
                logits = output_logits(model, inputs, logits_to_keep=keep)
            else:
                column = last
                logits = output_logits(model, inputs)
            for row, i in enumerate(some):
                z = logits[row, column[row]].float()
                if not bool(torch.isfinite(z.logsumexp(-1))):
                    raise NonFiniteError(
                        f"the logits of {model.name} hold NaN or infinity after prompt {prompts[i][:60]!r}"
                    )
                yield i, z
            advance(len(some))


def _batches(
    order: list[int], lengths: list[int], batch: int, width: int, takes_keep: bool
) -> Iterator[list[int]]:
    some: list[int] = []
    most = max(1, LOGIT_BYTES // (4 * width))
    for i in order:
        positions = len({lengths[j] for j in some} | {lengths[i]}) if takes_keep else lengths[i]
        if some and (len(some) == batch or positions * (len(some) + 1) > most):
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def _answer_ids(model: Model, items: Sequence[TaskItem]) -> tuple[list[int], list[list[int]]]:
    """Return the token of each answer and of its wrong answers, as they stand after the prompt.

    Items that were made for a tokenizer know them; the others are looked up and checked here.
    """
    tokens = Tokens(model.tokenizer)

    def one(item: TaskItem, text: str) -> int:
        found = tokens.one(item.prompt, text)
        if found is None:
            pieces = model.tokenizer.convert_ids_to_tokens(list(tokens.ids(text)))
            raise InputError(
                f"the answer {text!r} of item {item.id!r} must be one token for {model.name}, it is {pieces}"
            )
        return found

    right, wrong = [], []
    for item in items:
        answer_id = one(item, item.answer) if item.answer_id is None else item.answer_id
        others = list(item.wrong_ids) or [one(item, text) for text in item.wrong]
        if not others:
            raise InputError(f"item {item.id!r} has no wrong answer to compare {item.answer!r} with")
        if answer_id in others:
            same = item.wrong[others.index(answer_id)]
            raise InputError(
                f"item {item.id!r}: the wrong answer {same!r} is the same token as the answer {item.answer!r}"
            )
        right.append(answer_id)
        wrong.append(others)
    return right, wrong


@mark_under
def task_measures(
    model: Model, task: Task | Iterable[Task], *, seed: int = 0, groups: bool = True, batch: int = BATCH
) -> list[Measurement]:
    """Measure accuracy, top-1 accuracy, logit difference and answer probability in one pass.

    Args:
        model: a causal language model with a tokenizer.
        task: one task or several.
        seed: of the bootstrap, for the record of Wilson's intervals.
        groups: also give each measure for every value of every item label.
        batch: prompts in one forward pass.

    Returns:
        For each task the four measures over all items (group `{"task": name}`), then by label.
        `details["chance"]` of an accuracy is what guessing reaches.
    """
    out: list[Measurement] = []
    for one in _tasks(task):
        answers = answer(model, one, batch=batch)
        slices: list[tuple[dict[str, str], NDArray[np.int64]]] = [({}, np.arange(len(one.items)))]
        if groups:
            slices += _slices([item.group for item in one.items])
        for group, rows in slices:
            out += [make(one, answers, rows, {"task": one.name, **group}, seed) for make in _MAKERS.values()]
    return out


def _accuracy(
    task: Task, a: Answers, rows: NDArray[np.int64], group: Mapping[str, str], seed: int
) -> Measurement:
    chance = float(np.mean([1 / (1 + len(task.items[i].wrong)) for i in rows]))
    return rate_measurement(
        "task-accuracy",
        a.correct[rows],
        seed=seed,
        better="higher",
        group=group,
        details={"chance": chance},
        note=f"guessing reaches {chance:.0%}",
    )


def _top1(
    task: Task, a: Answers, rows: NDArray[np.int64], group: Mapping[str, str], seed: int
) -> Measurement:
    return rate_measurement("task-top1", a.top1[rows], seed=seed, better="higher", group=group)


def _difference(
    task: Task, a: Answers, rows: NDArray[np.int64], group: Mapping[str, str], seed: int
) -> Measurement:
    return mean_measurement(
        "task-logit-difference",
        "logits",
        a.difference[rows],
        seed=seed,
        over="items",
        better="higher",
        group=group,
        details={"chance": 0.0},
    )


def _probability(
    task: Task, a: Answers, rows: NDArray[np.int64], group: Mapping[str, str], seed: int
) -> Measurement:
    return mean_measurement(
        "task-probability",
        "fraction",
        a.probability[rows],
        seed=seed,
        over="items",
        better="higher",
        group=group,
    )


_Maker = Callable[["Task", Answers, NDArray[np.int64], Mapping[str, str], int], Measurement]
_MAKERS: dict[str, _Maker] = {
    "task-accuracy": _accuracy,
    "task-top1": _top1,
    "task-logit-difference": _difference,
    "task-probability": _probability,
}


@measure(
    "task-accuracy",
    summary="share of prompts whose right answer beats the wrong ones offered",
    unit="fraction",
    needs=("causal-lm",),
    data="task",
    together=task_measures,
)
def task_accuracy(model: Model, task: Task, *, seed: int = 0, batch: int = BATCH) -> Measurement:
    """Return how often the answer has the greatest logit among answer and wrong answers."""
    return _one(_accuracy, model, task, seed, batch)


@measure(
    "task-top1",
    summary="share of prompts whose right answer is the model's first guess of all tokens",
    unit="fraction",
    needs=("causal-lm",),
    data="task",
    together=task_measures,
)
def task_top1(model: Model, task: Task, *, seed: int = 0, batch: int = BATCH) -> Measurement:
    """Return how often the answer has the greatest logit of the vocabulary."""
    return _one(_top1, model, task, seed, batch)


@measure(
    "task-logit-difference",
    summary="by how many logits the right answer leads the wrong ones",
    unit="logits",
    needs=("causal-lm",),
    data="task",
    together=task_measures,
)
def task_logit_difference(model: Model, task: Task, *, seed: int = 0, batch: int = BATCH) -> Measurement:
    """Return the mean of `logit(answer) - mean logit(wrong)`; 0 is no preference."""
    return _one(_difference, model, task, seed, batch)


@measure(
    "task-probability",
    summary="probability that the model gives the right answer",
    unit="fraction",
    needs=("causal-lm",),
    data="task",
    together=task_measures,
)
def task_probability(model: Model, task: Task, *, seed: int = 0, batch: int = BATCH) -> Measurement:
    """Return the mean softmax probability of the answer over the whole vocabulary."""
    return _one(_probability, model, task, seed, batch)


def _one(make: _Maker, model: Model, task: Task, seed: int, batch: int) -> Measurement:
    answers = answer(model, task, batch=batch)
    return make(task, answers, np.arange(len(task.items)), {"task": task.name}, seed)


def _tasks(task: Task | Iterable[Task]) -> list[Any]:
    many = [task] if hasattr(task, "chance") else list(task)
    if not many:
        raise InputError("no task was given; at least one is needed")
    return many


def _slices(labels: Sequence[Mapping[str, str]]) -> Iterator[tuple[dict[str, str], NDArray[np.int64]]]:
    """Yield each label and value with the items that carry it; a label with one value is no slice."""
    for key in sorted({k for g in labels for k in g}):
        values = sorted({g[key] for g in labels if key in g})
        for value in values if len(values) > 1 else ():
            yield {key: value}, np.array([i for i, g in enumerate(labels) if g.get(key) == value])
