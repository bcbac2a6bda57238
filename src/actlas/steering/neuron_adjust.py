"""NeuronAdjust: move a skill's MLP neurons from their values on the skill to those on other text.

For a neuron with mean and standard deviation (m_f, s_f) on text to forget and (m_r, s_r) on text to retain,
a value x is judged by the two normal densities p_f(x), p_r(x). If p_f >= p_r, then with probability
p_f / (p_f + p_r)

    x <- m_r - s_r (x - m_f) / s_f

the z-score under "forget", mirrored, expressed under "retain". The neurons are the share `top` of all
neurons of all sites with the largest m_f - m_r. (Effective Skill Unlearning through Intervention and
Abstention, "Neuron Adjust". The released code takes the variance for the standard deviation, overwrites
s_f with m_f, and draws one random number for a whole row; here it is as the paper says.)

The first token of a text, at which most models have massive activations that all others attend to, is
neither counted nor changed (ours; `first=True` changes it too): it says nothing about a skill, and a model
whose first token is adjusted gets worse at all text alike.

Whether a value is replaced depends on (seed, position, token, neuron) alone, so the edit does the same with
and without a KV cache, padded and alone. `PruneNeurons`, the paper's baseline, sets the same neurons to 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from actlas.core.calibration import calibrate
from actlas.core.calibration.reading import check_row_sites
from actlas.core.edit import ActivationEdit, Edit, Here, compose, register_edit
from actlas.core.errors import InputError
from actlas.core.streaming import windows

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

SITES = "blocks.*.mlp.act"
_FLOOR = 1e-6


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class NeuronAdjust(ActivationEdit):
    """Adjust neurons of one site; see the module's docstring.

    Attributes:
        neurons: int64 `[k]`.
        forget_mean, forget_std, retain_mean, retain_std: float32 `[k]`.
        seed: of the random decisions.
        first: change the first token of a text too.
    """

    neurons: Tensor
    forget_mean: Tensor
    forget_std: Tensor
    retain_mean: Tensor
    retain_std: Tensor
    seed: int = 0
    first: bool = False
    moments: ClassVar[tuple[str, ...]] = ("forget_mean", "forget_std", "retain_mean", "retain_std")

    def check(self, site: Site) -> None:
        _check_neurons(self.neurons, site, "NeuronAdjust")
        for name in self.moments:
            value = getattr(self, name)
            if value.shape != self.neurons.shape or not bool(torch.isfinite(value).all()):
                raise InputError(f"NeuronAdjust.{name} must hold {len(self.neurons)} finite numbers")
        if not bool((self.forget_std > 0).all() and (self.retain_std > 0).all()):
            raise InputError("NeuronAdjust has a standard deviation of 0; all must be above 0")

    def value(self, x: Tensor, here: Here) -> Tensor:
        if x.ndim != 3 or here.run.length != x.shape[1]:
            raise InputError(f"NeuronAdjust needs tokens at {here.site.name}, not {list(x.shape)}")
        neurons = self.neurons.to(x.device)
        held = x[..., neurons].float()
        forget_mean, forget_std, retain_mean, retain_std = (
            getattr(self, n).to(x.device) for n in self.moments
        )
        forget = (held - forget_mean) / forget_std
        retain = (held - retain_mean) / retain_std
        # log p_f - log p_r; the shared factor 1 / sqrt(2 pi) cancels
        odds = 0.5 * (retain.square() - forget.square()) + (retain_std / forget_std).log()
        replaced = (odds >= 0) & (self._uniform(x, here) < torch.sigmoid(odds))
        if not self.first:
            replaced = replaced & _later(x, here).unsqueeze(-1)
        new = x.clone()
        new[..., neurons] = torch.where(replaced, retain_mean - retain_std * forget, held).to(x.dtype)
        return new

    def _uniform(self, x: Tensor, here: Here) -> Tensor:
        """Return a number in [0, 1) for each token and neuron, `[batch, pos, k]`."""
        run, device = here.run, x.device
        token = run.positions(device).clamp_min(0)
        if run.tokens is not None:
            token = token + 1_000_003 * run.tokens.to(device)
        neurons = self.neurons.to(device) + 15_485_863 * (here.site.block or 0)
        mixed = (token.unsqueeze(-1) * 2_654_435_761 + neurons * 40_503 + self.seed * 7_919) % (2**31)
        for factor in (2_246_822_519, 3_266_489_917):
            mixed = (mixed ^ (mixed >> 15)) * factor % (2**31)
        mixed = mixed ^ (mixed >> 13)
        return mixed.double().div_(2**31).float()


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class PruneNeurons(ActivationEdit):
    """Set some neurons of one site to 0.

    Attributes:
        neurons: int64 `[k]`.
        first: change the first token of a text too.
    """

    neurons: Tensor
    first: bool = False

    def check(self, site: Site) -> None:
        _check_neurons(self.neurons, site, "PruneNeurons")

    def value(self, x: Tensor, here: Here) -> Tensor:
        pruned = x.index_fill(-1, self.neurons.to(x.device), 0.0)
        return pruned if self.first else torch.where(_later(x, here).unsqueeze(-1), pruned, x)


@dataclass(frozen=True, eq=False)
class NeuronMoments:
    """Mean and standard deviation of every neuron on two kinds of text.

    Attributes:
        sites: names, in order.
        forget, retain: by site, `(mean, std)`, float32 `[d]`.
    """

    sites: tuple[str, ...]
    forget: Mapping[str, tuple[Tensor, Tensor]]
    retain: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(
        cls, model: Model, forget: Sequence[str], retain: Sequence[str], sites: str | Sequence[str] = SITES
    ) -> NeuronMoments:
        """Read both kinds of text, every token but the first of each counted."""
        names = tuple(s.name for s in check_row_sites(model.resolve(sites)))
        found = []
        for texts in (forget, retain):
            if not texts:
                raise InputError(
                    "adjusting neurons needs texts to forget and texts to retain; one is missing"
                )
            found.append(_moments_without_first(model, texts, names))
        return cls(names, *found)

    def top(self, share: float) -> dict[str, Tensor]:
        """Return the neurons with the largest rise of the mean, by site (sites without any left out).

        Args:
            share: of all neurons of all sites; at least one neuron is taken.

        Raises:
            InputError: a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise InputError(f"top is {share}; it must be a share of the neurons above 0, at most 1")
        rise = torch.cat([self.forget[s][0] - self.retain[s][0] for s in self.sites])
        return self._by_site(rise.topk(max(1, round(share * len(rise)))).indices)

    def random(self, share: float, seed: int) -> dict[str, Tensor]:
        """Return as many neurons as `top`, drawn at random: the control."""
        total = sum(len(self.forget[s][0]) for s in self.sites)
        generator = torch.Generator().manual_seed(seed)
        return self._by_site(torch.randperm(total, generator=generator)[: max(1, round(share * total))])

    def _by_site(self, chosen: Tensor) -> dict[str, Tensor]:
        out, start = {}, 0
        chosen = chosen.sort().values
        for site in self.sites:
            end = start + len(self.forget[site][0])
            own = chosen[(chosen >= start) & (chosen < end)] - start
            if len(own):
                out[site] = own
            start = end
        return out

    def adjust(self, neurons: Mapping[str, Tensor], seed: int = 0, *, first: bool = False) -> Edit:
        """Return the edit that adjusts these neurons (`first`: at the first token of a text too)."""
        made = []
        for site, own in neurons.items():
            forget_mean, forget_std = (t[own] for t in self.forget[site])
            retain_mean, retain_std = (t[own] for t in self.retain[site])
            made.append(
                NeuronAdjust(site, own, forget_mean, forget_std, retain_mean, retain_std, seed, first)
            )
        return compose(made)

    @staticmethod
    def prune(neurons: Mapping[str, Tensor]) -> Edit:
        """Return the edit that sets these neurons to 0."""
        return compose(PruneNeurons(site, own) for site, own in neurons.items())


