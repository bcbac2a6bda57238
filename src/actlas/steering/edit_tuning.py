"""Fine-tuning one matrix on facts, one after the other: the plain baseline of knowledge editing.

    W <- W - lr * gradient of CE(y | x)         until CE is at most `stop`, for each fact in turn

The same matrix, contexts and optimiser as WISE, without mask, side memory, router and margins.
"""

from __future__ import annotations

from typing import Any

import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.weight_edit import WeightEdit
from actlas.data.edit_requests import EditRequest, as_requests
from actlas.steering.edit_rows import Matrix, frozen, in_contexts, measured, sampled_texts, write_rows
from actlas.steering.wise import DEPTH


class TuningEditor:
    """Writes facts one after the other by gradient descent on one matrix.

    Args:
        model: a causal language model with dense MLPs.
        site: a block or a site in it; default as WISE.
        lr, steps, stop, contexts, seed: as WISE.
    """

    def __init__(
        self,
        model: Model,
        site: str | int | None = None,
        *,
        lr: float = 1.0,
        steps: int = 30,
        stop: float = 0.05,
        contexts: int = 3,
        seed: int = 0,
    ) -> None:
        if steps < 1 or not lr > 0:
            raise InputError(f"steps={steps}, lr={lr:g}: both must be positive")
        self.model, self.matrix = model, Matrix.of(model, site, DEPTH)
        self.lr, self.steps, self.stop = lr, steps, stop
        self.contexts = sampled_texts(model, contexts, seed=seed)
        self.delta = torch.zeros_like(self.matrix.weight, dtype=torch.float32)
        self.count = 0

    def add(self, request: EditRequest) -> int:
        """Write one more fact; return how many steps it took."""
        rows = write_rows(self.matrix, in_contexts(request.prompt, self.contexts), request.target)
        delta = self.delta.clone().requires_grad_()
        optimiser = torch.optim.SGD([delta], lr=self.lr)
        taken = 0
        with frozen(self.model.module):
            for step in range(self.steps):
                taken = step + 1
                loss = rows.loss(delta)
                if float(loss.detach()) <= self.stop:
                    break
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        self.delta, self.count = delta.detach(), self.count + 1
        return taken

    def edit(self) -> WeightEdit:
        """Return the edit with all facts so far.

        Raises:
            InputError: no fact has been written.
        """
        if not self.count:
            raise InputError("no fact has been written yet; add at least one")
        return self.matrix.weight_edit(self.delta, f"fine-tuned on {self.count} facts")


@method(
    "edit-tuning",
    room="steering",
    returns="Edit",
    data="requests",
    summary="fine-tune one MLP's output matrix on facts, the baseline of knowledge editing",
    example="actlas fit edit-tuning smollm2 edits.jsonl -o tuned/",
    papers=("wise",),
)
def fit_edit_tuning(
    model: Model,
    data: Any,
    site: str | int | None = None,
    *,
    lr: float = 1.0,
    steps: int = 30,
    stop: float = 0.05,
    contexts: int = 3,
    seed: int = 0,
) -> Edit:
    """Write facts in order, and measure what became of them.

    Args:
        model: a causal language model with dense MLPs.
        data: edit requests (`actlas.data.edit_requests`).
        site, lr, steps, stop, contexts, seed: see `TuningEditor`.

    Raises:
        InputError: unusable requests or settings. ModelError: no causal language model with dense MLPs.
    """
    requests = as_requests(data)
    editor = TuningEditor(model, site, lr=lr, steps=steps, stop=stop, contexts=contexts, seed=seed)
    return measured(model, editor, requests, "fine-tuning", seed)
