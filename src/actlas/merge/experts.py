"""Merge experts that the router uses alike (UNCURL), instead of deleting those it seldom uses.

    edit = merge_experts(model, corpus, factor=2)        # half as many experts in every block
    with model.edit(edit): ...

Per block, on the tokens of a task, with router logits H [tokens, E] and usage a_e:

1. Affinity A_ij = max(0, cos(h_i, h_j)) of the standardised columns of H. Spectral clustering into E / factor
   clusters: leading eigenvectors of D^-1/2 A D^-1/2, rows scaled to length 1, k-means.
2. In a cluster the most used expert is the reference. Hidden units of the others are matched to its units
   by the Hungarian algorithm on the sum of the inner products of gate rows, up rows and down columns. A
   permutation of hidden units does not change an expert.
3. W_C = sum_i a_i P_i W_i / sum_i a_i.
4. Router: the same mean of the rows (`router="mean"`), or all old rows, an expert's logit being the
   log-sum-exp of its cluster's (`"logsumexp"`). k becomes min(k, clusters).

Source: "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning"
(2024). The paper gives clustering by router logits, alignment and the activation-weighted mean; the affinity,
the reference, the matching score and the router's merge are our completion.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError
from actlas.core.expert_block import ExpertBlock, expert_blocks, fewer_experts
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.routing import trace_routing

Clustering = Literal["spectral", "hierarchical_output", "random"]
Labels = NDArray[np.int64]
_FLOOR = 1e-3  # of the mean usage: an expert that no token chose still has a weight in a mean


@method(
    "merge-experts",
    room="merge",
    returns="Edit",
    data="corpus",
    summary="UNCURL: merge the experts of a mixture that a task's routing uses alike, aligned",
    example="actlas fit merge-experts my-mixtral/ prose --factor 2 -o merged/",
    papers=("uncurl",),
)
def merge_experts(
    model: Model,
    data: Any,
    *,
    factor: int = 2,
    cluster: Clustering = "spectral",
    align: bool = True,
    weight: Literal["usage", "equal"] = "usage",
    router: Literal["mean", "logsumexp"] = "mean",
    tokens: int = 8192,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that leaves E / factor experts in every block.

    Args:
        model: a Mixtral-like model.
        data: a corpus of the task.
        factor: how many times fewer; it must divide the number of experts.
        cluster: `"spectral"` on router logits; `"hierarchical_output"`: average linkage on the experts' mean
            outputs (as HC-SMoE); `"random"`: clusters of equal size, a control.
        align: match hidden units before the mean.
        weight: of the mean.
        router: what becomes of its rows (module docstring).
        tokens, context: how much of the corpus is read.
        seed: of k-means and random clusters.

    Raises:
        InputError: a factor that does not divide the experts, or an unknown option.
        ModelError: the model has no such experts.
    """
    for name, value, known in (
        ("cluster", cluster, get_args(Clustering)),
        ("weight", weight, ("usage", "equal")),
        ("router", router, ("mean", "logsumexp")),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    blocks = expert_blocks(model)
    for block in blocks:
        if factor < 2 or block.n_experts % factor:
            raise InputError(
                f"factor is {factor}; it must be 2 or more and divide the {block.n_experts} experts "
                f"of block {block.block}"
            )
    trace = trace_routing(
        model, data, tokens=tokens, context=context, inputs=cluster == "hierarchical_output"
    )
    edits = []
    for block in blocks:
        layer, count = trace.layers.index(block.block), block.n_experts // factor
        if cluster == "random":
            rng = np.random.default_rng((seed, block.block))
            labels = rng.permutation(np.arange(block.n_experts) % count)
        elif cluster == "spectral":
            labels = spectral_clusters(trace.logits[layer].double().numpy(), count, seed)
        else:
            labels = _output_clusters(block, trace.inputs[layer], count)
        usage = trace.active[layer].double().sum(0)
        usage = usage.clamp(min=_FLOOR * float(usage.mean()))
        share = usage if weight == "usage" else torch.ones_like(usage)
        edits.append(merge_clusters(block, labels, share, usage, align=align, router=router))
    return compose(edits).bind(model.fingerprint)


def spectral_clusters(logits: NDArray[np.float64], count: int, seed: int = 0) -> Labels:
    """Return the cluster of each expert, int64 `[E]`, from router logits `[tokens, E]`; none is empty."""
    from sklearn.cluster import KMeans

    h = logits - logits.mean(0)
    h = h / np.maximum(np.linalg.norm(h, axis=0), 1e-12)
    affinity = np.maximum(h.T @ h, 0.0)
    np.fill_diagonal(affinity, 1.0)
    scale = affinity.sum(1) ** -0.5
    _, vectors = np.linalg.eigh(scale[:, None] * affinity * scale[None])
    rows = vectors[:, -count:]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than clusters: filled below
        fitted = KMeans(count, n_init=10, random_state=seed).fit(rows)
    return _without_empty(fitted.labels_.astype(np.int64), rows, count)


def align_units(reference: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> NDArray[np.int64]:
    """Return for each hidden unit of the reference the matching unit of the other expert.

    Args:
        reference, other: (gate_up `[2D, d]`, down `[d, D]`).
    """
    from scipy.optimize import linear_sum_assignment

    gain = torch.zeros(())
    for a, b in zip(_by_unit(*reference), _by_unit(*other), strict=True):
        gain = gain + a.double() @ b.double().T
    _, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return np.asarray(columns, np.int64)


def merge_clusters(
    block: ExpertBlock,
    labels: Labels,
    share: Tensor,
    usage: Tensor,
    *,
    align: bool = True,
    router: Literal["mean", "logsumexp"] = "mean",
) -> Edit:
    """Return the edit that merges the experts of each cluster of one block.

    Args:
        block: the experts.
        labels: the cluster of each, 0 to C - 1, none empty.
        share: weights of the mean, `[E]`.
        usage: who is the reference, `[E]`.
        align, router: as of `merge_experts`.
    """
    count = int(labels.max()) + 1
    rows, ups, downs = [], [], []
    for c in range(count):
        members = np.flatnonzero(labels == c)
        if not len(members):
            raise InputError(f"cluster {c} of {count} is empty; every cluster needs an expert")
        reference = int(members[int(usage[members].argmax())])
        w = (share[members] / share[members].sum()).to(block.down.device)
        up = torch.zeros_like(block.gate_up[0], dtype=torch.float64)
        down = torch.zeros_like(block.down[0], dtype=torch.float64)
        for a, e in zip(w, members, strict=True):
            gate_up_e, down_e = block.gate_up[e], block.down[e]
            if align and e != reference:
                order = align_units((block.gate_up[reference], block.down[reference]), (gate_up_e, down_e))
                hidden = len(order)
                index = torch.as_tensor(order, device=down_e.device)
                gate_up_e = gate_up_e[torch.cat([index, index + hidden])]
                down_e = down_e[:, index]
            up += a * gate_up_e.double()
            down += a * down_e.double()
        rows.append((w[:, None] * block.router[members].double()).sum(0))
        ups.append(up)
        downs.append(down)
    dtype = block.down.dtype
    if router == "mean":
        kept, group = torch.stack(rows).to(block.router.dtype), None
    else:
        kept, group = block.router, torch.as_tensor(labels)
    return fewer_experts(block, kept, torch.stack(ups).to(dtype), torch.stack(downs).to(dtype), group)


def _by_unit(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = gate_up.chunk(2)
    return gate, up, down.T


def _output_clusters(block: ExpertBlock, x: Tensor, count: int) -> Labels:
    from sklearn.cluster import AgglomerativeClustering

    with torch.no_grad():
        mean = [block.run(x.to(block.down), e).double().mean(0).cpu().numpy() for e in range(block.n_experts)]
    found = AgglomerativeClustering(count, linkage="average").fit(np.stack(mean))
    return np.asarray(found.labels_, np.int64)


def _without_empty(labels: Labels, rows: NDArray[np.float64], count: int) -> Labels:
    """Give each empty cluster the member that lies farthest from its own cluster's centre."""
    labels = labels.copy()
    for c in range(count):
        if (labels == c).any():
            continue
        centres = np.stack([rows[labels == k].mean(0) if (labels == k).any() else rows[0] for k in labels])
        away = np.linalg.norm(rows - centres, axis=1)
        sizes = np.bincount(labels, minlength=count)[labels]
        labels[int(np.argmax(np.where(sizes > 1, away, -1.0)))] = c
    return labels
