"""Matryoshka BatchTopK: nested dictionaries, each of which must reconstruct alone.

    z    as for BatchTopK, over all m features
    loss = sum_l |x - (sum_{j < m_l} z_j W_dec[j] + b_dec)|^2  +  aux * |e - e_hat|^2

Bussmann, Nabeshima, Karvonen and Nanda 2025, "Learning Multi-Level Features with Matryoshka Sparse
Autoencoders". The first features must do without the later ones, so they stay general instead of being
absorbed by special cases. Levels end at shares 1/32, 3/32, 7/32, 15/32 and 1 of the width, as published.

With `e_l` the error at level l, feature j of level l(j) receives G_j = sum_{l >= l(j)} 2 e_l / n from the
decoder, so one sum over codes per level gives the exact gradient, and only k of m features are touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError
from actlas.dictionaries.batch_topk import BatchTopKSAE
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.kernels.sparse_codes import gather_dot, scatter_outer, sparse_decode

if TYPE_CHECKING:
    from typing_extensions import Self

_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)


@dataclass(kw_only=True, eq=False)
class MatryoshkaSAE(BatchTopKSAE):
    """A Matryoshka BatchTopK autoencoder.

    Attributes:
        levels: sizes of the nested dictionaries, increasing; the last is the width.
    """

    levels: tuple[int, ...] = ()
    architecture: ClassVar[str] = "matryoshka"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.levels = tuple(int(n) for n in self.levels) or (self.features,)
        rising = all(a < b for a, b in zip((0, *self.levels), self.levels, strict=False))
        if not rising or self.levels[-1] != self.features:
            raise InputError(
                f"levels are {list(self.levels)}; they must increase and end at the width, {self.features}"
            )

    @classmethod
    def create(cls, site: str, d: int, width: int, *, seed: int = 0, **options: Any) -> Self:
        if not options.get("levels"):
            options["levels"] = tuple(sorted({max(1, round(share * width)) for share in _SHARES}))
        return super().create(site, d, width, seed=seed, **options)

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        """The dense form of the loss."""
        pre = self.pre(batch.x)
        chosen = self.select(pre, batch)
        values = pre.gather(1, chosen.indices) * chosen.active
        z = torch.zeros_like(pre).scatter_add(1, chosen.indices, values)
        n, loss = len(batch), pre.new_zeros(())
        error = self.b_dec - batch.target
        for low, high in self._ranges():
            error = error + z[:, low:high] @ self.W_dec[low:high]
            loss = loss + error.square().sum() / n
        auxiliary = self.auxiliary(pre, -error.detach(), state)
        parts = {} if auxiliary is None else {"aux": float(auxiliary.detach())}
        whole = loss if auxiliary is None else loss + state.settings.aux * auxiliary
        return Objective(whole, error.detach().square().sum(), chosen.detach(), parts)

    def gradients(self, batch: Batch, state: TrainState) -> tuple[Objective, dict[str, Tensor]]:
        n, m = len(batch), self.features
        low_precision = state.settings.dtype == "bfloat16"
        with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=low_precision):
            pre = self.pre(batch.x)
        pre = pre.float() if low_precision else pre
        codes = self.select(pre, batch)
        levels = [self._level(codes, low, high) for low, high in self._ranges()]
        errors, error, loss = [], self.b_dec - batch.target, pre.new_zeros(())
        for part in levels:
            error = error + sparse_decode(part.indices, part.values, self.W_dec)
            errors.append(error)
            loss = loss + error.square().sum() / n
        x = batch.x - self.b_dec if self.centred else batch.x
        found = {name: torch.zeros_like(getattr(self, name)) for name in self.trainable}
        g = torch.zeros_like(error)
        for part, own in zip(reversed(levels), reversed(errors), strict=True):
            g = g + own * (2 / n)
            dz = gather_dot(part.indices, g, self.W_dec) * part.active
            scatter_outer(part.indices, dz, x, m, out=found["W_enc"])
            scatter_outer(part.indices, part.values, g, m, out=found["W_dec"])
            found["b_enc"].index_add_(0, part.indices.reshape(-1), dz.reshape(-1))
            found["b_dec"] += own.sum(0) * (2 / n)
        if self.centred:
            found["b_dec"] -= found["b_enc"] @ self.W_enc
        parts = {}
        if state.settings.aux and bool(state.dead.any()):
            auxiliary, revive = self._auxiliary_gradients(batch, -error, state)
            found["b_dec"] += revive.pop("b_dec")
            dead = state.dead.nonzero().squeeze(1)
            for name, part_of_dead in revive.items():
                found[name].index_add_(0, dead, part_of_dead)
            loss, parts = loss + state.settings.aux * auxiliary, {"aux": float(auxiliary)}
        self.follow(codes, state)
        return Objective(loss, error.square().sum(), codes, parts), self.constrain(found)

    def _ranges(self) -> list[tuple[int, int]]:
        return list(zip((0, *self.levels[:-1]), self.levels, strict=True))

    def _level(self, codes: Codes, low: int, high: int) -> Codes:
        """Return the codes of the features from `low` to `high`, as narrow as they can be."""
        inside = (codes.indices >= low) & (codes.indices < high)
        values = codes.values * inside
        places = max(1, int((values != 0).sum(1).max()))
        if places == codes.places:
            return Codes(codes.indices, values, codes.features)
        at = values.topk(places, dim=1, sorted=False).indices
        return Codes(codes.indices.gather(1, at), values.gather(1, at), codes.features)
