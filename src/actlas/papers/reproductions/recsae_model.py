"""A recommender with a known truth: a synthetic catalogue, users with interests, and a small SASRec.

Each of `items` belongs to one category and is popular by Zipf's law within it. A user likes two or three
categories, is in the mood for one of them, changes the mood now and then, and sometimes picks at random.
SASRec (Kang and McAuley 2018) reads the history with one causal attention block; the score of item i is
h . e_i, where h is the state at the last position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.model import Model
from actlas.core.progress import progress

HISTORY = 20
SITE = "module:norm"
_SWITCH, _RANDOM = 0.1, 0.05  # how often the mood changes, and how often a pick has nothing to do with it


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Items and users.

    Attributes:
        category: int64 `[items]`.
        sequences: int64 `[users, HISTORY + 1]`; the last item is the one to predict.
        mood: int64 `[users, HISTORY + 1]`, the category the user was in the mood for.
    """

    category: Tensor
    sequences: Tensor
    mood: Tensor

    @property
    def history(self) -> Tensor:
        return self.sequences[:, :-1]

    @property
    def next(self) -> Tensor:
        return self.sequences[:, -1]


def draw_catalogue(seed: int, *, users: int, items: int = 300, categories: int = 12) -> Catalogue:
    """Draw a catalogue; the same one for the same seed."""
    generator = np.random.default_rng(seed)
    category = np.arange(items) % categories
    generator.shuffle(category)
    popularity = np.empty(items)
    for c in range(categories):
        own = np.flatnonzero(category == c)
        popularity[own] = 1 / (1 + generator.permutation(len(own)))
    demand = (1 / np.arange(1, categories + 1)) ** 0.5
    sequences = np.empty((users, HISTORY + 1), dtype=np.int64)
    mood = np.empty_like(sequences)
    chances = [
        np.where(category == c, popularity, 0) / popularity[category == c].sum() for c in range(categories)
    ]
    anything = popularity / popularity.sum()
    for u in range(users):
        likes = generator.choice(
            categories, size=generator.integers(2, 4), replace=False, p=demand / demand.sum()
        )
        now = generator.choice(likes)
        for t in range(HISTORY + 1):
            if generator.random() < _SWITCH:
                now = generator.choice(likes)
            mood[u, t] = now
        for c in np.unique(mood[u]):
            where = np.flatnonzero(mood[u] == c)
            sequences[u, where] = generator.choice(items, size=len(where), p=chances[c])
        odd = np.flatnonzero(generator.random(HISTORY + 1) < _RANDOM)
        sequences[u, odd] = generator.choice(items, size=len(odd), p=anything)
    return Catalogue(*(torch.from_numpy(a) for a in (category, sequences, mood)))


class SASRec(nn.Module):
    """SASRec with one block and one head; `forward(items [n, t]) -> scores [n, items]` of the next item."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.positions = nn.Embedding(HISTORY, width)
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.between = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.05)

    def states(self, items: Tensor) -> Tensor:
        """Return the user's state after each item, `[n, t, width]`."""
        x = self.items(items) + self.positions.weight[: items.shape[1]]
        q, k, v = self.qkv(self.before(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x = x + self.narrow(F.relu(self.wide(self.between(x))))
        states: Tensor = self.norm(x)
        return states

    def forward(self, items: Tensor) -> Tensor:
        return self.states(items)[:, -1] @ self.items.weight.T


def train_sasrec(catalogue: Catalogue, seed: int, *, width: int, epochs: int) -> Model:
    """Train on every position of the histories with the whole softmax; Adam, 3e-3, batches of 128 users."""
    torch.manual_seed(seed)
    module = SASRec(len(catalogue.category), width)
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3, weight_decay=1e-6)
    history = catalogue.history
    generator = torch.Generator().manual_seed(seed)
    with progress("training SASRec", epochs, "epochs") as advance:
        for _ in range(epochs):
            for rows in torch.randperm(len(history), generator=generator).split(128):
                batch = history[rows]
                scores = module.states(batch[:, :-1]) @ module.items.weight.T
                loss = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            advance()
    return Model(module, name="SASRec")


def states_of(model: Model, history: Tensor) -> Tensor:
    """Return the states at all positions, `[users, HISTORY, width]`."""
    parts = [model.trace({"items": rows}, SITE)[SITE] for rows in history.split(1000)]
    return torch.cat(parts)


def ndcg(model: Model, catalogue: Catalogue, rows: Tensor, top: int = 10) -> Any:
    """Return the NDCG@top of each user's held-out item, `[users]`, under installed edits."""
    scores = torch.cat([model.forward({"items": catalogue.history[part]}) for part in rows.split(1000)])
    target = catalogue.next[rows]
    own = scores.gather(1, target.unsqueeze(1))
    rank = (scores > own).sum(1)
    return torch.where(rank < top, 1 / torch.log2(rank + 2.0), 0.0).double().numpy()
