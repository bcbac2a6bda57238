"""A task's prompts, read once at some sites, and run again with other activations there.

    runs = TaskRuns(model, task("ioi", model.tokenizer), "blocks.21.resid_post")
    runs.values["blocks.21.resid_post"]       # [prompts, d], the last token of each prompt
    runs.clean.difference                     # [prompts], logit(answer) - logit(wrong)
    runs.run({"blocks.21.resid_post": new}).difference

Prompts of equal length share a batch, so nothing is padded. The model is cut at the first site
(`split_at`), so that a run costs only the blocks behind it; at later sites the given activations are
written while those blocks run. With several sites every activation of the cross-section is given, so the
order in which the sites stand does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.edits import Replace
from actlas.core.errors import InputError, ModelError, NonFiniteError, ShapeError
from actlas.core.layout import ATTENTION_KINDS
from actlas.core.splitting import SplitState, split_at
from actlas.measure.likelihood import takes_option

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.data.task_items import TaskItem

Position = Literal["last", "first"] | int
BATCH = 32


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the model said after each prompt.

    Attributes:
        difference: float64 `[n]`, logit of the answer minus mean logit of the wrong answers.
        token: int64 `[n]`, the token of greatest logit in the whole vocabulary.
    """

    difference: Tensor
    token: Tensor


@dataclass(frozen=True, eq=False)
class _Batch:
    rows: list[int]
    place: int  # column of the token that is read and written
    state: SplitState


