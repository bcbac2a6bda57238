"""Prompt pairs: clean and corrupted prompts that match token by token, with one-token answers.

    pairs = PromptPairs.from_task(model, "ioi", n=32)
    pairs.clean["input_ids"]        # [n, pos], padded on the left, so the last column is the last token
    pairs.changed                   # [n], the first column in which clean and corrupted prompt differ
    pairs.difference                # logit(answer) - logit(wrong) on the clean prompts, [n]

Patching compares two runs position by position, so the two prompts of a pair must have equally many
tokens; and it judges by the logits of single tokens, so each answer must be one token (answers that share
a first piece would fake a perfect score). Both are checked here, and so is whether the model can do the
task at all: the parts that cause a behaviour cannot be found in a model that does not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.pair_rows import check_lengths, encode_left, pair_row, with_positions
from actlas.circuits.prefix import KeysValues
from actlas.core.errors import InputError, ModelError
from actlas.data.task_items import Task, TaskItem
from actlas.measure.likelihood import output_logits, takes_option

if TYPE_CHECKING:
    from actlas.core.model import Model

CHANCE = 0.5
MARGIN = 0.2
"""A model must be right on 20% more of the clean prompts than guessing between two answers would be."""
_DRAWN = 4  # times as many items are drawn when only those that the model gets right are kept


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Clean and corrupted prompts.

    Attributes:
        clean, corrupt: the model's arguments, `input_ids` and `attention_mask` `[n, pos]`, and
            `position_ids` where the model takes them; rows are padded on the left.
        answer_ids: the token that is right after the clean prompt, `[n]`.
        wrong_ids: the token that is right after the corrupted prompt or, where that is the same, the most
            tempting wrong answer, `[n]`.
        texts: (clean, corrupted) prompts; empty strings if only ids are known.
        task: name of the task.
        items: the task items behind the rows; empty if there are none.
        difference, corrupt_difference: logit(answer) - logit(wrong) after each prompt, `[n]` float32.
        named: columns with a name, `[n]` each, besides `"changed"` and `"last"`.
        decode: from a token id to its text, if the model has a tokenizer.
        note: what a reader must know.
    """

    clean: Mapping[str, Tensor]
    corrupt: Mapping[str, Tensor]
    answer_ids: Tensor
    wrong_ids: Tensor
    texts: tuple[tuple[str, str], ...]
    task: str
    items: tuple[TaskItem, ...] = field(default=(), repr=False)
    difference: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    corrupt_difference: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    named: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    decode: Callable[[int], str] | None = field(default=None, repr=False)
    note: str = ""

    # -- making them ------------------------------------------------------------------------------

    @classmethod
    def from_task(
        cls,
        model: Model,
        task: str | Task | Sequence[TaskItem] | Sequence[Mapping[str, str]],
        *,
        n: int = 32,
        seed: int = 0,
        variant: str | None = None,
        correct_only: bool = False,
        force: bool = False,
    ) -> PromptPairs:
        """Make pairs of a task.

        Args:
            model: a causal language model with a tokenizer.
            task: a task's name, a task, task items with counterfactuals, or records with `clean`,
                `corrupt`, `answer` and `wrong`.
            n: at most so many pairs.
            seed: of the task, if its name is given.
            variant: corrupt by this attribute of the items (`"IO"`, `"S"`, `"Pos"` of `ioi`) instead of by
                their counterfactual.
            correct_only: leave out pairs on whose clean prompt the model is wrong.
            force: go on although the model fails the task.

        Raises:
            InputError: pairs of different lengths, answers of more than one token, no counterfactuals, or
                a task that the model fails.
            ModelError: not a causal language model, or no tokenizer.
        """
        if model.kind != "causal-lm" or model.tokenizer is None:
            raise ModelError(
                f"{model.name} is a model of kind {model.kind}; a causal-lm with a tokenizer is needed"
            )
        if n < 1:
            raise InputError(f"n={n} leaves no pair; ask for at least 1")
        wanted = n * _DRAWN if correct_only else n
        if isinstance(task, str):
            from actlas.data import task as make_task

            task = make_task(task, model.tokenizer, n=wanted, seed=seed)
        name = task.name if isinstance(task, Task) else "pairs"
        given: list[Any] = list(task)[:wanted]
        rows = [pair_row(model, item, i, variant) for i, item in enumerate(given)]
        if not rows:
            raise InputError("there is no pair; give at least one")
        texts = [r[0] for r in rows], [r[1] for r in rows]
        check_lengths(model, *texts)
        made = cls(
            clean=encode_left(model, texts[0]),
            corrupt=encode_left(model, texts[1]),
            answer_ids=torch.tensor([r[2] for r in rows], device=model.device),
            wrong_ids=torch.tensor([r[3] for r in rows], device=model.device),
            texts=tuple(zip(*texts, strict=True)),
            task=name,
            items=tuple(r[4] for r in rows if r[4] is not None),
            decode=lambda i: str(model.tokenizer.decode([i])),
            note=task.note if isinstance(task, Task) else "",
        )
        made = made.measured(model)
        if correct_only:
            right = (made.difference > 0).nonzero()[:, 0][:n]
            if not len(right):
                raise InputError(f"{model.name} is wrong on all {len(made)} clean prompts of {name}")
            count = int((made.difference > 0).sum())
            note = f"{count} of {len(made)} clean prompts are answered right; the others are left out"
            return replace(made.take(right), note="; ".join(filter(None, (made.note, note))))
        return made.checked(model, force=force)

    @classmethod
    def from_ids(
        cls,
        model: Model,
        clean: Tensor,
        corrupt: Tensor,
        answer_ids: Tensor,
        wrong_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        task: str = "pairs",
        force: bool = False,
    ) -> PromptPairs:
        """Make pairs of token ids `[n, pos]`, padded on the left where `attention_mask` is 0.

        Raises:
            InputError: shapes that differ, answers that are equal, or a task that the model fails.
        """
        if clean.shape != corrupt.shape or clean.ndim != 2:
            raise InputError(
                f"the ids have shapes {list(clean.shape)} and {list(corrupt.shape)}; both must be [n, pos]"
            )
        if answer_ids.shape != clean.shape[:1] or wrong_ids.shape != clean.shape[:1]:
            raise InputError(f"{len(clean)} pairs need {len(clean)} answer_ids and wrong_ids, one each")
        if bool((answer_ids == wrong_ids).any()):
            raise InputError("the right and the wrong answer of a pair are the same token; they must differ")
        mask = torch.ones_like(clean) if attention_mask is None else attention_mask.long()
        sides = [with_positions(model, {"input_ids": x, "attention_mask": mask}) for x in (clean, corrupt)]
        moved = [{k: v.to(model.device) for k, v in side.items()} for side in sides]
        ids = (answer_ids.to(model.device), wrong_ids.to(model.device))
        made = cls(moved[0], moved[1], *ids, (("", ""),) * len(clean), task)
        return made.measured(model).checked(model, force=force)

    # -- what they are ----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.answer_ids)

    @property
    def width(self) -> int:
        """Columns, padding included."""
        return self.clean["input_ids"].shape[1]

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, `[n]`."""
        return self.clean["attention_mask"].sum(1)

    @property
    def changed(self) -> Tensor:
        """First column in which the prompts of each pair differ, `[n]`: before it nothing can differ."""
        differs = self.clean["input_ids"] != self.corrupt["input_ids"]
        return differs.to(torch.int8).argmax(1)

    def column(self, position: int | str) -> Tensor:
        """Return the column of a position in each row, `[n]`: `"changed"`, `"last"`, a name, or -1, -2, ...

        Raises:
            InputError: a name that is not known.
        """
        if isinstance(position, int):
            return torch.full_like(self.answer_ids, self.width + position)
        if position == "last":
            return self.column(-1)
        if position == "changed":
            return self.changed
        if position not in self.named:
            known = ", ".join(("all", "last", "changed", *self.named))
            raise InputError(f"there is no position {position!r}; it is {known} or a negative number")
        return self.named[position]

    @property
    def accuracy(self) -> float:
        """Share of clean prompts after which the answer's logit is above the wrong one's."""
        return float((self.difference > 0).float().mean())

    @property
    def corrupt_accuracy(self) -> float:
        """Share of corrupted prompts after which the wrong answer's logit is above the answer's."""
        return float((self.corrupt_difference < 0).float().mean())

    def take(self, rows: Tensor | Sequence[int] | slice) -> PromptPairs:
        """Return the pairs of some rows, columns that are padding in all of them cut off."""
        index = torch.arange(len(self), device=self.answer_ids.device)
        index = index[torch.as_tensor(rows, device=index.device) if isinstance(rows, Sequence) else rows]
        mask = self.clean["attention_mask"][index]
        first = int(mask.any(0).to(torch.int8).argmax())
        cut = lambda side: {k: v[index][:, first:] for k, v in side.items()}  # noqa: E731
        chosen = index.tolist()
        return replace(
            self,
            clean=cut(self.clean),
            corrupt=cut(self.corrupt),
            answer_ids=self.answer_ids[index],
            wrong_ids=self.wrong_ids[index],
            texts=tuple(self.texts[i] for i in chosen),
            items=tuple(self.items[i] for i in chosen) if self.items else (),
            named={name: column[index] - first for name, column in self.named.items()},
            difference=self.difference[index] if len(self.difference) else self.difference,
            corrupt_difference=(
                self.corrupt_difference[index] if len(self.corrupt_difference) else self.corrupt_difference
            ),
        )

    def last_logits(self, model: Model, side: str = "clean") -> Tensor:
        """Return the logits after each prompt, `[n, vocab]` float32. Installed edits apply."""
        if side not in ("clean", "corrupt"):
            raise InputError(f"side is {side!r}; it must be 'clean' or 'corrupt'")
        options = {"logits_to_keep": 1} if takes_option(model, "logits_to_keep") else {}
        return output_logits(model, dict(getattr(self, side)), **options)[:, -1].float()

    def measured(self, model: Model) -> PromptPairs:
        """Return the same pairs with the logit differences of this model; what both sides share runs once."""
        first = int(self.changed.min())
        kept = KeysValues.run(model, self.clean, first)
        found = {}
        for side in ("clean", "corrupt"):
            if kept is None:
                logits = self.last_logits(model, side)
            else:
                with torch.no_grad():
                    output = model._call(kept.arguments(model, getattr(self, side), None, first))
                logits = output.logits[:, -1].float()
            picked = [logits.gather(1, ids[:, None])[:, 0] for ids in (self.answer_ids, self.wrong_ids)]
            found[side] = (picked[0] - picked[1]).cpu()
        return replace(self, difference=found["clean"], corrupt_difference=found["corrupt"])

    def checked(self, model: Model, *, force: bool = False) -> PromptPairs:
        """Return the pairs, or raise InputError if the model fails the task and `force` is not set."""
        if self.accuracy < CHANCE + MARGIN:
            said = (
                f"{model.name} is right on {self.accuracy:.0%} of the {len(self)} clean prompts of"
                f" {self.task} (guessing: {CHANCE:.0%})"
            )
            if not force:
                raise InputError(
                    f"{said}; there is no behaviour to explain. Use another task, correct_only or force"
                )
            return replace(self, note="; ".join(filter(None, (self.note, said))))
        return self
