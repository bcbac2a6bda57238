"""Crosscoders: one set of features for several sites (or several models) at once.

    z       = ReLU(sum_l W_enc^l s_l x^l + b_enc)                shared
    x_hat^l = (z W_dec^l + b_dec^l) / s_l                        one decoder a site
    loss    = sum_l |x^l - x_hat^l|^2  +  lambda * sum_i z_i sum_l |W_dec^l[i]|

Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing". Decoder rows are free:
how a feature's norm is spread over the sites says where it lives (`norms`), so the penalty weighs a
feature by the sum of its norms instead of holding them at 1. `s_l` brings each site to a mean norm of
sqrt(d_l). Rows are the sites' activations side by side, `[n, d_1 + d_2 + ...]`.

A crosscoder reads sites of different depths, so its reconstruction cannot be put in place while the pass
that it reads is running: `substitute` refuses, and `patch(trace)` writes the reconstructions of a pass that
was read before. `edit(i, 4.0)` steers along a feature at all of its sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Operation
from actlas.core.errors import InputError
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.relu import sparsity
from actlas.dictionaries.sae import SAE

if TYPE_CHECKING:
    from typing_extensions import Self

    from actlas.core.edit import Edit
    from actlas.core.trace import Trace


@dataclass(kw_only=True, eq=False)
class Crosscoder(SAE):
    """A crosscoder over `sites`.

    Attributes:
        sites: what it reads, in the order of the channels.
        sizes: channels of each site.
        site_scale: float32 `[d_1 + d_2 + ...]`, each channel's s_l over the common `scale`.
    """

    sites: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    site_scale: Tensor
    architecture: ClassVar[str] = "crosscoder"
    several_sites: ClassVar[bool] = True
    default_sparsity: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sites, self.sizes = tuple(self.sites), tuple(int(n) for n in self.sizes)
        if len(self.sites) != len(self.sizes) or sum(self.sizes) != self.channels or min(self.sizes) < 1:
            raise InputError(
                f"a crosscoder needs a size for each of its sites, {self.channels} channels in all; it has "
                f"{len(self.sites)} sites and sizes {list(self.sizes)}"
            )

    @classmethod
    def create(
        cls,
        site: str,
        d: int,
        width: int,
        *,
        seed: int = 0,
        sites: Sequence[str] = (),
        sizes: Sequence[int] = (),
        **options: Any,
    ) -> Self:
        """Return an untrained crosscoder.

        Args:
            site: the first site; all of them if `sites` is left out ("a, b").
            d: channels of all sites together.
            width: features.
            sites: the sites' names.
            sizes: channels of each; left out, all sites have the same.
        """
        names = tuple(sites) or tuple(s.strip() for s in site.split(","))
        each = tuple(sizes) or (d // len(names),) * len(names)
        options["centred"] = False
        made = super().create(
            names[0], d, width, seed=seed, sites=names, sizes=each, site_scale=torch.ones(d), **options
        )
        made.W_dec *= 0.1 * math.sqrt(len(names))
        return made

    def prepared(self, sample: Batch) -> None:
        start = 0
        for name, size in zip(self.sites, self.sizes, strict=True):
            part = slice(start, start + size)
            norm = float((sample.x[:, part] * self.scale).norm(dim=1).mean())
            if not 0 < norm < math.inf:
                raise InputError(f"the mean norm at {name} is {norm}; nothing can be learned from such rows")
            self.site_scale[part] = math.sqrt(size) / norm
            start += size
        self.b_dec *= self.site_scale

    def activate(self, pre: Tensor) -> Codes:
        return codes_of(pre.relu())

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        x, n = batch.x * self.site_scale, len(batch)
        z = self.pre(x).relu()
        error = z @ self.W_dec + self.b_dec - x
        penalty = (z @ self._norm_of_rows().sum(1)).sum() / n
        weight = state.sparsity_weight * sparsity(self, state)
        loss = error.square().sum() / n + weight * penalty
        raw = (error.detach() / self.site_scale).square().sum()
        return Objective(loss, raw, codes_of(z), {"l1": float(penalty.detach())})

    def constrain(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradients

    def after_step(self, state: TrainState) -> None:
        """Nothing: decoder norms are free."""

    # -- as a dictionary ----------------------------------------------------------------------------

    @property
    def atoms(self) -> Tensor:
        return self.W_dec / (self.scale * self.site_scale)

    @property
    def offset(self) -> Tensor:
        return self.b_dec / (self.scale * self.site_scale)

    def direction(self, feature: int) -> Tensor:
        return self.W_dec[self.check_feature(feature)] / (self.scale * self.site_scale)

    def encode_rows(self, x: Tensor) -> Codes:
        return super().encode_rows(x.to(self.W_enc) * self.site_scale)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        return super().decode(codes) / self.site_scale

    def norms(self) -> Tensor:
        """Return how a feature's decoder norm is spread over the sites, `[features, sites]`, rows of sum 1.

        Norms are relative to each site's own scale, so that large sites do not own every feature.
        """
        norms = self._norm_of_rows().detach()
        return norms / norms.sum(1, keepdim=True).clamp_min(1e-12)

    def edit(self, feature: int | Mapping[int, Operation] = 0, strength: float = 1.0) -> Edit:
        """Return the edit that adds `strength` times a feature's directions at all of its sites."""
        from actlas.core.edit import compose
        from actlas.core.edits import Add

        if isinstance(feature, Mapping):
            raise InputError(
                "a crosscoder's codes are known after its last site; steer with edit(feature, strength)"
            )
        parts = self.direction(feature).detach().split(self.sizes)
        edit = compose(Add(site, part) * strength for site, part in zip(self.sites, parts, strict=True))
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)

    def substitute(self, *args: Any, **options: Any) -> Edit:
        raise InputError(
            "a crosscoder cannot be substituted while it reads; use crosscoder.patch(model.trace(...))"
        )

    def read(self, trace: Trace) -> Tensor:
        """Return a trace's activations side by side, `[batch, pos, d_1 + d_2 + ...]`."""
        tokens = [trace[site] for site in self.sites]
        return torch.cat([x.flatten(2) for x in tokens], dim=-1)

    def patch(self, trace: Trace) -> Edit:
        """Return the edit that writes the reconstructions of a trace, for a pass over the same inputs."""
        from actlas.core.edit import compose
        from actlas.core.edits import Replace

        x = self.read(trace)
        new = torch.where(self.massive(x).unsqueeze(-1), x, self.reconstruct(x).to(x.dtype)).split(
            self.sizes, dim=-1
        )
        parts = [Replace(site, y.reshape(trace[site].shape)) for site, y in zip(self.sites, new, strict=True)]
        edit = compose(parts)
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)

    def _norm_of_rows(self) -> Tensor:
        return torch.stack([part.norm(dim=1) for part in self.W_dec.split(self.sizes, dim=1)], dim=1)
