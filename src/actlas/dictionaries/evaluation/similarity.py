"""Do two dictionaries hold the same features? Cosines of their atoms, matched by maximum or one to one.

    s_i   = max_j cos(a_i, b_j)                      how well atom i of A is found in B
    MMCS  = mean_i s_i                               mean maximum cosine similarity (Sharkey et al. 2022)
    one to one: the matching p that maximises mean_i cos(a_i, b_p(i)), by the Hungarian algorithm

MMCS is not symmetric (a wide dictionary holds a narrow one more easily than the other way round), so
both directions are reported, each beside random directions: in d channels the nearest of m random atoms
has a cosine of about sqrt(2 ln m / d), which is 0.17 for 4,608 atoms in 576 channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError
from actlas.core.measurement import Measurement
from actlas.measure.compare import difference
from actlas.measure.samples import mean_measurement

_NUMBERS = 1 << 24
_MOST = 8192  # atoms of one side in a one-to-one matching
_APART = 7_919
SHARED = 0.7  # an atom with such a partner is called shared


class Matches(NamedTuple):
    """For each atom of A: the best cosine in B, `[m]`, and which atom of B it is, int64 `[m]`."""

    values: Tensor
    indices: Tensor


def max_cosine(a: Tensor, b: Tensor, *, own: bool = False) -> Matches:
    """Return each atom's nearest atom in another dictionary.

    Args:
        a: `[m, d]`. b: `[p, d]`. Zero rows have cosine 0 with everything.
        own: `a` and `b` are the same, and an atom does not count as its own neighbour.

    Raises:
        ShapeError: other shapes, or nothing to match with.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or len(b) <= int(own):
        raise ShapeError(f"atoms must be [m, d] and [p, d], not {list(a.shape)} and {list(b.shape)}")
    left, right = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
    size = max(1, _NUMBERS // len(right))
    found = []
    for start in range(0, len(left), size):
        cosines = left[start : start + size] @ right.T
        if own:
            row = torch.arange(len(cosines), device=cosines.device)
            cosines[row, start + row] = -2.0
        found.append(cosines.max(1))
    return Matches(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))


def one_to_one(a: Tensor, b: Tensor) -> Matches:
    """Return the one-to-one matching of greatest total cosine; atoms without a partner get -1 and index -1.

    Raises:
        ShapeError: see `max_cosine`. InputError: more atoms than the Hungarian algorithm can match here.
    """
    from scipy.optimize import linear_sum_assignment

    if max(len(a), len(b)) > _MOST:
        raise InputError(
            f"{max(len(a), len(b)):,} atoms are too many for a one-to-one matching; the most is {_MOST:,}"
        )
    max_cosine(a[:1], b)  # checks the shapes
    cosines = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    values, indices = torch.full((len(a),), -1.0), torch.full((len(a),), -1, dtype=torch.int64)
    i, j = torch.from_numpy(rows), torch.from_numpy(columns)
    values[i], indices[i] = cosines.cpu()[i, j], j
    return Matches(values, indices)


def dictionary_similarity(
    a: Dictionary,
    b: Dictionary,
    *,
    names: tuple[str, str] = ("a", "b"),
    alive: tuple[Tensor | None, Tensor | None] = (None, None),
    matching: bool = False,
    seed: int = 0,
) -> list[Measurement]:
    """Return MMCS and the share of shared atoms in both directions, beside random directions.

    Args:
        a, b: dictionaries of sites with the same channels (of one model, or of models that share a basis).
        names: what they are called in the groups.
        alive: which features count, bool `[features]`; features that never fire only add noise.
        matching: also give the mean cosine of the best one-to-one matching.
        seed: of the random directions and the bootstrap.

    Raises:
        ShapeError: different channels.
    """
    if a.channels != b.channels:
        raise ShapeError(
            f"the dictionaries read {a.channels} and {b.channels} channels; cosines need the same channels"
        )
    kept = [
        lens.atoms if mask is None else lens.atoms[mask] for lens, mask in zip((a, b), alive, strict=True)
    ]
    # Not a fresh generator's first draw: that is what a dictionary trained with this seed began with.
    generator = torch.Generator().manual_seed(seed + _APART)
    out: list[Measurement] = []
    for (left, right), direction in (
        (kept, f"{names[0]} in {names[1]}"),
        (kept[::-1], f"{names[1]} in {names[0]}"),
    ):
        noise = torch.randn(right.shape, generator=generator)
        found, control = max_cosine(left, right).values, max_cosine(left.cpu(), noise).values
        group = {"direction": direction}
        pair = [
            mean_measurement(
                "mmcs",
                "cosine",
                v.double().cpu().numpy(),
                seed=seed,
                over="features",
                group=group | {"against": g},
            )
            for v, g in ((found, "the other dictionary"), (control, "random directions"))
        ]
        more = difference(pair[1], pair[0], seed)
        shared = (found > SHARED).double().cpu().numpy()
        out += [
            *pair,
            _renamed(more, "mmcs over random directions", group),
            mean_measurement(
                "shared_features", "fraction", shared, seed=seed, over="features", group=group,
                note=f"atoms with a cosine above {SHARED}",
            ),
        ]  # fmt: skip
    if matching:
        found = one_to_one(*kept).values
        values = found[found > -1].double().numpy()
        out.append(
            mean_measurement("one_to_one_cosine", "cosine", values, seed=seed, over="matched features")
        )
    return out


def _renamed(m: Measurement, name: str, group: dict[str, str]) -> Measurement:
    from dataclasses import replace

    details = {k: v for k, v in m.details.items() if not isinstance(v, np.ndarray)}
    return replace(m, name=name, group=group, details=details)
