"""The walk of ITDA: a dictionary of activations that grows batch by batch (Algorithm 1 of the paper).

Atoms and their Gram matrix stand in memory that doubles when it is full. A new atom costs one product with
the atoms so far; the Gram matrix is never computed again, and with it a step of matching pursuit is one row
of it instead of a product with all atoms (`actlas.kernels.pursuit`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from actlas.dictionaries.labelled_rows import Rows
from actlas.dictionaries.solvers import orthogonal_matching_pursuit
from actlas.kernels.sparse_codes import matching_pursuit, sparse_decode

SeedAtoms = Literal["frequent", "first"]
Pursuit = Literal["matching", "orthogonal"]


class Growing:
    """The dictionary while it grows.

    Args:
        d: channels.
        k: steps of the pursuit; as many as there are atoms, while there are fewer.
        cos_min: rows that are rebuilt with a lower cosine are added.
        most: how many atoms there may be.
        duplicate_cos: leave out rows whose cosine with another of their batch is larger; `None` for none.
        pursuit: how rows are rebuilt.

    Attributes:
        atoms, gram: float32 `[room, d]` and `[room, room]`, of which the first `n` are in use.
        n: atoms so far; `seeded` of them are seeds.
        kept: the rows that became atoms, in order.
    """

    def __init__(
        self, d: int, k: int, cos_min: float, most: int, duplicate_cos: float | None, pursuit: Pursuit
    ) -> None:
        self.d, self.k, self.cos_min, self.most = d, k, cos_min, most
        self.duplicate_cos, self.pursuit = duplicate_cos, pursuit
        self.n = self.seeded = 0
        self.kept: list[Rows] = []
        room = min(most, 2 * d)
        self.atoms = torch.empty(room, d)
        self.gram = torch.empty(room, room)

    def walk(self, part: Rows, seed_atoms: SeedAtoms | None) -> None:
        """Add what a batch has that the dictionary lacks."""
        if seed_atoms is None and self.n == 0:
            self._add(part[:1])
            part = part[1:]
        elif seed_atoms is not None and self.n < self.d and self.seeded == self.n:
            first = _distinct(part.x, by_count=seed_atoms == "frequent")
            self._add(part[first[: min(self.d, self.most) - self.n]], seeds=True)
        step = len(part) if seed_atoms is not None else max(1, self.n)
        while len(part) and self.n < self.most:
            now, part = part[:step], part[step:]
            self._add(now[self.cosine(now.x) < self.cos_min])
            step = max(1, self.n) if seed_atoms is None else len(part)

    def cosine(self, x: Tensor) -> Tensor:
        """Return the cosine of rows `[n, d]` with their reconstructions."""
        atoms, k = self.atoms[: self.n], min(self.k, self.n)
        if self.pursuit == "orthogonal":
            codes = orthogonal_matching_pursuit(x, atoms, k)
            indices, values = codes.indices, codes.values
        else:
            indices, values = matching_pursuit(x, atoms, k, self.gram[: self.n, : self.n])
        return torch.cosine_similarity(x, sparse_decode(indices, values, atoms), dim=1)

    def _add(self, new: Rows, seeds: bool = False) -> None:
        rows = torch.nn.functional.normalize(new.x, dim=1)
        if self.duplicate_cos is not None and len(rows) > 1:
            alone = ~(torch.tril(rows @ rows.T, -1) > self.duplicate_cos).any(1)
            new, rows = new[alone], rows[alone]
        new, rows = new[: self.most - self.n], rows[: self.most - self.n]
        if not len(rows):
            return
        end = self.n + len(rows)
        self._make_room(end)
        self.atoms[self.n : end] = rows
        overlap = self.atoms[:end] @ rows.T
        self.gram[:end, self.n : end] = overlap
        self.gram[self.n : end, :end] = overlap.T
        self.seeded += len(rows) if seeds else 0
        self.n = end
        self.kept.append(new)

    def _make_room(self, end: int) -> None:
        room = len(self.atoms)
        if end <= room:
            return
        room = min(self.most, max(end, 2 * room))
        atoms, gram = torch.empty(room, self.d), torch.empty(room, room)
        atoms[: self.n] = self.atoms[: self.n]
        gram[: self.n, : self.n] = self.gram[: self.n, : self.n]
        self.atoms, self.gram = atoms, gram


def _distinct(x: Tensor, by_count: bool) -> Tensor:
    """Return the first occurrence of each distinct row, the most frequent first or in their order."""
    _, group, count = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
    first = torch.full((len(count),), len(x)).scatter_reduce_(0, group, torch.arange(len(x)), "amin")
    if not by_count:
        return first.sort().values
    return first[torch.argsort(-count * len(x) + first)]
