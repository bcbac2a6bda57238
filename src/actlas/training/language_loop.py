"""A plain training loop for causal language models, for methods that hand back what was learned as an edit.

    learned, losses = tune_weights(model, corpus, steps=200, lr=1e-4, penalties=[penalty])

Windows are drawn at random from the corpus' tokens. Only the chosen parameters are trained, by AdamW with the
gradient's norm cut at 1. The model has its old weights again afterwards; what was learned is a `WeightEdit`.
For large runs take the transformers Trainer with the same penalties (`penalty.callback()`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.layout import plain_module
from actlas.core.model import Model
from actlas.core.progress import progress
from actlas.core.weight_edit import WeightEdit
from actlas.training.density import ActivationPenalty
from actlas.training.schedules import Schedule


def corpus_tokens(model: Model, data: Iterable[Any], least: int) -> Tensor:
    """Return the token ids of a corpus, its documents one after the other, int64 `[n]`.

    Raises:
        ModelError: the model has no tokenizer.
        InputError: fewer than `least` tokens.
    """
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it cannot be trained on text")
    ids: list[int] = []
    for document in data:
        text = document if isinstance(document, str) else document.text
        ids += model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < least:
        raise InputError(f"the corpus has {len(ids):,} tokens; windows of {least:,} cannot be drawn from it")
    return torch.tensor(ids)


def windows(tokens: Tensor, *, steps: int, batch: int, context: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` batches of random windows, int64 `[batch, context]`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - context + 1, (batch,), generator=generator)
        yield torch.stack([tokens[s : s + context] for s in starts.tolist()])


def train_language(
    model: Model,
    batches: Iterable[Tensor],
    parameters: Sequence[Tensor] | Sequence[Mapping[str, Any]],
    *,
    steps: int,
    lr: float,
    rate: Schedule | None = None,
    penalties: Sequence[ActivationPenalty] = (),
    loss_of: Callable[[Tensor], Tensor] | None = None,
    decay: float = 0.0,
    what: str = "training",
) -> list[float]:
    """Train parameters in place, with the edits that are installed; return the task's loss of each step.

    Args:
        model: a causal language model.
        batches: token ids `[batch, context]`, one a step.
        parameters: what is trained; or AdamW's groups (`{"params": [...], "lr": 1e-5}`).
        steps: how many batches there are, for the progress bar and the default `rate`.
        lr: AdamW's peak rate.
        rate: factor of it at each step; default 5% of warm-up and a cosine to a tenth.
        penalties: what is added to the loss.
        loss_of: the loss of a batch; default the next-token loss.
        decay: AdamW's weight decay.
        what: for the progress bar.

    Raises:
        InputError: no steps, nothing to train, or a rate that is not positive.
        NonFiniteError: the loss became NaN or infinite.
    """
    if steps < 1 or not 0 < lr < math.inf or not parameters:
        raise InputError(
            f"steps={steps}, lr={lr:g}, {len(parameters)} parameters: all must be positive to train"
        )
    warm = max(1, steps // 20)

    def cosine(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=decay)  # type: ignore[arg-type]
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rate or cosine)
    losses: list[float] = []
    module = model.module
    with ExitStack() as stack:
        for penalty in penalties:
            stack.enter_context(penalty)
        advance = stack.enter_context(progress(what, steps, "steps"))
        stack.callback(module.train, module.training)
        module.train()
        for ids in batches:
            ids = ids.to(model.device)
            loss = module(input_ids=ids, labels=ids).loss if loss_of is None else loss_of(ids)
            losses.append(float(loss.detach()))
            total = loss + sum(p.value() for p in penalties)
            if not math.isfinite(float(total.detach())):
                raise NonFiniteError(
                    f"the loss is {float(total.detach())} at step {len(losses)}; lower lr ({lr:g})"
                )
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            scheduler.step()
            for penalty in penalties:
                penalty.advance()
            advance()
    return losses


def tune_weights(
    model: Model,
    data: Iterable[Any],
    *,
    inside: str = "",
    steps: int,
    lr: float,
    batch: int = 8,
    context: int = 128,
    penalties: Sequence[ActivationPenalty] = (),
    seed: int = 0,
    what: str = "training",
) -> tuple[WeightEdit, list[float]]:
    """Train a model's own weights on text, put the old ones back, and return the change.

    Args:
        inside: only parameters whose name contains this (`".mlp."`); default all.
        model, data, steps, lr, penalties, what: see above. batch, context, seed: of the windows.

    Raises:
        ModelError: not a causal language model with a tokenizer.
        InputError: no such parameters, too short a corpus, bad sizes.
    """
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is of kind {model.kind}; a causal-lm is needed")
    if batch < 1 or context < 2:
        raise InputError(f"batch={batch}, context={context}: windows need 1 row and 2 tokens at least")
    tokens = corpus_tokens(model, data, context)
    named = plain_module(model.module).named_parameters()
    chosen = {n: p for n, p in named if inside in n and p.is_floating_point()}
    if not chosen:
        raise InputError(f"{model.name} has no parameters whose name contains {inside!r}")
    before = {n: p.detach().clone() for n, p in chosen.items()}
    held = [(p, p.requires_grad) for p in model.module.parameters()]
    drawn = windows(tokens, steps=steps, batch=batch, context=context, seed=seed)
    try:
        for parameter, _ in held:
            parameter.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        losses = train_language(
            model, drawn, list(chosen.values()), steps=steps, lr=lr, penalties=penalties, what=what
        )
        deltas = {n: p.detach().float() - before[n].float() for n, p in chosen.items()}
    finally:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(before[name])
        for parameter, wanted in held:
            parameter.grad = None
            parameter.requires_grad_(wanted)
    return WeightEdit({n: d for n, d in deltas.items() if bool(d.any())}, note=what), losses