def _moments_without_first(
    model: Model, texts: Sequence[str], sites: tuple[str, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation by site over all tokens but the first of each window.

    A first token's activations depend on nothing else, so they are read alone and their sums taken off.
    """
    cut = list(windows(model, texts))
    if all(len(w.ids) < 2 for w in cut):
        raise InputError("adjusting neurons needs texts of at least 2 tokens; these have 1")
    alone = torch.tensor([w.ids[:1] for w in cut])
    both = [calibrate(model, given, sites, ("moments",), progress=False) for given in (texts, alone)]
    out = {}
    for site in sites:
        every, first = (c[site] for c in both)
        n = every.count - first.count
        mean = (every.count * every.mean - first.count * first.mean) / n
        square = (every.count * every.second_moment - first.count * first.second_moment) / n
        std = (square - mean.square()).clamp_min(0).sqrt()
        out[site] = (mean.float(), std.float().clamp_min(_FLOOR))
    return out


def _later(x: Tensor, here: Here) -> Tensor:
    """Return which tokens of this pass are not the first of their text, bool `[batch, pos]`."""
    return here.run.positions(x.device) > 0


def _check_neurons(neurons: Tensor, site: Site, what: str) -> None:
    size = None if site.features is None else torch.Size(site.features).numel()
    if neurons.ndim != 1 or neurons.is_floating_point() or not len(neurons):
        raise InputError(f"{what}.neurons must be whole numbers [k], not {list(neurons.shape)}")
    if size is not None and int(neurons.max()) >= size:
        raise InputError(f"{what} names neuron {int(neurons.max())}, but {site.name} has {size}")
