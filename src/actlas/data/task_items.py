"""What a task is: prompts whose right continuation is one known token.

    items = task("ioi", model.tokenizer, n=64)
    items[0].prompt      # 'When Mary and John went to the store, John gave a book to'
    items[0].answer      # ' Mary'

One token, so that a logit is an answer: the logit difference between `answer_id` and `wrong_ids` at the
last position of the prompt is what a measure needs, and a counterfactual prompt has exactly as many tokens,
so that activations can be patched between the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

from actlas.data.single_token import Builder

Kind = Literal["completion", "classification", "choice"]


@dataclass(frozen=True)
class TaskItem:
    """One prompt with its right and wrong continuations.

    Attributes:
        id: unique in its task.
        prompt: what the model reads; the answer follows it directly.
        answer: the right continuation, with the space before it where the tokenizer wants it there.
        wrong: wrong continuations, the most tempting first.
        group: labels to disaggregate by.
        counterfactual: the same prompt changed so that the answer is one of the wrong ones; with a
            tokenizer it has as many tokens. `None` where there is no such change.
        answer_id, wrong_ids: the tokens of `answer` and `wrong` after this prompt; `None` and empty when
            the task was made without a tokenizer.
        stimulus: the text that is judged, without the question about it (sentiment, true-false).
        attributes: what the prompt was made of, e.g. `{"IO": "Mary", "S": "John", "Pos": "ABBA"}`: the
            variables that a model of the task must carry. Unlike `group` they may have many values.
        variants: the same prompt with one attribute changed, by attribute, with as many tokens.
    """

    id: str
    prompt: str
    answer: str
    wrong: tuple[str, ...]
    group: Mapping[str, str] = field(default_factory=dict)
    counterfactual: TaskItem | None = None
    answer_id: int | None = None
    wrong_ids: tuple[int, ...] = ()
    stimulus: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, TaskItem] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt with its right answer, so that items can be streamed like documents."""
        return self.prompt + self.answer

    @property
    def choices(self) -> tuple[str, ...]:
        """The right answer and then the wrong ones."""
        return (self.answer, *self.wrong)


@dataclass(frozen=True)
class TaskInfo:
    """A task that can be made.

    Attributes:
        name: what `task` is called with.
        kind: `"completion"` (the answer goes on with the text), `"classification"` (the answer is a label)
            or `"choice"` (the answer is the letter of an option).
        summary: one line for a list.
        groups: the labels every item carries.
        metric_doc: what a score on this task means.
        build: yields drafts of items without end; those that do not fit the tokenizer are left out.
        contrast: label and value that mark the positive side of a pair.
    """

    name: str
    kind: Kind
    summary: str
    groups: tuple[str, ...]
    metric_doc: str
    build: Callable[[Builder], Iterator[TaskItem]]
    contrast: tuple[str, str] | None = None


@dataclass(frozen=True)
class Task(Sequence[TaskItem]):
    """A fixed list of items. Indexing with a number gives an item, with a slice a smaller task.

    Attributes:
        items: the items, in the order they were drawn.
        seed: what they were drawn with.
        info: what kind of task it is.
        note: what a reader must know (fewer items than asked for, ...).
    """

    items: tuple[TaskItem, ...]
    seed: int
    info: TaskInfo
    note: str = ""

    @overload
    def __getitem__(self, index: int) -> TaskItem: ...
    @overload
    def __getitem__(self, index: slice) -> Task: ...
    def __getitem__(self, index: int | slice) -> TaskItem | Task:
        if isinstance(index, slice):
            return Task(self.items[index], self.seed, self.info, self.note)
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[TaskItem]:
        return iter(self.items)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.info.name

    @property
    def kind(self) -> Kind:
        """`"completion"`, `"classification"` or `"choice"`."""
        return self.info.kind

    @property
    def metric_doc(self) -> str:
        """What a score on this task means."""
        return self.info.metric_doc

    @property
    def chance(self) -> float:
        """Accuracy of picking among the right and wrong answers at random (a fraction)."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    @property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of all prompts and answers, in order."""
        rows = [(i.id, i.prompt, i.choices, i.answer_id, i.wrong_ids) for i in self.items]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()

    @property
    def groups(self) -> dict[str, dict[str, int]]:
        """How many items carry each value of each label."""
        counts: dict[str, dict[str, int]] = {}
        for item in self.items:
            for label, value in item.group.items():
                values = counts.setdefault(label, {})
                values[value] = values.get(value, 0) + 1
        return counts


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in one property, for contrastive methods such as difference of means.

    Attributes:
        id: the id of the item it came from.
        positive, negative: the texts.
        group: the item's labels.
        prompt: what both texts begin with, if that is known; else empty.
    """

    id: str
    positive: str
    negative: str
    group: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
