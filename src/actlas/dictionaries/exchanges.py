"""Edit an activation by exchanging at most m features of a dictionary, and see how big the edit is.

`x` is an activation with codes z, `x_cf` the one it shall become, with codes z'. The error of the
dictionary stays in `x`; only chosen features change:

    agnostic   m times, the feature j whose change (z'_j - z_j) d_j brings the edited vector nearest x_cf;
               none, once no change brings it nearer
    by F1      remove the m active features of x that tell the old value best (z_j d_j), add the m active
               ones of x_cf that tell the new value best (z'_j d_j)
    random     m random ones of the features whose codes differ: the control

What an edit overwrites is measured by the weight of the features that it removes,

    w_j = z_j d_j . (x_hat - b) / |x_hat - b|^2             sum_j w_j = 1

An edit that removes weight near 1 has overwritten everything that the dictionary sees.

The greedy choice never forms `[rows, features, d]`: with r = x_cf - edited and c_j = z'_j - z_j,
|r - c_j d_j|^2 = |r|^2 - 2 c_j r.d_j + c_j^2 |d_j|^2.

Source: Makelov, Lange and Nanda 2024, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError

_NUMBERS = 8_000_000  # numbers of a dense block of codes held at once


@dataclass(frozen=True, eq=False)
class Exchanged:
    """Edited activations.

    Attributes:
        x: `[n, d]`.
        weight: `[n]`, weight of the features that were removed or changed.
        count: int64 `[n]`, how many features were exchanged (by score: removed or added, the more).
    """

    x: Tensor
    weight: Tensor
    count: Tensor


def weights(dictionary: Dictionary, codes: Codes) -> Tensor:
    """Return each feature's share of the reconstruction, dense `[n, features]`; rows without any are 0."""
    part = dictionary.decode(codes)
    centred = part if dictionary.offset is None else part - dictionary.offset
    norm = centred.square().sum(-1, keepdim=True)
    shares = codes.dense().to(centred) * (centred @ dictionary.atoms.to(centred).T)
    return torch.where(
        norm > 0, shares / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(shares)
    )


def exchange_agnostic(
    dictionary: Dictionary, x: Tensor, x_cf: Tensor, exchanges: Sequence[int]
) -> dict[int, Exchanged]:
    """Exchange the features that bring `x` nearest to `x_cf`, greedily.

    Args:
        dictionary: whose features.
        x, x_cf: activations `[n, d]`.
        exchanges: numbers m; all are read off one greedy run.

    Returns:
        The edited activations by m.
    """
    steps = _sorted(exchanges)

    def run(block: _Block) -> dict[int, Exchanged]:
        change = block.z_cf - block.z
        energy = change.square() * block.squared
        edited, found = block.x.clone(), {}
        weight, count = (
            torch.zeros(len(edited), dtype=edited.dtype),
            torch.zeros(len(edited), dtype=torch.int64),
        )
        rows = torch.arange(len(edited))
        for step in range(1, steps[-1] + 1):
            gain = 2 * change * ((block.x_cf - edited) @ block.atoms.T) - energy
            best, j = gain.max(1)
            better = best > 0
            amount = torch.where(better, change[rows, j], torch.zeros_like(best))
            edited = edited + amount.unsqueeze(1) * block.atoms[j]
            weight = weight + torch.where(better, block.weight[rows, j], torch.zeros_like(best))
            count = count + better
            change[rows, j] = torch.where(better, torch.zeros_like(best), change[rows, j])
            energy[rows, j] = torch.where(better, torch.zeros_like(best), energy[rows, j])
            if step in steps:
                found[step] = Exchanged(edited.clone(), weight.clone(), count.clone())
        return found

    return _by_block(dictionary, x, x_cf, run)


