"""A pool of short texts of five domains, some of which are near misses of each other, and tuning on a choice.

    texts, domains = draw_pool(tokenizer, 70, seed)          # chunks of 56 tokens of every domain
    split(domains, "docs", seed, examples=12, test=8)        # examples, the pool to choose from, the test

Documentation strings and source code of the same library are the near miss. Used by `mona_data_selection`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.select.samples import Array

DOMAINS = ("prose", "code", "docs", "arithmetic", "capitals")
NEAR = ("code", "docs")
CHUNK = 56  # tokens of a chunk


@dataclass(frozen=True)
class Split:
    """Numbers of chunks: the examples of what is wanted, the pool of all domains, and the test."""

    target: list[int]
    pool: list[int]
    test: list[int]


def draw_pool(tokenizer: Any, per_domain: int, seed: int) -> tuple[list[str], list[str]]:
    """Return chunks of text and the domain of each, `per_domain` of each.

    Args:
        tokenizer: what counts tokens.
        per_domain: chunks of each domain.
        seed: of the draw.
    """
    texts: list[str] = []
    for domain in DOMAINS:
        made = domain in ("arithmetic", "capitals")
        found = _statements(domain, 20 * per_domain, seed) if made else _pages(domain, seed)
        own = list(dict.fromkeys(_cut(found, tokenizer, per_domain)))
        texts += own[:per_domain]
    return texts, [d for d in DOMAINS for _ in range(per_domain)]


def split(domains: Sequence[str], wanted: str, seed: int, examples: int, test: int) -> Split:
    """Split the chunks for one wanted domain: every domain gives as many chunks to the pool."""
    draw = random.Random(f"{wanted} {seed}")
    own: list[int] = []
    pool: list[int] = []
    for domain in DOMAINS:
        numbers = [i for i, d in enumerate(domains) if d == domain]
        draw.shuffle(numbers)
        pool += numbers[examples + test :]
        if domain == wanted:
            own = numbers
    return Split(own[:examples], pool, own[examples : examples + test])


def _pages(domain: str, seed: int) -> list[str]:
    from actlas.data import corpus

    return [document.text for document in corpus(domain, seed=seed)]


def _statements(domain: str, n: int, seed: int) -> list[str]:
    from actlas.data import task

    items = task(domain, n=n, seed=seed).items
    draw = random.Random(seed)
    lines = [item.prompt + item.answer for item in items]
    return ["\n".join(draw.sample(lines, 12)) for _ in range(len(lines))]


def _cut(texts: Sequence[str], tokenizer: Any, most: int) -> list[str]:
    """Return one chunk of each text until there are enough, then second chunks, and so on."""
    ids = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in texts[: 2 * most]]
    found: list[str] = []
    for start in range(0, max(map(len, ids)) - CHUNK, CHUNK):
        found += [tokenizer.decode(i[start : start + CHUNK]) for i in ids if len(i) >= start + CHUNK]
        if len(set(found)) >= most:
            break
    return found


class Tuner:
    """Tunes the last two blocks on some texts and measures the loss on others, from the same start.

    What the blocks below give is computed once for each batch; the weights go back after each run.
    """

    def __init__(self, model: Model, steps: int, lr: float = 1e-4, batch: int = 4) -> None:
        from actlas.core.splitting import split_at

        assert model.n_blocks is not None
        self.model, self.steps, self.lr, self.batch = model, steps, lr, batch
        cut = max(0, model.n_blocks - 3)
        self.head, self.tail = split_at(model, f"blocks.{cut}.resid_post")
        blocks = (model.block(i) for i in range(cut + 1, model.n_blocks))
        self.parameters = [p for block in blocks for p in block.parameters()]

    def losses(self, train: Sequence[str], test: Sequence[str], seed: int) -> Array:
        """Return the mean loss a token of each test text after tuning, `[len(test)]`; no text: untuned."""
        before = [p.detach().clone() for p in self.parameters]
        wanted = [p.requires_grad for p in self.model.module.parameters()]
        try:
            self.model.module.requires_grad_(False)
            if train:
                self._tune(train, seed)
            state = self.head(list(test))
            return self._loss(state, grad=False).double().numpy()
        finally:
            for p, old in zip(self.parameters, before, strict=True):
                p.data.copy_(old)
            for p, flag in zip(self.model.module.parameters(), wanted, strict=True):
                p.requires_grad_(flag)

    def _tune(self, train: Sequence[str], seed: int) -> None:
        for p in self.parameters:
            p.requires_grad_(True)
        states = [self.head(list(train[i : i + self.batch])) for i in range(0, len(train), self.batch)]
        optimiser = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=0.1)
        draw = random.Random(seed)
        order: list[int] = []
        with progress("tuning on a choice", self.steps, "steps") as advance:
            for _ in range(self.steps):
                order = order or draw.sample(range(len(states)), len(states))
                optimiser.zero_grad()
                self._loss(states[order.pop()], grad=True).mean().backward()
                optimiser.step()
                advance()
        for p in self.parameters:
            p.grad = None

    def _loss(self, state: Any, grad: bool) -> torch.Tensor:
        ids, mask = state.encoded["input_ids"], state.encoded["attention_mask"]
        logits = self.tail(state, grad=grad).logits[:, :-1].float()
        real = mask[:, 1:].bool()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (each * real).sum(1) / real.sum(1)


def precision(order: Sequence[int], domains: Sequence[str], wanted: str, count: int) -> float:
    """Return the share of the first `count` that are of the wanted domain."""
    return float(np.mean([domains[i] == wanted for i in order[:count]]))
