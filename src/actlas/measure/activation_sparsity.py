"""How sparse MLP activations are as they come: exact zeros, and entries small beside their token's RMS.

    activation_sparsity(model, corpus, *, tokens=4096, thresholds=(0.01, 0.1, 0.5)) -> list[Measurement]

A threshold relative to each token's own RMS means the same in every layer and for massive tokens alike.
What may be dropped without harm is another question: see `sparsity.ppl_p_sparsity`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.measurement import Measurement
from actlas.measure.cett import mlp_sites
from actlas.measure.reading import read, token_rows
from actlas.measure.registry import measure
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model


@measure(
    "activation-sparsity",
    summary="share of MLP activations that are zero, or small beside their token's RMS",
    unit="fraction",
    needs=("causal-lm", "encoder"),
    quick={"tokens": 1024},
)
def activation_sparsity(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    tokens: int = 4096,
    context: int = 256,
    per_document: int = 128,
    thresholds: Sequence[float] = (0.01, 0.1, 0.5),
) -> list[Measurement]:
    """Measure which share of `mlp.act` entries is zero, and below multiples of the token's RMS.

    Args:
        model: a model with `mlp.act` sites.
        corpus: documents or strings.
        seed: of the bootstrap.
        tokens, context, per_document: how many tokens, in windows of which length, at most how many of
            one document.
        thresholds: `|x_i| < t * sqrt(mean_i x_i^2)`, the mean over the channels of one token.

    Returns:
        For each threshold (`"0"` for exact zeros) the mean over layers, and each layer on its own;
        grouped by `threshold` and `layer`.
    """
    sites = mlp_sites(model)
    levels = ("0", *(f"{t:g} rms" for t in thresholds))
    small: dict[str, NDArray[np.float64]] = {}  # document -> counts [layers, levels]
    seen: dict[str, int] = {}
    for trace in read(model, corpus, sites, tokens=tokens, context=context, per_document=per_document):
        names, index = token_rows(trace)
        for i, site in enumerate(sites):
            x = trace.rows(site.name).float().abs()
            rms = x.square().mean(1, keepdim=True).sqrt()
            counts = [(x == 0).sum(1), *((x < t * rms).sum(1) for t in thresholds)]
            per_token = torch.stack(counts, 1).double().cpu().numpy() / x.shape[1]
            for d, name in enumerate(names):
                held = small.setdefault(name, np.zeros((len(sites), len(levels))))
                held[i] += per_token[index == d].sum(0)
        for d, name in enumerate(names):
            seen[name] = seen.get(name, 0) + int((index == d).sum())
    table = np.stack(list(small.values())) / np.array([seen[n] for n in small])[:, None, None]
    weights = np.array([seen[n] for n in small], dtype=float)
    out = []
    for j, level in enumerate(levels):
        pieces = [("all", table[:, :, j].mean(1))]
        pieces += [(str(s.block), table[:, i, j]) for i, s in enumerate(sites)]
        out += [
            mean_measurement(
                "activation-sparsity",
                "fraction",
                values,
                weights,
                seed=seed,
                group={"threshold": level, "layer": layer},
                note=f"{int(weights.sum()):,} tokens",
            )
            for layer, values in pieces
        ]
    return out
