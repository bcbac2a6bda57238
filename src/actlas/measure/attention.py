"""What attention heads look at: how spread their attention is, and how much lies on the first token.

    AttentionObserver(by="layer" | "head")     attention-entropy, attention-sink-mass
    attention_measures(model, corpus, *, seed=0, tokens=4096, by="layer", ...) -> list[Measurement]

* Entropy of a query's attention over keys, in nats, averaged over queries. `details["normalised"]` divides
  each by `log(number of keys it may see)`, so that windows of different length compare: 1 is uniform.
* Sink mass: the attention that a query gives to the first real token of its window (Xiao et al. 2024,
  "Efficient streaming language models with attention sinks").

The first token of a window is no query here: a causal one sees only itself. Both depend on the window length,
which is in the note. Patterns are reduced inside the forward pass, so memory does not hold them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.hooks import attach
from actlas.core.intervals import percentiles
from actlas.core.measurement import Measurement
from actlas.measure.observing import GROUPS, Batch, Observer, block_sites, group_draws, observe
from actlas.measure.samples import missing

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

By = Literal["layer", "head"]
_NAMES = (("attention-entropy", "nats"), ("attention-sink-mass", "fraction"))


class AttentionObserver(Observer):
    """Attention entropy and sink mass of every head.

    Args:
        by: one measurement a layer (its heads in `details`), or one a head.
    """

    def __init__(self, by: By = "layer") -> None:
        if by not in ("layer", "head"):
            raise InputError(f'by must be "layer" or "head", not {by!r}')
        self.by = by
        self._sites: list[Site] = []
        self._held: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._sums: dict[str, NDArray[np.float64]] = {}  # [groups, heads, 3]
        self._queries = np.zeros(GROUPS)
        self._documents: set[int] = set()
        self._longest = 0

    def attach(self, model: Model, stack: ExitStack) -> None:
        self._sites = block_sites(model, "attn.pattern")
        for site in self._sites:
            handle = attach(model.module, site, self._reader(site), batch=lambda: 1)
            stack.callback(handle.remove)

    def _reader(self, site: Site) -> Any:
        def read(pattern: Tensor) -> Tensor:
            p = pattern.detach()
            if p.dtype not in (torch.float32, torch.float64):
                p = p.float()
            entropy = torch.special.entr(p).sum(-1)
            keys = (p > 0).sum(-1).clamp_min(2).to(p.dtype).log()
            self._held[site.name] = (entropy, p[..., 0].clone(), entropy / keys)
            return pattern

        return read

    def update(self, batch: Batch) -> None:
        mask = batch.trace.mask
        assert mask is not None
        chosen = torch.from_numpy((batch.place > 0) & batch.ordinary)
        group = batch.document[chosen.numpy()] % GROUPS
        self._queries += np.bincount(group, minlength=GROUPS)
        self._documents |= set(batch.document.tolist())
        self._longest = max(self._longest, mask.shape[1])
        for site in self._sites:
            if site.name not in self._held:
                continue
            values = torch.stack(self._held.pop(site.name), -1)  # [batch, heads, query, 3]
            rows = values.transpose(1, 2)[mask.to(values.device)].double().cpu()[chosen].numpy()
            sums = self._sums.setdefault(site.name, np.zeros((GROUPS, *rows.shape[1:])))
            np.add.at(sums, group, rows)

    def results(self, seed: int) -> list[Measurement]:
        out = []
        held = np.flatnonzero(self._queries)
        if not len(held):
            return [missing(n, u, "no queries but massive ones") for n, u in _NAMES]
        draws = group_draws(len(held), seed)
        for site in self._sites:
            if site.name not in self._sums:
                continue
            sums, counts = self._sums[site.name][held], self._queries[held]
            means = sums.sum(0) / counts.sum()  # [heads, 3]
            drawn = np.einsum("rg,ghm->rhm", draws, sums) / np.maximum(draws @ counts, 1)[:, None, None]
            for column, (name, unit) in enumerate(_NAMES):
                heads = [
                    (str(h), means[h, column], drawn[:, h, column], float(means[h, 2]))
                    for h in range(len(means))
                ]
                if self.by == "layer":
                    normalised = float(means[:, 2].mean())
                    heads = [("", means[:, column].mean(), drawn[:, :, column].mean(1), normalised)]
                for head, value, samples, normalised in heads:
                    low, high = percentiles(samples, len(held)) if len(held) > 1 else (None, None)
                    details: dict[str, Any] = {"normalised": normalised} if column == 0 else {}
                    if self.by == "layer":
                        details["heads"] = means[:, column].tolist()
                    group = {"layer": str(site.block)} | ({"head": head} if head else {})
                    out.append(
                        Measurement(
                            name,
                            float(value),
                            unit,
                            len(self._documents),
                            low,
                            high,
                            "bootstrap over groups of documents",
                            seed,
                            group=group,
                            note=f"windows of up to {self._longest} tokens",
                            details=details,
                        )
                    )
        return out


def attention_measures(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    tokens: int = 4096,
    context: int = 256,
    per_document: int | None = 128,
    by: By = "layer",
) -> list[Measurement]:
    """Measure attention entropy and sink mass alone, by layer or by head.

    Args:
        model, corpus, tokens, context, per_document: as in `observing.observe`.
        seed: of the bootstrap.
        by: `"layer"` or `"head"`.
    """
    observer = AttentionObserver(by)
    return observe(
        model, corpus, [observer], tokens=tokens, context=context, per_document=per_document, seed=seed
    )
