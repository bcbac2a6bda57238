"""ROME: write a fact as one rank-one change of an MLP's output matrix, in closed form.

The matrix is read as a memory from keys to values. With the key k (the matrix's input at the subject's last
token, averaged over contexts), the value v that makes the model say the target, and the second moment
C = E[a a^T] of keys over ordinary text,

    W' = W + (v - W k) (C^-1 k)^T / (k^T C^-1 k)            the least change of other keys with W' k = v
    v = W k + argmin_d  CE(target | output + d) + kl KL(p_essence || p) + decay |d|^2 / |W k|^2

d is found by Adam and kept within `clamp` |W k|. Facts are written one after the other, each onto what the
earlier ones left.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3.1, with the released
code's sizes (rate 0.5, 20 steps, decay 0.5, kl 0.0625, clamp 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actlas.core.continuations import following
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.weight_edit import WeightEdit
from actlas.data.edit_requests import EditRequest, as_requests
from actlas.steering.edit_rows import (
    Matrix,
    WriteRows,
    frozen,
    in_contexts,
    measured,
    sampled_texts,
    write_rows,
)

DEPTH = 0.4  # a block before the middle; the published one is found by causal tracing (17 of 48 in GPT-2 XL)


class RomeEditor:
    """Writes facts one after the other as rank-one changes.

    Args:
        model: a causal language model with dense MLPs.
        site: a block or a site in it; default the block at 40% of the depth.
        texts: ordinary text for C; default text sampled from the model.
        contexts, steps, lr, decay, kl, clamp: see the module docstring.
        ridge: added to C's diagonal, relative to its mean, so that it can be inverted.
        seed: of the sampled texts.
    """

    def __init__(
        self,
        model: Model,
        site: str | int | None = None,
        *,
        texts: Sequence[str] = (),
        contexts: int = 3,
        steps: int = 20,
        lr: float = 0.5,
        decay: float = 0.5,
        kl: float = 0.0625,
        clamp: float = 4.0,
        ridge: float = 1e-2,
        seed: int = 0,
    ) -> None:
        if steps < 1 or not lr > 0 or not clamp > 0 or not ridge > 0:
            raise InputError(
                f"steps={steps}, lr={lr:g}, clamp={clamp:g}, ridge={ridge:g}: all must be positive"
            )
        self.model, self.matrix = model, Matrix.of(model, site, DEPTH)
        self.steps, self.lr, self.decay, self.kl, self.clamp = steps, lr, decay, kl, clamp
        self.contexts = sampled_texts(model, contexts, seed=seed)
        found = list(texts) or sampled_texts(model, 24, tokens=48, seed=seed + 1)
        self.moment = self._moment(found, ridge)
        self.delta = torch.zeros_like(self.matrix.weight, dtype=torch.float32)
        self.count = 0

    def add(self, request: EditRequest) -> int:
        """Write one more fact; return how many steps its value took."""
        prompts = in_contexts(request.prompt, self.contexts)
        rows = write_rows(self.matrix, prompts, request.target)
        column = self._column(request.prompt, request.subject, rows)
        key = rows.prompts.a[:, column].mean(0)
        d = self._change(request, rows, column, rows.prompts.y[:, column].mean(0) + self.delta @ key)
        direction = torch.linalg.solve(self.moment, key.double())
        step = torch.outer(d.double(), direction) / float(key.double() @ direction)
        self.delta = self.delta + step.to(self.delta)
        self.count += 1
        return self.steps

    def edit(self) -> WeightEdit:
        """Return the edit with all facts so far.

        Raises:
            InputError: no fact has been written.
        """
        if not self.count:
            raise InputError("no fact has been written yet; add at least one")
        return self.matrix.weight_edit(self.delta, f"rome, {self.count} facts")

    def _change(self, request: EditRequest, rows: WriteRows, column: int, before: Tensor) -> Tensor:
        """Return d = v - W k: what the matrix should add at the subject's last token."""
        size = float(before.norm())
        d = torch.zeros_like(before).requires_grad_()
        optimiser = torch.optim.Adam([d], lr=self.lr)
        essence = self._essence(request.subject) if request.subject and self.kl else None
        with frozen(self.model.module):
            for _ in range(self.steps):
                optimiser.zero_grad()
                predictions = rows.run(self._with(d, rows, column))
                loss = rows.rows.losses(predictions).sum() / rows.rows.real.sum()
                loss = loss + self.decay * d.square().sum() / size**2
                if essence is not None:
                    loss = loss + self.kl * essence(d)
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    d *= min(1.0, self.clamp * size / max(float(d.norm()), 1e-30))
        return d.detach()

    def _with(self, d: Tensor | None, rows: WriteRows, column: int) -> Callable[[Tensor], Tensor]:
        """Return the matrix's output under the earlier facts, and `d` at one column."""
        earlier = rows.a @ self.delta.T

        def change(y: Tensor) -> Tensor:
            new = y + earlier.to(y)
            if d is None:
                return new
            place = (torch.arange(y.shape[1], device=y.device) == column).to(y).view(1, -1, 1)
            return new + place * d.to(y)

        return change

    def _essence(self, subject: str) -> Callable[[Tensor], Tensor]:
        """Return d -> KL of the next token after "<subject> is a" from what it was."""
        prompt = f"{subject} is a"
        rows = write_rows(self.matrix, [prompt], " thing")
        column = self._column(prompt, subject, rows)
        with torch.no_grad():
            base = rows.run(self._with(None, rows, column))[0, 0].float().log_softmax(-1)

        def divergence(d: Tensor) -> Tensor:
            now = rows.run(self._with(d, rows, column))[0, 0].float().log_softmax(-1)
            return (base.exp() * (base - now)).sum()

        return divergence

    def _column(self, prompt: str, subject: str, rows: WriteRows) -> int:
        """Return the column of the subject's last token (rows are left-padded); the prompt's without one."""
        end = prompt.rindex(subject) + len(subject) if subject else len(prompt)
        after = len(following(self.model, prompt[:end], prompt[end:])) if end < len(prompt) else 0
        return rows.rows.prompt_mask.shape[1] - 1 - after

    def _moment(self, texts: Sequence[str], ridge: float) -> Tensor:
        """Return E[a a^T] over the tokens of texts, float64 `[in, in]`, first tokens left out."""
        width = self.matrix.weight.shape[1]
        total, count = torch.zeros(width, width, dtype=torch.float64, device=self.matrix.weight.device), 0
        for start in range(0, len(texts), 8):
            read = self.matrix.activations(texts[start : start + 8])
            rows = read.a[:, 1:][read.real[:, 1:]].double()
            total, count = total + rows.T @ rows, count + len(rows)
        if not count:
            raise InputError("the texts for the second moment of keys have one token each; give longer ones")
        moment = total / count
        moment.diagonal().add_(ridge * float(moment.diagonal().mean()))
        return moment


@method(
    "rome",
    room="steering",
    returns="Edit",
    data="requests",
    summary="write facts as rank-one changes of one MLP's output matrix",
    example="actlas fit rome smollm2 edits.jsonl -o rome/",
    papers=("wise",),
)
def fit_rome(
    model: Model,
    data: Any,
    site: str | int | None = None,
    *,
    texts: Sequence[str] = (),
    contexts: int = 3,
    steps: int = 20,
    lr: float = 0.5,
    seed: int = 0,
) -> Edit:
    """Write facts in order, and measure what became of them.

    Args:
        model: a causal language model with dense MLPs.
        data: edit requests; give `subject` where you can.
        site: a block or a site in it; default the block at 40% of the depth.
        texts, contexts, steps, lr, seed: see `RomeEditor`.

    Raises:
        InputError: unusable requests or settings. ModelError: no causal language model with dense MLPs.
    """
    requests = as_requests(data)
    editor = RomeEditor(model, site, texts=texts, contexts=contexts, steps=steps, lr=lr, seed=seed)
    return measured(model, editor, requests, "rome", seed)
