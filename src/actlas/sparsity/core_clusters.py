"""Topics of core neurons: for prompts too short to tell, take the neurons that texts like them use.

Each training text's core neurons at one layer make a multi-hot vector; k-means groups the texts. Each group
stores, for every sparse block, the neurons that its texts hold most often. A new prompt picks the group
whose centre its own core set at that layer is nearest to, and the group's neurons are frozen for decoding
(CoreInfer's similarity-guided prediction; without a given k, the elbow of the inertia over 4 to 10).

    lens = fit_core_clusters(model, texts, k=4)
    with model.edit(lens.edit_for(model, prompt)):
        model.generate(prompt)

Source: Wang et al. 2024, "CoreInfer" (arXiv 2410.18311), section 4.3. Its released code reads the
activation's input in clustering and its product in use; here both are the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.lens import Lens
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.sparsity.core_neurons import core_set, freeze, sparse_blocks
from actlas.sparsity.input_sparsity import Phase

_LEAST, _MOST = 4, 10


@dataclass(kw_only=True, eq=False)
class CoreNeuronClusters(Lens):
    """Groups of texts by the neurons they use.

    Attributes:
        centres: mean multi-hot vectors at `site`, `[k, d]`.
        sets: 1 where a group keeps a neuron, uint8 `[k, blocks, d]`.
        blocks: numbers of the sparse blocks.
        alpha: share of positive activations that counts.
        share: share of neurons in a text's set at `site`.
    """

    centres: Tensor
    sets: Tensor
    blocks: tuple[int, ...]
    alpha: float = 0.4
    share: float = 0.4

    @property
    def channels(self) -> int:
        return int(self.centres.shape[1])

    @property
    def features(self) -> int:
        return int(self.centres.shape[0])

    def encode(self, x: Tensor) -> Tensor:
        """Return minus the squared distance to each centre, `[..., k]`, for sentences `[..., n, d]`."""
        flat = self.flat(x)
        lead = flat.shape[:-2]
        hot = torch.stack([self._hot(h) for h in flat.reshape(-1, *flat.shape[-2:])])
        away = -(hot[:, None] - self.centres.to(hot)).square().sum(-1)
        return away.reshape(*lead, -1)

    def cluster(self, model: Model, prompt: Any) -> int:
        """Return the group of a prompt."""
        h = model.trace(prompt, self.site).rows(self.site)
        return int(self.encode(h).argmax())

    def edit_for(self, model: Model, prompt: Any, phase: Phase = "generated") -> Edit:
        """Return the edit that freezes the neurons of the prompt's group."""
        chosen = self.sets[self.cluster(model, prompt)].bool()
        return freeze(model, dict(zip(self.blocks, chosen, strict=True)), phase)

    def _hot(self, h: Tensor) -> Tensor:
        return core_set(h, self.share, alpha=self.alpha).float()


@method(
    "core-clusters",
    room="sparsity",
    returns="Lens",
    data="corpus",
    summary="group texts by the MLP neurons they use; a prompt then picks its group's neurons (CoreInfer)",
    example="actlas fit core-clusters smollm2 mixed --site blocks.20.mlp.act --option k=4 -o topics/",
    papers=("coreinfer",),
)
def fit_core_clusters(
    model: Model,
    data: Any,
    site: str,
    *,
    k: int | None = None,
    keep: float = 0.4,
    share: float = 0.4,
    alpha: float = 0.4,
    skip_first: int = 6,
    skip_last: int = 4,
    texts: int = 64,
    context: int = 128,
    seed: int = 0,
) -> CoreNeuronClusters:
    """Group texts by their core neurons.

    Args:
        model: a causal language model with dense MLPs.
        data: texts or documents; each is one item.
        site: the `mlp.act` site whose sets are compared; the paper takes layer 25 of 32.
        k: number of groups; default: the elbow of the inertia.
        keep: share of neurons that a group keeps in each sparse block.
        share, alpha: of the texts' own core sets.
        skip_first, skip_last: so many blocks at either end stay dense.
        texts: read at most so many.
        context: tokens read of each.
        seed: of k-means.

    Raises:
        InputError: more groups than texts, or no sparse block left.
    """
    blocks = sparse_blocks(model, skip_first, skip_last)
    sites = [f"blocks.{b}.mlp.act" for b in blocks]
    hot: list[Tensor] = []
    held: list[Tensor] = []
    items = [d if isinstance(d, str) else d.text for d in data][:texts]
    for item in items:
        trace = model.trace(_beginning(model, item, context), [*sites, site])
        hot.append(core_set(trace.rows(site), share, alpha=alpha).float().cpu())
        held.append(torch.stack([core_set(trace.rows(s), keep, alpha=alpha).cpu() for s in sites]))
    if k is not None and not 1 <= k <= len(items):
        raise InputError(f"k is {k} groups; {len(items)} texts allow 1 to {len(items)}")
    if not items:
        raise InputError("there are no texts to group")
    x = torch.stack(hot).double().numpy()
    labels = _group(x, k, seed)
    groups = range(int(labels.max()) + 1)
    sets, centres = [], []
    for g in groups:
        members = [i for i in range(len(items)) if labels[i] == g]
        counts = torch.stack([held[i] for i in members]).sum(0)  # [blocks, d]
        chosen = torch.zeros_like(counts, dtype=torch.uint8)
        size = max(1, round(keep * counts.shape[1]))
        chosen.scatter_(1, counts.argsort(dim=1, descending=True, stable=True)[:, :size], 1)
        sets.append(chosen)
        centres.append(torch.stack([hot[i] for i in members]).mean(0))
    return CoreNeuronClusters(
        site=site,
        centres=torch.stack(centres),
        sets=torch.stack(sets),
        blocks=tuple(blocks),
        alpha=alpha,
        share=share,
        fingerprint=model.fingerprint,
    )


def _beginning(model: Model, item: str, context: int) -> dict[str, Tensor]:
    ids = model.encode(item)["input_ids"][:, :context]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _group(x: np.ndarray[Any, Any], k: int | None, seed: int) -> np.ndarray[Any, Any]:
    from sklearn.cluster import KMeans

    def fit(n: int) -> Any:
        return KMeans(n, n_init=10, random_state=seed).fit(x)

    if k is not None:
        return np.asarray(fit(k).labels_)
    numbers = range(min(_LEAST, len(x)), min(_MOST, len(x)) + 1)
    fits = [fit(n) for n in numbers]
    return np.asarray(fits[_elbow([f.inertia_ for f in fits])].labels_)


def _elbow(inertia: Sequence[float]) -> int:
    """Return the index that is farthest below the line from the first to the last value."""
    if len(inertia) < 3:
        return 0
    line = np.linspace(inertia[0], inertia[-1], len(inertia))
    return int(np.argmax(line - np.asarray(inertia)))
