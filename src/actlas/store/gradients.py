"""Gradients of the model's loss at the sites of a batch.

    g[i, t] = d L_i / d x[i, t],   L_i = - sum_t log p(token_{t+1} | tokens up to t)

for window i, in float32. The sum, not the mean, so that a row's gradient does not depend on how many
other tokens the batch holds. At the last token of a window there is nothing to predict; there the
gradient of a residual stream behind the last attention that reads it is exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from actlas.core.calibration.reading import Batch
from actlas.core.errors import ModelError
from actlas.core.model import Model
from actlas.core.sites import Site

_LOGIT_BYTES = 32 * 2**20  # logits of one batch; the graph holds them several times


def check_predicts(model: Model) -> None:
    """Raise ModelError if the model predicts no next token."""
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is a model of kind {model.kind}; gradients need a causal-lm")


def batch_limit(model: Model) -> int:
    """Return how many tokens a batch may have so that its logits stay small."""
    return max(1, _LOGIT_BYTES // (4 * (model.vocab_size or 50_000)))


def next_token_gradients(
    model: Model, batch: Batch, sites: Sequence[Site]
) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Yield each site with its activation and its gradient, both in the site's own shape."""
    mask = batch.mask
    assert mask is not None
    with _frozen(model), torch.enable_grad():
        trace = model._run(batch.encoded, sites, grad=True, stop=False)
        ids = batch.encoded["input_ids"][:, 1:]
        scored = mask[:, 1:].to(ids.device)
        log_p = trace.logits[:, :-1].float()[scored].log_softmax(-1)
        found = trace.gradients(-log_p.gather(-1, ids[scored].unsqueeze(-1)).sum())
    for site in sites:
        yield site, trace[site.name].detach(), found[site.name].detach()


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Take the weights out of the graph, which then begins at the first site."""
    held = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
