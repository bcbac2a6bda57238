"""Clustered steering directions: a probe at each layer chooses which of a few directions a prompt gets.

For prompt i in target and base style, D_i = h+(i) - h-(i) at a site. k-means of the D_i gives centroids c_j;
a probe reads the prompt's own activation and predicts which centroid is nearest to its difference:

    h <- h + strength * c_{argmax pi(h)}            (`soft`: + strength * sum_j pi_j(h) c_j)

G-ACT, "Steering Conceptual Bias via Transformer Latent-Subspace Activation"; k-means without the probe's
updates is its ACT. The paper's text leaves the scale and the probe's labels open: here every centroid is
given the length `alpha` times the site's median norm ("resid"), or its own times alpha ("raw"), and the probe
is told the nearest centroid of a measured difference. `ClusterDirections.observe` goes on doing that.

The choice is made once, at the prompt's last token, and held (`hold="prompt"`), or made at every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from actlas.core.contrast import Contrast, Readings, Where, read_contrast, read_rows
from actlas.core.edit import ActivationEdit, Edit, Here, compose, register_edit
from actlas.core.errors import ArtifactError, InputError
from actlas.core.lens import rebuild_lens
from actlas.steering.probe_gate import ProbeGate

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

Hold = Literal["prompt", "token"]


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class ClusterSteer(ActivationEdit):
    """Add the direction that a probe chooses; see the module's docstring.

    Attributes:
        centroids: float32 `[k, d]`, what is added at full strength.
        gate: the probe, which reads this very site.
        hold: choose at the prompt's last token for all tokens, or at every token for itself.
        soft: add the mixture by the probe's probabilities instead of the likeliest centroid.
    """

    centroids: Tensor
    gate: ProbeGate
    hold: Hold = "prompt"
    soft: bool = False
    feature_fields: ClassVar[tuple[str, ...]] = ("centroids",)

    def __post_init__(self) -> None:
        if self.hold not in ("prompt", "token"):
            raise InputError(f"hold is {self.hold!r}; it must be 'prompt' or 'token'")
        if self.centroids.ndim != 2 or len(self.centroids) != self.gate.choices:
            raise InputError(
                f"centroids has shape {list(self.centroids.shape)}; the probe has {self.gate.choices} choices"
            )

    def check(self, site: Site) -> None:
        super().check(site)
        if site.name != self.gate.site:
            raise InputError(f"this probe was fitted at {self.gate.site}; it cannot choose at {site.name}")

    def change(self, x: Tensor, here: Here) -> Tensor:
        return x + self.strength * self._chosen(x, here)

    def _chosen(self, x: Tensor, here: Here) -> Tensor:
        run, centroids = here.run, self.centroids.to(x)
        if self.hold == "token":
            return self._direction(x, centroids)
        state = run.generation
        if state is not None and self in state.memory:
            held = state.memory[self].repeat_interleave(run.repeats, dim=0)
            return held.unsqueeze(1)
        if run.past:
            raise InputError("a choice that is held must see the prompt; start from it, not from a cache")
        real = run.prompt_mask(x.device)
        last = (torch.arange(real.shape[1], device=x.device) * real).argmax(1)
        made = self._direction(x[torch.arange(len(x), device=x.device), last], centroids)
        if state is not None:
            state.memory[self] = made[:: run.repeats]
        return made.unsqueeze(1)

    def _direction(self, x: Tensor, centroids: Tensor) -> Tensor:
        if self.soft:
            return self.gate.encode(x).to(centroids) @ centroids
        return centroids[self.gate.choose(x)]

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record, tensors = super()._record()
        lens_record, lens_tensors = self.gate._record()
        record["gate"] = {"type": type(self.gate).__name__, **lens_record}
        return record, tensors | {f"own.{n}": t for n, t in lens_tensors.items()}

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        own = {n.removeprefix("own."): t for n, t in tensors.items() if n.startswith("own.")}
        gate = rebuild_lens(record["gate"], own)
        if not isinstance(gate, ProbeGate):
            raise ArtifactError(f"a {cls.__name__} holds a {type(gate).__name__}, which is no probe gate")
        rest = {n: t for n, t in tensors.items() if not n.startswith("own.")}
        return super()._rebuild({**record, "gate": gate}, rest)


@dataclass(frozen=True, eq=False)
class ClusterDirections:
    """Centroids and probes at some sites.

    Attributes:
        centroids: by site, mean differences of the clusters, float32 `[k, d]`, largest cluster first.
        gates: by site, the probe.
        references: by site, the median norm of ordinary rows.
        sizes: by site, rows in each cluster.
    """

    centroids: Mapping[str, Tensor]
    gates: Mapping[str, ProbeGate]
    references: Mapping[str, float]
    sizes: Mapping[str, tuple[int, ...]]

    def nearest(self, site: str, difference: Tensor) -> Tensor:
        """Return the nearest centroid's number for differences `[n, d]`, int64 `[n]`."""
        return torch.cdist(difference.double(), self.centroids[site].double()).argmin(1)

    def steer(
        self,
        alpha: float = 0.1,
        *,
        unit: Literal["resid", "raw"] = "resid",
        hold: Hold = "prompt",
        soft: bool = False,
    ) -> Edit:
        """Return the edit that adds the chosen direction at every site.

        Args:
            alpha: length of what is added in units of the site's median norm, or (`unit="raw"`) multiples
                of the centroid itself.
            unit, hold, soft: see the module's docstring.
        """
        if unit not in ("resid", "raw"):
            raise InputError(f"unit is {unit!r}; it must be 'resid' or 'raw'")
        made = []
        for site, c in self.centroids.items():
            full = c if unit == "raw" else c / c.norm(dim=1, keepdim=True) * self.references[site]
            made.append(ClusterSteer(site, full, self.gates[site], hold, soft, strength=float(alpha)))
        edit = compose(made)
        known = next(iter(self.gates.values())).fingerprint
        return edit if known is None else edit.bind(known)

    def observe(
        self,
        model: Model,
        contrast: Contrast,
        prompts: Sequence[str] | None = None,
        *,
        lr: float = 0.01,
        position: Where = "last",
    ) -> ClusterDirections:
        """Return the directions with probes that learned from new prompts, one step of Adam for each.

        Args:
            model: the model, without these edits.
            contrast: new prompts in target and base style; the probes are told the nearest centroid of the
                measured difference.
            prompts: what the probes read, one a pair: the prompts as they come in use, without either
                style; default the base style.
            lr, position: see `ProbeGate.updated`, `read_contrast`.
        """
        rows, labels = self._seen(model, contrast, prompts, position)
        gates = {site: gate.updated(rows[site], labels[site], lr) for site, gate in self.gates.items()}
        return replace(self, gates=gates)

    def hits(
        self,
        model: Model,
        contrast: Contrast,
        prompts: Sequence[str] | None = None,
        *,
        position: Where = "last",
    ) -> dict[str, Tensor]:
        """Return, by site, whether the probe chooses the nearest centroid of each pair, bool `[n]`."""
        rows, labels = self._seen(model, contrast, prompts, position)
        return {site: gate.choose(rows[site]) == labels[site] for site, gate in self.gates.items()}

    def _seen(
        self, model: Model, contrast: Contrast, prompts: Sequence[str] | None, position: Where
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        read = read_contrast(model, contrast, tuple(self.centroids), position=position)
        labels = {site: self.nearest(site, r.difference) for site, r in read.items()}
        return prompt_rows(model, read, prompts, position), labels


def prompt_rows(
    model: Model, read: Mapping[str, Readings], prompts: Sequence[str] | None, position: Where
) -> dict[str, Tensor]:
    """Return what the probes read, by site: the prompts' rows, or the base style's without prompts.

    Raises:
        InputError: not one prompt a pair.
    """
    if prompts is None:
        return {site: r.negative for site, r in read.items()}
    pairs = len(next(iter(read.values())).negative)
    if len(prompts) != pairs:
        raise InputError(f"there are {pairs} pairs but {len(prompts)} prompts; give one prompt a pair")
    rows, _ = read_rows(model, prompts, tuple(read), position=position)
    return rows
