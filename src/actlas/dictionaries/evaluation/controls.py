"""What an evaluation is read beside: dictionaries that nobody trained, of equal size and equal k.

    random atoms        atoms are activations drawn at random, centred and brought to unit norm
    random directions   atoms are drawn uniformly from the sphere

Both have the dictionary's number of features, its mean of the data as offset, and are read by matching
pursuit with k, the dictionary's mean L0, so that their codes are as good as such a search makes them.
Random activations reconstruct a residual stream nearly as well as chosen ones; a dictionary that does
not beat them has learnt nothing that sampling would not give.

Ablations: `Offset` is the dictionary without features. Substituting it is mean ablation of exactly those
tokens that a dictionary's substitution replaces (massive rows pass through both).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import check_finite
from actlas.kernels.sparse_codes import matching_pursuit

MOST_ATOMS = 8192  # a pursuit keeps the products of all pairs of atoms: 256 MB at this size
_GRAM = 1 << 26


@dataclass(kw_only=True, eq=False)
class UnitDirections(Dictionary):
    """A fixed set of unit atoms around a centre, read by matching pursuit.

    Attributes:
        directions: float32 `[m, d]`, unit rows. centre: float32 `[d]`. k: steps of the pursuit.
    """

    directions: Tensor
    centre: Tensor
    k: int = 32

    def __post_init__(self) -> None:
        if self.directions.ndim != 2 or self.centre.shape != self.directions.shape[1:]:
            raise ShapeError(
                f"UnitDirections needs directions [m, d] and centre [d], not {list(self.directions.shape)} "
                f"and {list(self.centre.shape)}"
            )
        if not 1 <= self.k <= len(self.directions):
            raise InputError(f"k is {self.k}; it must be between 1 and the {len(self.directions)} atoms")
        check_finite("UnitDirections", directions=self.directions, centre=self.centre)

    @property
    def channels(self) -> int:
        return self.directions.shape[1]

    @property
    def features(self) -> int:
        return self.directions.shape[0]

    @property
    def atoms(self) -> Tensor:
        return self.directions

    @property
    def offset(self) -> Tensor:
        return self.centre

    @cached_property
    def gram(self) -> Tensor | None:
        """The products of all pairs of atoms, unless they would take more than 256 MB."""
        return self.directions @ self.directions.T if self.features**2 <= _GRAM else None

    def encode_rows(self, x: Tensor) -> Codes:
        rows = (x.to(self.directions) - self.centre).contiguous()
        indices, values = matching_pursuit(rows, self.directions, self.k, self.gram)
        return Codes(indices, values, self.features)


@dataclass(kw_only=True, eq=False)
class Offset(Dictionary):
    """A dictionary without any feature that fires: it reconstructs every row as `centre`."""

    centre: Tensor

    @property
    def channels(self) -> int:
        return len(self.centre)

    @property
    def features(self) -> int:
        return 1

    @property
    def atoms(self) -> Tensor:
        return torch.zeros(1, len(self.centre), dtype=self.centre.dtype, device=self.centre.device)

    @property
    def offset(self) -> Tensor:
        return self.centre

    def encode_rows(self, x: Tensor) -> Codes:
        places = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        return Codes(places, x.new_zeros(len(x), 1), 1)


def control_dictionaries(lens: Dictionary, rows: Tensor, k: float, seed: int = 0) -> dict[str, Dictionary]:
    """Return `{"random atoms": ..., "random directions": ...}` for a dictionary.

    Args:
        lens: the dictionary that they stand beside.
        rows: activations `[n, d]` that are not evaluated on; atoms are drawn from them, with repetition
            only if there are fewer rows than features.
        k: mean L0 of the dictionary; rounded, at least 1.
        seed: of the draws.

    Raises:
        InputError: fewer than two rows.
    """
    if len(rows) < 2:
        raise InputError(f"random atoms are drawn from at least 2 rows, not {len(rows)}")
    generator = torch.Generator().manual_seed(seed)
    size = min(lens.features, MOST_ATOMS)
    centre = rows.double().mean(0).float()
    order = torch.randperm(len(rows), generator=generator)
    drawn = order[torch.arange(size) % len(rows)]
    spread = rows[drawn] - centre
    noise = torch.randn(size, rows.shape[1], generator=generator)
    steps = min(max(1, round(k)), size)
    out: dict[str, Dictionary] = {}
    for name, atoms in (("random atoms", spread), ("random directions", noise)):
        unit = F.normalize(torch.where(atoms.norm(dim=1, keepdim=True) > 0, atoms, noise), dim=1)
        out[name] = UnitDirections(
            site=lens.site,
            heads=lens.heads,
            fingerprint=lens.fingerprint,
            skip_above=lens.skip_above,
            directions=unit,
            centre=centre,
            k=steps,
        )
    return out
