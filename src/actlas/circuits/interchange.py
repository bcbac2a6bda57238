"""Prompts whose last token can be patched with another prompt's, again and again.

swap = Interchange.of(model, pairs, "blocks.20.resid_post")
swap.run(swap.source).metric            # logit differences with the whole activation swapped
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.illusion import Outcome
from actlas.circuits.last_token import LastToken

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(frozen=True, eq=False)
class Interchange:
    """Prompts whose last token can be patched with another prompt's.

    Attributes:
        runs: the prompts that are patched.
        source: `[n, d]`, the other prompts' activations at the site, heads flattened.
        answer, target: `[n]`, the token that is right, and the one that a full swap should give.
    """

    runs: LastToken
    source: Tensor
    answer: Tensor
    target: Tensor

    @classmethod
    def of(cls, model: Model, pairs: PromptPairs, site: str, *, both: bool = False) -> Interchange:
        """Return the patches clean <- corrupt of pairs, and with `both` also corrupt <- clean."""
        base, other = dict(pairs.clean), dict(pairs.corrupt)
        answer, target = pairs.answer_ids, pairs.wrong_ids
        if both:
            base, other = ({k: torch.cat([x[k], y[k]]) for k in x} for x, y in ((base, other), (other, base)))
            same = pairs.corrupt_difference.to(answer.device) > 0  # the corrupted prompt has the same answer
            second = torch.where(same, answer, target), torch.where(same, target, answer)
            answer, target = torch.cat([answer, second[0]]), torch.cat([target, second[1]])
        runs = LastToken(model, base, site)
        source = model.trace(other, site).last(site).flatten(1)
        return cls(runs, source, answer, target)

    def at(self, site: str) -> Interchange:
        """Return the swaps both ways of `knob.contrast_swaps` at another site."""
        runs = self.runs.at(site)
        values = runs.values.flatten(1)
        return Interchange(runs, values.roll(len(values) // 2, 0), self.answer, self.target)

    @property
    def base(self) -> Tensor:
        """`[n, d]`, the prompts' own activations, heads flattened."""
        return self.runs.values.flatten(1)

    def __len__(self) -> int:
        return len(self.answer)

    def logits(self, values: Tensor, rows: Tensor | None = None, grad: bool = False) -> Tensor:
        """Return the logits `[n, vocab]` with activations `[n, d]` at the site."""
        shaped = values.reshape(-1, *self.runs.values.shape[1:])
        return self.runs.logits(shaped, rows=rows, grad=grad)

    def run(self, values: Tensor) -> Outcome:
        """Return each prompt's logit difference, and whether its answer is the target now."""
        logits = self.logits(values, grad=values.requires_grad).double()
        picked = [logits.gather(1, ids.unsqueeze(1))[:, 0] for ids in (self.answer, self.target)]
        return Outcome(picked[0] - picked[1], logits.argmax(1) == self.target)


def as_pairs(
    model: Model, data: Any, *, n: int, variant: str | None = None, force: bool = False, seed: int = 0
) -> PromptPairs:
    """Return prompt pairs of anything that says what they are: pairs, a task or its name, items, records."""
    if isinstance(data, PromptPairs):
        return data if len(data) <= n else data.take(torch.arange(n))
    return PromptPairs.from_task(model, data, n=n, seed=seed, variant=variant, force=force)
