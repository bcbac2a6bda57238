"""Outlier-safe pre-training: which optimiser trains which parameter, and the loop.

    optimisers = safe_optimisers(model)          # Muon for everything but the tables, Adam for these
    losses = pretrain(model, batches, optimisers, steps=300)

The architecture's part (single-scale norms, embedding projections) is in `nn.ss_norm`. A model trained with
Adam alone grows outlier channels; each of the three parts takes away one of the causes, and only together do
they take away all.

Source: "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language Models" (Park et al. 2025,
arXiv 2506.19697).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.layout import plain_module
from actlas.core.model import Model
from actlas.core.progress import progress
from actlas.training.muon import Muon


def safe_optimisers(
    model: Model, *, lr: float = 5e-4, table_lr: float = 5e-4, decay: float = 0.01, tables: str = "adam"
) -> list[torch.optim.Optimizer]:
    """Return Muon for all matrices and norms, and Adam for the embedding's and the head's tables.

    Args:
        model: a causal language model.
        lr: of Muon; table_lr: of Adam.
        decay: weight decay of both.
        tables: `"adam"`, or `"muon"` to give them to Muon as well (it costs a matrix as long as the
            vocabulary).

    Raises:
        ModelError: the model does not say which its tables are. InputError: another word for `tables`.
    """
    if tables not in ("adam", "muon"):
        raise InputError(f"tables is {tables!r}; it must be 'adam' or 'muon'")
    root: Any = plain_module(model.module)
    if not hasattr(root, "get_input_embeddings"):
        raise ModelError(f"{model.name} does not say which its embedding is; build the optimisers by hand")
    held = {
        id(t.weight) for t in (root.get_input_embeddings(), root.get_output_embeddings()) if t is not None
    }
    every = list(root.parameters())
    own = [p for p in every if id(p) in held] if tables == "adam" else []
    rest = [p for p in every if not any(p is q for q in own)]
    out: list[torch.optim.Optimizer] = [Muon(rest, lr, decay=decay)]
    if own:
        out.append(torch.optim.AdamW(own, lr=table_lr, betas=(0.9, 0.95), weight_decay=decay))
    return out


def pretrain(
    model: Model,
    batches: Iterable[Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    clip: float = 1.0,
    what: str = "pre-training",
) -> list[float]:
    """Train a causal language model in place; return the loss of each step.

    Rates rise over the first twentieth of the steps, stay, and fall to 0 linearly over the last fifth.

    Args:
        model: it is changed.
        batches: token ids `[batch, context]`, one a step.
        optimisers: e.g. of `safe_optimisers`, or one AdamW.
        steps: how many batches there are.
        clip: largest norm of the gradient.
        what: for the progress bar.

    Raises:
        InputError: no steps or optimisers. NonFiniteError: the loss became NaN or infinite.
    """
    if steps < 1 or not optimisers:
        raise InputError(f"steps={steps}, {len(optimisers)} optimisers: both must be at least 1")
    warm, fall = max(1, steps // 20), max(1, steps // 5)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, (t + 1) / warm, max(steps - t, 1) / fall))
        for o in optimisers
    ]
    losses: list[float] = []
    module = model.module
    was = module.training
    module.train()
    try:
        with progress(what, steps, "steps") as advance, torch.enable_grad():
            for ids in batches:
                ids = ids.to(model.device)
                loss = module(input_ids=ids, labels=ids).loss
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise NonFiniteError(
                        f"the loss is {losses[-1]} at step {len(losses)}; use a smaller rate"
                    )
                for optimiser in optimisers:
                    optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), clip)
                for optimiser, schedule in zip(optimisers, schedules, strict=True):
                    optimiser.step()
                    schedule.step()
                advance(note=f"loss {losses[-1]:.3f}")
    finally:
        module.train(was)
    return losses
