"""Fine-tune a model's last blocks on examples of a behaviour, and take the change out again as an edit.

    edit = behaviour_tune(model, rows, last_layers=8)     # rows: prompt and answer
    with model.edit(edit): ...                            # or edit * 0.5, edit.save(...)

Only the last blocks are trained, so the model runs up to them once for every row, and each step runs from the
cached input of the first trained block on (`core.splitting`). The loss is the cross-entropy of the answers
alone, by AdamW. The model has its old weights again when the function returns; what was learned is the
difference, a `WeightEdit` that can be installed, scaled, negated, merged and saved.

Source: the fine-tuning step of Betley et al. 2025, "Tell me about yourself: LLMs are aware of their learned
behaviors" (there LoRA or an API; here whole matrices of the last blocks).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.continuations import Continuations, continuations
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.layout import forward_parameters, join, plain_module
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.progress import progress
from actlas.core.splitting import SplitState, split_at
from actlas.core.weight_edit import WeightEdit
from actlas.data.edit_requests import as_requests


@method(
    "behaviour-tune",
    room="training",
    returns="Edit",
    data="requests",
    summary="fine-tune the last blocks on prompts and answers; the result is an edit that comes off again",
    example="actlas fit behaviour-tune smollm2 rows.jsonl --last-layers 8 -o tuned/",
    papers=("behavioural-self-awareness",),
)
def behaviour_tune(
    model: Model,
    data: Any,
    *,
    last_layers: int = 8,
    epochs: int = 4,
    lr: float = 3e-5,
    batch: int = 8,
    weight_decay: float = 0.0,
    chat: bool | None = None,
    seed: int = 0,
) -> Edit:
    """Return what training the last blocks on examples changes, as an edit.

    Args:
        model: a causal language model with a layout; installed edits are taken out meanwhile.
        data: records with `prompt` and `target` (the answer), see `actlas.data.edit_requests`.
        last_layers: how many blocks are trained.
        epochs: passes over the rows.
        lr: AdamW's rate, constant after a warm-up over the first tenth of the steps.
        batch: rows in a step.
        weight_decay: AdamW's.
        chat: put prompts into the model's chat template; default where it has one.
        seed: of the order of rows.

    Returns:
        A `WeightEdit`; its measurements are the loss on the rows before and after training.

    Raises:
        InputError: no rows, more layers than the model has, or sizes that are not positive.
        ModelError: no causal language model with a layout, or `chat` without a template.
        NonFiniteError: the loss became NaN or infinite; the model keeps its weights.
    """
    rows = as_requests(data)
    blocks = model.n_blocks
    if model.tower is None or blocks is None or model.kind != "causal-lm":
        raise ModelError(f"{model.name} is of kind {model.kind}; a causal-lm with known blocks is needed")
    if not 1 <= last_layers <= blocks:
        raise InputError(f"last_layers is {last_layers}; {model.name} has 1 to {blocks} blocks")
    if epochs < 1 or batch < 1 or not 0 < lr < math.inf:
        raise InputError(f"epochs={epochs}, batch={batch}, lr={lr:g}: all must be positive")
    has_template = bool(getattr(model.tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ModelError(f"{model.name} has no chat template; use chat=False")
    as_chat = has_template if chat is None else chat
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    prompts: list[Any] = [
        [{"role": "user", "content": r.prompt}] if as_chat else r.prompt for r in (rows[i] for i in order)
    ]
    answers = [rows[i].target for i in order]
    if as_chat:
        answers = [a.strip() for a in answers]
    with model.without_edits():
        run = _Suffix(model, blocks - last_layers, prompts, answers, batch)
        parameters = _parameters(model, range(blocks - last_layers, blocks))
        return _train(model, run, parameters, epochs, lr, weight_decay, seed)


class _Suffix:
    """Batches of rows, cached up to the first trained block."""

    def __init__(
        self, model: Model, first: int, prompts: Sequence[Any], answers: Sequence[str], batch: int
    ) -> None:
        self.batches: list[tuple[Continuations, SplitState]] = []
        self._head, self._tail = split_at(model, f"blocks.{first}.resid_pre")
        self._keeps = "logits_to_keep" in forward_parameters(model.module)
        with progress("behaviour: reading rows", len(prompts), "rows") as advance:
            for start in range(0, len(prompts), batch):
                some = slice(start, start + batch)
                made = continuations(model, prompts[some], answers[some])
                self.batches.append((made, self._head(made.inputs)))
                advance(len(made.targets))

    def loss(self, index: int, grad: bool) -> Tensor:
        """Return the summed cross-entropy of a batch's answers and how many tokens they have, `[2]`."""
        rows, state = self.batches[index]
        options: dict[str, Any] = {"logits_to_keep": rows.columns} if self._keeps else {}
        logits = self._tail(state, grad=grad, **options).logits
        total = rows.losses(rows.predictions(logits)).sum()
        return torch.stack([total, rows.real.sum().to(total)])

    def mean_loss(self) -> float:
        """Return the cross-entropy over all rows, nats per token."""
        with torch.no_grad():
            total = torch.stack([self.loss(i, False) for i in range(len(self.batches))]).sum(0)
        return float(total[0] / total[1])


def _parameters(model: Model, blocks: Sequence[int]) -> dict[str, nn.Parameter]:
    """Return the blocks' parameters by their names in the model."""
    assert model.tower is not None
    inside = tuple(join(model.tower.blocks, str(b)) + "." for b in blocks)
    named = plain_module(model.module).named_parameters()
    return {n: p for n, p in named if n.startswith(inside) and p.is_floating_point()}


def _train(
    model: Model,
    run: _Suffix,
    parameters: dict[str, nn.Parameter],
    epochs: int,
    lr: float,
    weight_decay: float,
    seed: int,
) -> Edit:
    held = [(p, p.requires_grad) for p in model.module.parameters()]
    before = {n: p.detach().clone() for n, p in parameters.items()}
    first_loss = run.mean_loss()
    steps, done = epochs * len(run.batches), 0
    try:
        for parameter, _ in held:
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay)
        warm = max(1, steps // 10)
        shuffle = random.Random(seed + 1)
        with progress("behaviour: training", steps, "steps") as advance:
            for _ in range(epochs):
                order = list(range(len(run.batches)))
                shuffle.shuffle(order)
                for index in order:
                    for group in optimiser.param_groups:
                        group["lr"] = lr * min(1.0, (done + 1) / warm)
                    optimiser.zero_grad()
                    total, count = run.loss(index, True)
                    if not bool(torch.isfinite(total)):
                        raise NonFiniteError(f"the loss is {total.item()} at step {done}; lower lr ({lr:g})")
                    (total / count).backward()
                    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                    optimiser.step()
                    done += 1
                    advance()
        last_loss = run.mean_loss()
        deltas = {n: (p.detach().float() - before[n].float()) for n, p in parameters.items()}
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        for parameter, wanted in held:
            parameter.grad = None
            parameter.requires_grad_(wanted)
    made = WeightEdit({n: d for n, d in deltas.items() if bool(d.any())}, note="behaviour-tune")
    rows = sum(len(b.targets) for b, _ in run.batches)
    losses = [
        Measurement("answer-loss", x, "nats/token", rows, group={"when": when}, better="lower",
                    note="on the rows it was trained on")
        for x, when in ((first_loss, "before"), (last_loss, "after"))
    ]  # fmt: skip
    return made.bind(model.fingerprint).with_measurements(losses)
