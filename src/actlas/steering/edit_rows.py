"""Writing a fact into one MLP's output matrix: cached prompts, and the loss of a changed matrix.

The matrix of block l decides nothing that happens before it, so the model runs up to block l once for each
fact, and every optimiser step runs only the blocks from l on (`core.splitting`):

    rows = write_rows(model, block, prompts, target)
    loss = rows.loss(delta)              # cross-entropy of the target under W + delta, with a graph

All knowledge editors of this room share this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from actlas.core.continuations import Continuations, continuations
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.hooks import attach
from actlas.core.layout import find, forward_parameters, weight_matrix
from actlas.core.progress import progress
from actlas.core.splitting import split_at
from actlas.core.weight_edit import WeightEdit
from actlas.steering.dual_memory import output_matrix

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.data.edit_requests import EditRequest

_STARTS = ("I", "You", "Because", "Yes", "The", "In", "It", "When", "Many", "A")


class Editor(Protocol):
    """What takes facts one after the other and gives, at any time, the edit that holds them all."""

    def add(self, request: EditRequest) -> int:
        """Write one more fact; return how many optimiser steps it took."""
        ...

    def edit(self) -> Edit:
        """Return the edit that holds the facts so far."""
        ...


@dataclass(frozen=True, eq=False)
class Matrix:
    """The output matrix that is edited.

    Attributes:
        block: its block. path: its module. weight: `[out, in]`, the model's own.
    """

    model: Model
    block: int
    path: str
    weight: Tensor

    @classmethod
    def of(cls, model: Model, site: str | int | None, share: float) -> Matrix:
        """Return the matrix of a block.

        Args:
            model: a causal language model.
            site: a block's number, a site of that block such as `"blocks.25.mlp.out"`, or `None` for the
                block at `share` of the depth.
            share: between 0 (the first block) and 1 (the last).

        Raises:
            InputError, SiteError: not one block. ModelError: no dense MLP there.
        """
        if isinstance(site, str):
            blocks = {s.block for s in model.resolve(site)}
            if len(blocks) != 1 or None in blocks:
                raise InputError(f"{site!r} names no single block; facts are written into one MLP")
            (found,) = blocks
            assert found is not None
            block = found
        else:
            block = round(share * ((model.n_blocks or 1) - 1)) if site is None else site
        path = output_matrix(model, block)
        module = find(model.module, path)
        assert module is not None
        return cls(model, block % (model.n_blocks or 1), path, weight_matrix(module).detach())

    @property
    def reads(self) -> str:
        return f"blocks.{self.block}.mlp.act"

    @property
    def writes(self) -> str:
        return f"module:{self.path}"

    def weight_edit(self, delta: Tensor, note: str) -> WeightEdit:
        """Return the edit that adds `delta` `[out, in]` (GPT-2's Conv1D is stored transposed)."""
        turned = type(find(self.model.module, self.path)).__name__ == "Conv1D"
        stored = (delta.T if turned else delta).detach().clone().contiguous()
        made = WeightEdit({f"{self.path}.weight": stored}, note=note).bind(self.model.fingerprint)
        assert isinstance(made, WeightEdit)
        return made

    def activations(self, prompts: Sequence[str]) -> AtMatrix:
        """Return input and output of the matrix on prompts, without edits."""
        with self.model.without_edits():
            trace = self.model.trace(list(prompts), [self.reads, self.writes])
        a, y = trace[self.reads], trace[self.writes]
        real = trace.mask if trace.mask is not None else torch.ones(a.shape[:2], dtype=torch.bool)
        return AtMatrix(a.float(), y.float(), real.to(a.device))


@dataclass(frozen=True, eq=False)
class AtMatrix:
    """Input `a` and output `y` of the matrix, `[rows, tokens, in or out]`; `real` is no padding."""

    a: Tensor
    y: Tensor
    real: Tensor


@dataclass(frozen=True, eq=False)
class WriteRows:
    """Prompts that must give one target, cached up to the edited block.

    Attributes:
        prompts: input and output of the matrix at the prompts' tokens.
        a: its input at all columns, `[rows, columns, in]`.
        rows: the batch.
        loss: change of the matrix `[out, in]` -> cross-entropy of the target, nats per token.
        run: (function of the matrix's output) -> logits of the targets, for other ways to change it.
    """

    prompts: AtMatrix
    a: Tensor
    rows: Continuations
    loss: Callable[[Tensor], Tensor]
    run: Callable[[Callable[[Tensor], Tensor]], Tensor]


def write_rows(matrix: Matrix, prompts: Sequence[str], target: str) -> WriteRows:
    """Run prompts and target up to the edited block, once.

    Raises:
        InputError, ModelError: see `core.continuations`.
    """
    model = matrix.model
    rows = continuations(model, prompts, [target] * len(prompts))
    head, tail = split_at(model, f"blocks.{matrix.block}.resid_pre")
    with model.without_edits():
        trace = model.trace(rows.inputs, [matrix.reads, matrix.writes])
        state = head(rows.inputs)
    a, y = trace[matrix.reads].float(), trace[matrix.writes].float()
    n = rows.prompt_mask.shape[1]
    options: dict[str, Any] = {}
    if "logits_to_keep" in forward_parameters(model.module):
        options["logits_to_keep"] = rows.columns
    site = model.resolve(matrix.writes)[0]

    def run(change: Callable[[Tensor], Tensor]) -> Tensor:
        handle = attach(model.module, site, change)
        try:
            return rows.predictions(tail(state, grad=True, **options).logits)
        finally:
            handle.remove()

    def loss(delta: Tensor) -> Tensor:
        added = a @ delta.T
        found = rows.losses(run(lambda x: x + added.to(x))).sum() / rows.real.sum()
        if not bool(torch.isfinite(found)):
            raise NonFiniteError(f"the loss of {target!r} is {float(found)}; lower the learning rate")
        return found

    return WriteRows(AtMatrix(a[:, :n], y[:, :n], rows.prompt_mask), a, rows, loss, run)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter of a module ask for a gradient, for the length of a `with` block."""
    held = [p for p in module.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def sampled_texts(model: Model, n: int, *, tokens: int = 10, seed: int = 0, skip: int = 0) -> list[str]:
    """Return short texts sampled from the model itself at temperature 1, from fixed first words.

    They serve as the contexts in which a fact is rehearsed, and as text that has nothing to do with it.
    """
    if n < 1:
        return []
    starts = [_STARTS[(i + skip) % len(_STARTS)] for i in range(n)]
    with model.without_edits():
        found = model.generate(starts, max_new_tokens=tokens, temperature=1.0, seed=seed)
    return [" ".join((s + t).split()) for s, t in zip(starts, found.texts, strict=True)]


def in_contexts(prompt: str, contexts: Sequence[str]) -> list[str]:
    """Return the prompt alone and after each context."""
    return [prompt, *(f"{c.rstrip(' .')}. {prompt}" for c in contexts)]


def write_all(editor: Editor, requests: Sequence[EditRequest], what: str) -> None:
    """Add requests to an editor in order, with progress."""
    with progress(f"writing facts ({what})", len(requests), "facts") as advance:
        for request in requests:
            editor.add(request)
            advance()


def measured(model: Model, editor: Editor, requests: Sequence[EditRequest], what: str, seed: int) -> Edit:
    """Write requests, and return the edit with its reliability, generality and locality.

    What the unedited model says is taken before the first fact is written.
    """
    from actlas.measure.editing import clean_outputs, editing_measurements

    clean = clean_outputs(model, requests)
    write_all(editor, requests, what)
    edit = editor.edit()
    with model.edit(edit):
        found = editing_measurements(model, requests, clean, seed=seed)
    return edit.with_measurements(found)