class TaskRuns:
    """Prompts whose activations at some sites can be read and replaced.

    Args:
        model: a causal language model with a tokenizer.
        items: prompts with their answers' tokens (made with `task(name, model.tokenizer)`).
        sites: one name or several, each of one site with channels for every token.
        position: which token's activation: `"last"`, `"first"` or a number (negative ones count back).
        batch: prompts in one forward pass.

    Raises:
        InputError: no items, answers without tokens, a position that a prompt has not got.
        ModelError: not a causal language model.
        SiteError: a pattern that names several sites.
    """

    def __init__(
        self,
        model: Model,
        items: Sequence[TaskItem],
        sites: str | Sequence[str],
        *,
        position: Position = "last",
        batch: int = BATCH,
    ) -> None:
        if model.kind != "causal-lm" or model.tokenizer is None:
            raise ModelError(
                f"{model.name} is a model of kind {model.kind}; a causal-lm with a tokenizer is needed"
            )
        self.model, self.items = model, list(items)
        if not self.items:
            raise InputError("there are no prompts; give a task with at least one item")
        for item in self.items:
            if item.answer_id is None or not item.wrong_ids:
                raise InputError(
                    f"item {item.id!r} does not know its answers' tokens; make the task with model.tokenizer"
                )
        names = [sites] if isinstance(sites, str) else list(sites)
        self.sites = _in_order([s for name in names for s in model.resolve(name)])
        self._keeps_last = takes_option(model, "logits_to_keep")
        self._head, self._tail = split_at(model, self.sites[0].name)
        self._batches = [self._read(rows, position) for rows in self._equal_lengths(batch)]
        self.values = self._values()

    @cached_property
    def clean(self) -> Outcome:
        """What the model says with its own activations."""
        return self.run({})

    @property
    def batches(self) -> list[tuple[list[int], int]]:
        """The prompts that run together, and the column of the token that is read, for each batch."""
        return [(batch.rows, batch.place) for batch in self._batches]

    def __len__(self) -> int:
        return len(self.items)

    def run(self, new: Mapping[str, Tensor]) -> Outcome:
        """Run all prompts with these activations in place of their own.

        Args:
            new: `[n, d]` (heads joined) by site name; sites left out keep the prompt's own.

        Raises:
            InputError: a site that was not read.
            ShapeError: activations of another shape.
            NonFiniteError: NaN or infinity among them.
        """
        for name, value in new.items():
            if name not in self.values:
                raise InputError(f"the prompts were read at {', '.join(self.values)}, not at {name!r}")
            if value.shape != self.values[name].shape:
                raise ShapeError(
                    f"new activations at {name} are {list(value.shape)}; they must be "
                    f"{list(self.values[name].shape)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(f"the new activations at {name} hold NaN or infinity")
        difference = torch.zeros(len(self), dtype=torch.float64)
        token = torch.zeros(len(self), dtype=torch.int64)
        for batch in self._batches:
            logits = self._logits(batch, new).to("cpu", torch.float64)
            if not bool(torch.isfinite(logits).all()):
                raise NonFiniteError(f"the logits of {self.model.name} hold NaN or infinity in this run")
            token[batch.rows] = logits.argmax(-1)
            for z, i in zip(logits, batch.rows, strict=True):
                item = self.items[i]
                difference[i] = z[item.answer_id] - z[list(item.wrong_ids)].mean()
        return Outcome(difference, token)

    def _logits(self, batch: _Batch, new: Mapping[str, Tensor]) -> Tensor:
        first, edits = self.sites[0], []
        whole: Tensor | None = None
        for site in self.sites:
            if site.name not in new:
                continue
            value = new[site.name][batch.rows]
            if site is first:
                whole = batch.state.activation.clone()
                whole[:, batch.place] = value.to(whole).reshape(whole[:, batch.place].shape)
            else:
                edits.append(_write(site, value, batch.place))
        options = {"logits_to_keep": 1} if self._keeps_last else {}
        if edits:
            with self.model.edit(*edits):
                output = self._tail(batch.state, whole, **options)
        else:
            output = self._tail(batch.state, whole, **options)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _equal_lengths(self, size: int) -> list[list[int]]:
        lengths = [
            len(ids)
            for ids in self.model.tokenizer([i.prompt for i in self.items], verbose=False)["input_ids"]
        ]
        if 0 in lengths:
            raise InputError(f"prompt {lengths.index(0)} is empty; a prompt needs at least one token")
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            groups.setdefault(length, []).append(i)
        return [
            rows[start : start + size]
            for _, rows in sorted(groups.items())
            for start in range(0, len(rows), size)
        ]

    def _read(self, rows: list[int], position: Position) -> _Batch:
        state = self._head([self.items[i].prompt for i in rows])
        length = state.encoded["input_ids"].shape[1]
        wanted = {"last": -1, "first": 0}.get(position, position) if isinstance(position, str) else position
        if isinstance(wanted, str):
            raise InputError(f"position is {position!r}; it must be 'last', 'first' or a number")
        place = wanted + length if wanted < 0 else wanted
        if not 0 <= place < length:
            raise InputError(f"position {wanted} does not exist in a prompt of {length} tokens")
        if state.activation.ndim < 3 or state.activation.shape[1] != length:
            raise InputError(f"{self.sites[0].name} has no activation for every token")
        return _Batch(rows, place, state)

    def _values(self) -> dict[str, Tensor]:
        """Return the activations of all prompts by site, float32 `[n, d]`."""
        later: list[dict[str, Tensor]] = []
        if len(self.sites) > 1:
            for batch in self._batches:
                trace = self.model.trace([self.items[i].prompt for i in batch.rows], self.sites[1:])
                later.append({s.name: trace[s.name][:, batch.place] for s in self.sites[1:]})
        found: dict[str, Any] = {}
        order = torch.tensor([i for batch in self._batches for i in batch.rows]).argsort()
        for site in self.sites:
            if site is self.sites[0]:
                parts = [batch.state.activation[:, batch.place] for batch in self._batches]
            else:
                parts = [part[site.name] for part in later]
            found[site.name] = torch.cat([p.flatten(1).to("cpu", torch.float32) for p in parts])[order]
        return found


def _write(site: Site, value: Tensor, place: int) -> Edit:
    shape = site.features if site.features is not None and len(site.features) > 1 else value.shape[1:]
    whole = value.new_zeros(len(value), place + 1, *shape)
    whole[:, place] = value.reshape(len(value), *shape)
    return Replace(site.name, whole).at(positions=place)


def _in_order(sites: list[Site]) -> list[Site]:
    """Return the sites, the one before which a model is cut first.

    Raises:
        InputError: none, one twice, or one of attention scores or outside the blocks.
    """
    if not sites:
        raise InputError("no site was given; give one, e.g. blocks.21.resid_post")
    if len({s.name for s in sites}) < len(sites):
        raise InputError(f"a site is named twice: {', '.join(s.name for s in sites)}")
    for site in sites:
        if site.kind in ATTENTION_KINDS or site.kind in ("module", "logits"):
            raise InputError(
                f"{site.name} cannot be replaced token by token; give a site such as blocks.21.resid_post"
            )

    def depth(site: Site) -> tuple[float, int]:
        if site.block is None:
            return (-1.0 if site.kind == "embed" else float("inf"), 0)
        return (float(site.block), int(site.kind == "resid_post"))

    return sorted(sites, key=depth)
