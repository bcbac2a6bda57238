"""How well a dictionary of activations rebuilds held-out rows, beside as many random activations.

    fraction of variance unexplained = sum |x - x_hat|^2 / sum |x - mean|^2

The control is the same reading (matching pursuit, the same k) over an equal number of rows drawn at
random from those that were walked through. What lies between the two is what the selection buys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.measurement import Measurement
from actlas.dictionaries.labelled_rows import Rows
from actlas.measure.differences import paired_difference
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.dictionaries.itda import ITDA

FVU = "fraction of variance unexplained"
GAP = "FVU of random atoms minus FVU"


class RandomRows:
    """A uniform sample of the rows of a stream, without replacement.

    Every row draws a number; the rows with the smallest numbers stay.

    Args:
        most: how many can be asked for.
        seed: of the draws.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.most = most
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[Tensor] = []
        self._drawn: list[Tensor] = []
        self._held = 0

    def add(self, x: Tensor) -> None:
        """Take rows `[n, d]`."""
        self._rows.append(x)
        self._drawn.append(torch.rand(len(x), generator=self._generator, dtype=torch.float64))
        self._held += len(x)
        if self._held > 2 * self.most:
            self._shrink(self.most)

    def take(self, n: int) -> Tensor:
        """Return n of the rows seen, `[n, d]` (fewer, if there were fewer)."""
        self._shrink(n)
        return self._rows[0]

    def _shrink(self, n: int) -> None:
        drawn = torch.cat(self._drawn)
        stay = drawn.argsort()[:n].sort().values
        self._rows, self._drawn = [torch.cat(self._rows)[stay]], [drawn[stay]]
        self._held = len(stay)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows to measure on, with the groups that are drawn together in a bootstrap.

    Attributes:
        x: `[n, d]`.
        unit: the window, document or block of each row, int64 `[n]`.
    """

    x: Tensor
    unit: Tensor

    @property
    def spread(self) -> NDArray[np.float64]:
        """Squared distance of each row from the mean of these rows."""
        distance: NDArray[np.float64] = (self.x - self.x.mean(0)).double().square().sum(1).numpy()
        return np.maximum(distance, 1e-30)

    def share(self, rebuilt: Tensor) -> NDArray[np.float64]:
        """Return each row's squared error as a share of its spread, `[n]`."""
        error: NDArray[np.float64] = (self.x - rebuilt).double().square().sum(1).numpy()
        return error / self.spread

    def fvu(
        self, rebuilt: Tensor, group: Mapping[str, str], *, name: str = FVU, seed: int = 0, note: str = ""
    ) -> Measurement:
        """Return the fraction of variance unexplained by a reconstruction."""
        found = mean_measurement(
            name,
            "fraction",
            self.share(rebuilt),
            self.spread,
            seed=seed,
            over="windows",
            clusters=self.unit.numpy(),
            better="lower",
            group=group,
            note=note,
        )
        return replace(found, details={"tokens": len(self.x)})

    def gap(
        self, first: Tensor, second: Tensor, name: str, group: Mapping[str, str], *, seed: int = 0
    ) -> Measurement:
        """Return how much larger the FVU of the second reconstruction is, paired.

        `details["relative"]` is the difference as a share of the second's.
        """
        shares = self.share(first), self.share(second)
        found = paired_difference(*shares, self.spread, clusters=self.unit.numpy(), seed=seed)
        other = float((shares[1] * self.spread).sum() / self.spread.sum())
        relative = found.value / other if other > 0 else math.nan
        return Measurement(
            name=name,
            value=found.value,
            unit="fraction",
            n=len(self.unit.unique()),
            low=None if math.isnan(found.low) else found.low,
            high=None if math.isnan(found.high) else found.high,
            interval="paired bootstrap over windows",
            seed=seed,
            group=group,
            details={"relative": relative if math.isfinite(relative) else None},
        )


def with_atoms(lens: ITDA, rows: Tensor) -> ITDA:
    """Return a dictionary that is read in the same way but whose atoms are these rows `[n, d]`."""
    return replace(
        lens,
        directions=torch.nn.functional.normalize(rows, dim=1),
        labels=torch.full((len(rows), 3), -1),
        texts=(),
        seeded=0,
        k=min(lens.k, len(rows)),
    )


def measure_against_random(
    lens: ITDA, apart: list[Rows], random: Tensor, seed: int, note: str = ""
) -> tuple[Measurement, ...]:
    """Return the held-out FVU, that of random atoms, and the difference, with intervals over windows.

    Args:
        lens: the dictionary.
        apart: held-out rows.
        random: rows `[n, d]` of the fitting data, as many as the lens has atoms.
        seed: of the bootstraps.
        note: added to the lens's own measurement.
    """
    apart = [part for part in apart if len(part)]
    if not apart:
        return (missing(FVU, "fraction", "no rows were held out: the data is too small, or held_out=0"),)
    rows = Rows.cat(apart)
    held = HeldOut(rows.x, rows.unit)
    own, other = lens.reconstruct(rows.x), with_atoms(lens, random).reconstruct(rows.x)
    said = f"{lens.features:,} atoms of {lens.rows:,} rows, {lens.k} steps, cosine below {lens.cos_min:g}"
    control = f"control: {len(random):,} random rows as atoms"
    site = {"site": lens.site}
    gap = held.gap(own, other, GAP, site, seed=seed)
    return (
        held.fvu(own, {**site, "atoms": "selected"}, seed=seed, note=said + note),
        held.fvu(other, {**site, "atoms": "random"}, seed=seed, note=control),
        replace(gap, note=what_selection_buys(gap.details["relative"])),
    )


def what_selection_buys(relative: float | None) -> str:
    """Say in words by how much the selection of atoms changes the error of random ones."""
    if relative is None:
        return ""
    verb = "lowers" if relative >= 0 else "raises"
    return f"the selection {verb} the error of random atoms by {abs(relative):.1%}"