def exchange_by_score(
    dictionary: Dictionary, x: Tensor, x_cf: Tensor, old: Tensor, new: Tensor, exchanges: Sequence[int]
) -> dict[int, Exchanged]:
    """Exchange the features that tell the old and the new value best.

    Args:
        dictionary, x, x_cf, exchanges: see `exchange_agnostic`.
        old: `[n, features]`, how well each feature tells the value that a row has, e.g. its F1.
        new: the same for the value that it shall have. Features of score -inf are never taken.
    """
    steps = _sorted(exchanges)
    if old.shape != (len(x), dictionary.features) or new.shape != old.shape:
        raise ShapeError(
            f"scores must be [{len(x)}, {dictionary.features}], not {list(old.shape)} and {list(new.shape)}"
        )

    def run(block: _Block) -> dict[int, Exchanged]:
        found = {}
        for m in steps:
            take, removed = _best_active(old[block.rows].to(block.z), block.z, m)
            put, added = _best_active(new[block.rows].to(block.z), block.z_cf, m)
            edited = block.x + (put - take) @ block.atoms
            weight = (block.weight * (take != 0)).sum(1)
            found[m] = Exchanged(edited, weight, torch.maximum(removed, added))
        return found

    return _by_block(dictionary, x, x_cf, run)


def exchange_random(
    dictionary: Dictionary, x: Tensor, x_cf: Tensor, exchanges: Sequence[int], *, seed: int = 0
) -> dict[int, Exchanged]:
    """Exchange random ones of the features whose codes differ: the control of the other two."""
    steps = _sorted(exchanges)
    generator = torch.Generator().manual_seed(seed)

    def run(block: _Block) -> dict[int, Exchanged]:
        change = block.z_cf - block.z
        order = torch.rand(change.shape, generator=generator).masked_fill(change == 0, -1.0)
        ranked = order.argsort(1, descending=True)
        found = {}
        for m in steps:
            chosen = torch.zeros_like(change).scatter_(1, ranked[:, :m], 1.0) * (change != 0)
            edited = block.x + (change * chosen) @ block.atoms
            found[m] = Exchanged(edited, (block.weight * chosen).sum(1), chosen.sum(1).long())
        return found

    return _by_block(dictionary, x, x_cf, run)


@dataclass(frozen=True, eq=False)
class _Block:
    """Some rows with dense codes."""

    rows: slice
    x: Tensor
    x_cf: Tensor
    z: Tensor
    z_cf: Tensor
    weight: Tensor
    atoms: Tensor
    squared: Tensor


def _by_block(dictionary: Dictionary, x: Tensor, x_cf: Tensor, run: object) -> dict[int, Exchanged]:
    if x.shape != x_cf.shape or x.ndim != 2:
        raise ShapeError(f"x and x_cf must both be [n, d], not {list(x.shape)} and {list(x_cf.shape)}")
    assert callable(run)
    parts: list[dict[int, Exchanged]] = [run(block) for block in _blocks(dictionary, x, x_cf)]
    return {
        m: Exchanged(*(torch.cat([getattr(p[m], name) for p in parts]) for name in ("x", "weight", "count")))
        for m in parts[0]
    }


def _blocks(dictionary: Dictionary, x: Tensor, x_cf: Tensor) -> Iterator[_Block]:
    atoms = dictionary.atoms.to("cpu")
    squared = atoms.square().sum(1)
    size = max(1, _NUMBERS // dictionary.features)
    for start in range(0, max(1, len(x)), size):
        rows = slice(start, start + size)
        codes, codes_cf = dictionary.encode(x[rows]).to("cpu"), dictionary.encode(x_cf[rows]).to("cpu")
        yield _Block(
            rows, x[rows].to(atoms), x_cf[rows].to(atoms),
            codes.dense().to(atoms), codes_cf.dense().to(atoms),
            weights(dictionary, codes).to(atoms), atoms, squared,
        )  # fmt: skip


def _best_active(score: Tensor, z: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return the codes of the m best active features of each row (others 0), and how many there are."""
    masked = score.masked_fill(z == 0, -torch.inf)
    best = masked.topk(min(m, z.shape[1]), dim=1)
    taken = best.values > -torch.inf
    kept = torch.zeros_like(z).scatter_(1, best.indices, z.gather(1, best.indices) * taken)
    return kept, taken.sum(1)


def _sorted(exchanges: Sequence[int]) -> list[int]:
    found = sorted({int(m) for m in exchanges})
    if not found or found[0] < 1:
        raise InputError(f"exchanges are {list(exchanges)}; give numbers of features, at least 1")
    return found
