"""Sparse codes by search: which few atoms of a given dictionary, and how much of each, explain a row.

An encoder guesses a code in one step; a pursuit looks for it, one atom at a time. With atoms d_j as the
rows of D, residual r and support S:

    gradient pursuit (non-negative)            orthogonal matching pursuit
      r = x - w D                                r = x - w D
      S = {w != 0} + argmax_j d_j . r            S = S + argmax_j |d_j . r| / |d_j|
      g = (D r) on S, c = g D                    w on S = argmin |x - w D|^2
      w = max(0, w + (c . r / c . c) g)

Gradient pursuit is the "inference-time optimisation" that sparse autoencoders are compared with: at the
encoder's own L0 for every token, it says how much of the error is the encoder's fault and how much the
dictionary's.

Sources: Blumensath and Davies 2008, "Gradient Pursuits"; its non-negative form as in Smith 2024 and in
the code of Engels et al. 2024 ("Decomposing The Dark Matter of Sparse Autoencoders"). That code divides
by c . c without a check; here a row whose best inner product is not positive (to rounding) is finished.
An atom that was clipped to 0 leaves the support and may return, as there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError

_NUMBERS = 1 << 25  # of the table of inner products, rows by atoms, that is held at once


def gradient_pursuit(x: Tensor, atoms: Tensor, l0: Tensor | int) -> Codes:
    """Return non-negative codes of rows by gradient pursuit.

    Args:
        x: rows `[n, d]`; subtract the dictionary's bias first.
        atoms: `[m, d]`, of any length above 0 (unit rows make the choice of atoms scale-free).
        l0: how many steps each row may take, `[n]` or one number; a row has at most so many atoms.

    Returns:
        codes with as many places as the largest `l0` (at least one), in the dtype of `x`.

    Raises:
        ShapeError: shapes that do not go together.
        InputError: a number of steps below 0 or above the number of atoms.
    """
    steps = _steps(x, atoms, l0)
    return _chunks(x, atoms, steps, _gradient_chunk)


def orthogonal_matching_pursuit(x: Tensor, atoms: Tensor, k: Tensor | int) -> Codes:
    """Return signed codes of rows by orthogonal matching pursuit.

    A row stops before `k` atoms once its residual is orthogonal to all atoms (to rounding).

    Args:
        x: rows `[n, d]`.
        atoms: `[m, d]`, not zero.
        k: how many atoms a row may have, `[n]` or one number.

    Raises:
        ShapeError: shapes that do not go together.
        InputError: `k` below 0, above the number of atoms or above the number of channels.
    """
    steps = _steps(x, atoms, k)
    if len(steps) and int(steps.max()) > x.shape[1]:
        raise InputError(f"k is {int(steps.max())}; rows of {x.shape[1]} channels need no more atoms")
    return _chunks(x, atoms, steps, _orthogonal_chunk)


def pursue(lens: Dictionary, x: Tensor, l0: Tensor | int | None = None) -> Codes:
    """Return codes of activations by gradient pursuit over a dictionary's own atoms and bias.

    Args:
        lens: the dictionary.
        x: rows `[n, d]` in the units of the site.
        l0: steps for each row; default: the L0 of the lens's own code of that row.

    Returns:
        codes for `lens.decode`.

    Raises:
        ShapeError: not rows of the dictionary's channels.
    """
    rows = lens.flat(x)
    if rows.ndim != 2:
        raise ShapeError(f"pursue takes rows [n, d], not {list(x.shape)}")
    offset = lens.offset
    target = rows if offset is None else rows - offset.to(rows)
    return gradient_pursuit(target, lens.atoms.to(rows), lens.encode(rows).l0 if l0 is None else l0)


def _steps(x: Tensor, atoms: Tensor, wanted: Tensor | int) -> Tensor:
    if x.ndim != 2 or atoms.ndim != 2 or x.shape[1] != atoms.shape[1]:
        raise ShapeError(f"a pursuit takes rows [n, d] and atoms [m, d], not {list(x.shape)} and "
                         f"{list(atoms.shape)}")  # fmt: skip
    steps = torch.as_tensor(wanted, device=x.device, dtype=torch.int64).expand(len(x))
    low, high = (int(steps.min()), int(steps.max())) if len(x) else (0, 0)
    if low < 0 or high > len(atoms):
        raise InputError(f"a row cannot have {low if low < 0 else high} of {len(atoms)} atoms")
    return steps


def _chunks(
    x: Tensor, atoms: Tensor, steps: Tensor, solve: Callable[[Tensor, Tensor, Tensor, int], Codes]
) -> Codes:
    places = max(1, int(steps.max()) if len(x) else 1)
    if not len(x):
        return Codes(torch.zeros(0, places, dtype=torch.int64), x.new_zeros(0, places), len(atoms))
    size = max(1, _NUMBERS // max(len(atoms), places * x.shape[1]))
    parts = [
        solve(x[i : i + size], atoms, steps[i : i + size], places) for i in range(0, len(x), size)
    ]  # fmt: skip
    return Codes.cat(parts)


def _weighted(indices: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
    """Return `sum_j values_j atoms[indices_j]` for each row, `[n, d]`."""
    return F.embedding_bag(indices, atoms, per_sample_weights=values, mode="sum")


def _gradient_chunk(x: Tensor, atoms: Tensor, steps: Tensor, places: int) -> Codes:
    n = len(x)
    indices = torch.zeros(n, places, dtype=torch.int64, device=x.device)
    w = x.new_zeros(n, places)
    row = torch.arange(n, device=x.device)
    running = steps > 0
    smallest = 4 * torch.finfo(x.dtype).eps * x.norm(dim=1) * atoms.norm(dim=1).max()
    for step in range(int(steps.max())):
        r = x - _weighted(indices, w, atoms)
        inner = r @ atoms.T
        best, chosen = inner.max(-1)
        running = running & (steps > step) & (best > smallest)
        if not bool(running.any()):
            break
        held = (indices == chosen.unsqueeze(1)) & (w != 0)
        free = (w == 0).to(torch.int8).argmax(1)  # there is one: at most `step` of the places are used
        slot = torch.where(held.any(1), held.to(torch.int8).argmax(1), free)
        indices[row[running], slot[running]] = chosen[running]
        support = w != 0
        support[row[running], slot[running]] = True
        g = inner.gather(1, indices) * support
        c = _weighted(indices, g, atoms)
        size = (c * r).sum(-1) / (c * c).sum(-1).clamp_min(torch.finfo(x.dtype).tiny)
        w = torch.where(running.unsqueeze(1), (w + size.unsqueeze(1) * g).clamp_min(0), w)
    return Codes(indices, w, len(atoms))


def _orthogonal_chunk(x: Tensor, atoms: Tensor, steps: Tensor, places: int) -> Codes:
    n = len(x)
    wide, d = x.double(), atoms.double()
    lengths = d.norm(dim=1)
    if bool((lengths == 0).any()):
        raise InputError(f"atom {int((lengths == 0).nonzero()[0])} is zero; leave it out")
    unit = d / lengths.unsqueeze(1)
    target = wide @ unit.T
    smallest = 1e-10 * wide.norm(dim=1)
    indices = torch.zeros(n, places, dtype=torch.int64, device=x.device)
    w = wide.new_zeros(n, places)
    taken = torch.zeros(n, len(atoms), dtype=torch.bool, device=x.device)
    alive = torch.arange(n, device=x.device)[steps > 0]
    for step in range(int(steps.max())):
        inner = target[alive] - _weighted(indices[alive], w[alive], unit) @ unit.T
        best, chosen = inner.abs().masked_fill(taken[alive], -1.0).max(-1)
        alive, chosen = alive[best > smallest[alive]], chosen[best > smallest[alive]]
        if not len(alive):
            break
        indices[alive, step] = chosen
        taken[alive, chosen] = True
        held = unit[indices[alive, : step + 1]]  # [rows, step + 1, d]
        gram = held @ held.transpose(1, 2)
        right = target[alive].gather(1, indices[alive, : step + 1]).unsqueeze(-1)
        factor, failed = torch.linalg.cholesky_ex(gram)
        solved = torch.cholesky_solve(right, factor).squeeze(-1)
        good = (failed == 0) & torch.isfinite(solved).all(1)
        w[alive[good], : step + 1] = solved[good]  # an atom in the span of the others adds nothing
        alive = alive[good & (steps[alive] > step + 1)]
    return Codes(indices, (w / lengths[indices]).to(x.dtype), len(atoms))
