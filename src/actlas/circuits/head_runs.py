"""Scale single heads at the last token of many prompts, and say what comes out.

runs = HeadRuns(model, pairs)
runs.scaled({(23, 4): 0.0}).rate("answer")        # z of one head times 0, at the price of one token
runs.attribution()                                # [n, blocks, heads], direct logit attribution
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.last_token import LastToken
from actlas.circuits.readers import readers_of, through_norm
from actlas.core.edits import HeadScale
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import weight_matrix

if TYPE_CHECKING:
    from actlas.core.model import Model

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Said:
    """What came out after each prompt: bool `[n]` each, and the logit differences float64 `[n]`."""

    answer: Tensor
    wrong: Tensor
    difference: Tensor

    @property
    def other(self) -> Tensor:
        """Neither of the two answers."""
        return ~(self.answer | self.wrong)

    def rate(self, which: str = "answer") -> float:
        """Return the share of one outcome."""
        return float(getattr(self, which).float().mean())


class HeadRuns:
    """Prompts whose heads can be scaled at the last token, at the price of one token each.

    Args:
        model: a causal language model with a layout.
        pairs: prompts and answers (only the clean prompts are used).
    """

    def __init__(self, model: Model, pairs: PromptPairs) -> None:
        self.model, self.pairs = model, pairs
        self.blocks, self.heads = model.n_blocks or 0, model.n_heads or 0
        if not self.blocks or not self.heads:
            raise ModelError(f"{model.name} has no layout, so its heads are not known")
        self._first = LastToken(model, dict(pairs.clean), "blocks.0.attn.z")
        self._at: dict[int, LastToken] = {0: self._first}

    def scaled(self, factors: dict[Head, float]) -> Said:
        """Return what is said with some heads' `z` scaled at the last token.

        The heads may lie in several layers; the run starts at the first of them.
        """
        for block, head in factors:
            if not (0 <= block < self.blocks and 0 <= head < self.heads):
                raise InputError(f"there is no head {block}.{head} in {self.blocks} x {self.heads} heads")
        layers = sorted({block for block, _ in factors})
        if len(layers) <= 1:
            runs = self._runs(layers[0] if layers else self.blocks - 1)
            z = runs.values.clone()
            for (_, head), alpha in factors.items():
                z[:, head] *= alpha
            return self._said(runs.logits(z))
        edits = [
            HeadScale(f"blocks.{b}.attn.z", factors={h: a for (c, h), a in factors.items() if c == b})
            for b in layers
        ]
        with self.model.edit(*edits):
            return self._said(self._first.full())

    def attribution(self) -> Tensor:
        """Return a_h for every prompt and head, float64 `[n, blocks, heads]`; see the module docstring.

        The head's output is what its columns of W_O make of z; biases belong to no head.
        """
        head, norm = self.model.unembed_module, self.model.final_norm_module
        if head is None:
            raise ModelError(f"{self.model.name} has no output head over a vocabulary")
        weight = weight_matrix(head).detach()
        rows = (weight[self.pairs.answer_ids] - weight[self.pairs.wrong_ids]).double()
        names = [f"blocks.{b}.attn.z" for b in range(self.blocks)]
        last = f"blocks.{self.blocks - 1}.resid_post"
        trace = self._first.trace([*names, last])
        if norm is not None:
            centred = through_norm(torch.eye(rows.shape[1], dtype=torch.float64), norm)
            rows = through_norm(rows, norm)
            x = trace[last][:, -1].double()
            if float(centred.sum(1).abs().max()) < 1e-6 * float(centred.abs().max()):  # LayerNorm
                x = x - x.mean(1, keepdim=True)
            rows = rows / x.square().mean(1, keepdim=True).sqrt()
        found = []
        for name in names:
            wide = readers_of(self.model, name).matrix.unflatten(1, (self.heads, -1))  # [d, heads, head_dim]
            found.append(torch.einsum("nd,dhk,nhk->nh", rows, wide, trace[name][:, -1].double()))
        return torch.stack(found, 1)

    def _runs(self, block: int) -> LastToken:
        if block not in self._at:
            self._at[block] = self._first.at(f"blocks.{block}.attn.z")
        return self._at[block]

    def _said(self, logits: Tensor) -> Said:
        first = logits.argmax(1)
        right, wrong = self.pairs.answer_ids, self.pairs.wrong_ids
        picked = [logits.gather(1, ids.unsqueeze(1))[:, 0].double() for ids in (right, wrong)]
        return Said((first == right).cpu(), (first == wrong).cpu(), (picked[0] - picked[1]).cpu())


def random_heads(runs: HeadRuns, n: int, *, first: int, without: Sequence[Head], seed: int) -> list[Head]:
    """Return up to `n` random heads of the blocks from `first` on, without some."""
    pool = [(b, h) for b in range(first, runs.blocks) for h in range(runs.heads) if (b, h) not in without]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pool[i] for i in order[:n]]
