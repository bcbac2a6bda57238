"""How many directions a layer's residual stream uses.

    RankObserver()            effective-rank, participation-ratio
    effective_rank(second_moment) -> float       participation_ratio(second_moment) -> float

From the second-moment matrix `M = X^T X / n` of the residual states (eigenvalues `l_i`, singular values of X
`s_i = sqrt(n l_i)`):

    effective rank         exp(H),  H = -sum p_i log p_i,  p_i = s_i / sum s_j       (Roy, Vetterli 2007)
    participation ratio    (sum l_i)^2 / sum l_i^2

A common mean counts as a direction; the same numbers of the covariance are in `details["centred"]`. Both
grow with the number of tokens until that is well above the width: compare at equal token counts. Intervals
are a jackknife over four groups of documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from actlas.core.measurement import Measurement
from actlas.measure.observing import Batch, Observer, jackknife, residual_sites
from actlas.measure.samples import missing

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

_NAMES = ("effective-rank", "participation-ratio")
_FOLDS = 4
_MEMORY = 1 << 28  # bytes of second moments that are held at most


def effective_rank(second_moment: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values, from a second moment `[d, d]`."""
    singular = torch.linalg.eigvalsh(second_moment.double()).clamp_min(0).sqrt()
    p = singular / singular.sum()
    return float(torch.special.entr(p).sum().exp())


def participation_ratio(second_moment: Tensor) -> float:
    """Return `tr(M)^2 / ||M||_F^2`, which needs no eigenvalues."""
    m = second_moment.double()
    return float(m.trace() ** 2 / m.square().sum())


class RankObserver(Observer):
    """Second moments of the residual stream of every layer, massive tokens left out.

    Where all layers' matrices would take more than 256 MiB, evenly spaced layers are kept.
    """

    def __init__(self) -> None:
        self._sites: list[Site] = []
        self._moments: dict[str, Tensor] = {}  # [folds, d, d] float32
        self._sums: dict[str, Tensor] = {}  # [folds, d] float64
        self._counts = np.zeros(_FOLDS)
        self._documents: set[int] = set()
        self._left_out = 0

    def _choose(self, model: Model) -> None:
        sites, d = residual_sites(model), model.d_model or 1
        room = max(1, _MEMORY // (4 * _FOLDS * d * d))
        if len(sites) > room:
            keep = sorted({round(i) for i in np.linspace(0, len(sites) - 1, room)})
            sites = [sites[i] for i in keep]
        self._sites = sites

    def update(self, batch: Batch) -> None:
        if not self._sites:
            self._choose(batch.model)
        self._left_out += int(batch.massive.sum())
        fold = batch.document % _FOLDS
        self._documents |= set(batch.document.tolist())
        for f in range(_FOLDS):
            chosen = torch.from_numpy((fold == f) & batch.ordinary)
            self._counts[f] += int(chosen.sum())
            if not bool(chosen.any()):
                continue
            for site in self._sites:
                x = batch.rows(site.name)[chosen].float().cpu()
                d = x.shape[1]
                moments = self._moments.setdefault(site.name, torch.zeros(_FOLDS, d, d))
                sums = self._sums.setdefault(site.name, torch.zeros(_FOLDS, d, dtype=torch.float64))
                moments[f].addmm_(x.T, x)
                sums[f] += x.double().sum(0)

    def results(self, seed: int) -> list[Measurement]:
        out = []
        folds = np.flatnonzero(self._counts)
        total = float(self._counts.sum())
        note = f"{int(total):,} tokens"
        if self._left_out:
            note += f", {self._left_out:,} massive tokens left out"
        for site in self._sites:
            if site.name not in self._moments:
                group = {"layer": str(site.block)}
                out += [missing(n, "dimensions", "no tokens but massive ones", group=group) for n in _NAMES]
                continue
            moments, sums = self._moments[site.name], self._sums[site.name]
            whole = moments.double().sum(0)
            mean = sums.sum(0) / total
            centred = whole / total - mean.outer(mean)
            parts = [(whole - moments[f].double()) for f in folds]
            for name, measure in (
                ("effective-rank", effective_rank),
                ("participation-ratio", participation_ratio),
            ):
                value = measure(whole)
                low, high = jackknife(value, [measure(p) for p in parts] if len(folds) > 1 else [])
                out.append(
                    Measurement(
                        name,
                        value,
                        "dimensions",
                        len(self._documents),
                        low,
                        high,
                        f"jackknife over {len(folds)} groups of documents",
                        None,
                        group={"layer": str(site.block)},
                        note=note,
                        details={"centred": measure(centred), "of": whole.shape[0]},
                    )
                )
        return out
