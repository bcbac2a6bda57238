"""Small random models with prompt pairs, and patching as brute force does it."""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.nodes import Node
from actlas.circuits.sources import at
from actlas.core.hooks import attach
from actlas.core.model import Model
from tests.core.families import BY_NAME, VOCAB


def model_of(family: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    found = BY_NAME[family].model()
    return Model(found.module.to(dtype), name=f"tiny-{family}")


def pairs_of(model: Model, width: int = 9) -> PromptPairs:
    """Four pairs that differ in different places, two of them padded."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, VOCAB, (4, width), generator=generator)
    corrupt = clean.clone()
    for row, columns in enumerate(([4], [6, 7, 8], [8], [2])):
        corrupt[row, columns] = (clean[row, columns] + 7) % (VOCAB - 3) + 3
    mask = torch.ones_like(clean)
    mask[0, :3], mask[1, :1] = 0, 0
    answers, wrong = torch.tensor([3, 4, 5, 6]), torch.tensor([7, 8, 9, 10])
    made = PromptPairs.from_ids(model, clean, corrupt, answers, wrong, attention_mask=mask, force=True)
    # Oriented, so that the difference between the sides does not cancel by chance.
    up = made.difference > made.corrupt_difference
    right, other = torch.where(up, answers, wrong), torch.where(up, wrong, answers)
    return PromptPairs.from_ids(model, clean, corrupt, right, other, attention_mask=mask, force=True)


def metric(logits: Tensor, pairs: PromptPairs) -> Tensor:
    right, wrong = (logits.gather(1, i[:, None])[:, 0] for i in (pairs.answer_ids, pairs.wrong_ids))
    return right - wrong


def brute(model: Model, pairs: PromptPairs, node: Node, written: Tensor, base: str, where: Tensor) -> Tensor:
    """Return the metric of whole runs in which `written` `[n, pos, ...]` stands at a node."""
    site = model.resolve(node.site.split("[")[0])[0]
    mask = where & at(pairs, node.position)

    def write(x: Tensor) -> Tensor:
        y = x.clone()
        for row, column in mask.nonzero().tolist():
            if node.index is None:
                y[row, column] = written[row, column]
            else:
                y[row, column, node.index] = written[row, column, node.index]
        return y

    handle = attach(model.module, site, write, batch=lambda: len(pairs))
    try:
        logits = model.logits(dict(getattr(pairs, base)))[:, -1]
    finally:
        handle.remove()
    return metric(logits.double(), pairs)
