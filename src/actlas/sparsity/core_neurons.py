"""CoreInfer: the MLP neurons that a prompt uses serve every token generated after it.

For each token the core neurons are the top alpha share of its positive activations (Definition 1); over the
prompt a neuron's count is the number of tokens whose core holds it, and the sentence's core neurons are the
`keep` share with the highest counts (Definition 2). Ties are broken by mean activation. They are chosen once
in prefill and frozen, so decoding needs no predictor and reads only their rows of gate and up and their
columns of down.

Signed ranking, as published, drops neurons that are large and negative (SiLU times up can be either), so
two more rankings are here: `"abs"` counts the largest magnitudes, and `"output"` takes the mean of
|h_i| ||W_down[:, i]||, what the neuron writes, without counting.

The activation is the input of the down projection, `h = act(gate) * up` in gated MLPs. Source: Wang et al.
2024, "CoreInfer" (arXiv 2410.18311), Definitions 1 and 2; its code makes only layers 6 to 26 of 32 sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.skip_inputs import SkipInputs
from actlas.measure.cett import mlp_sites
from actlas.measure.linear_layers import linear_layers
from actlas.sparsity.input_sparsity import Phase, finish

Rank = Literal["positive", "abs", "output"]


def core_set(
    h: Tensor, keep: float, *, alpha: float = 0.4, rank: Rank = "positive", norms: Tensor | None = None
) -> Tensor:
    """Return the core neurons of a sentence, bool `[d]`.

    Args:
        h: activations of its tokens, `[n, d]`.
        keep: share of neurons that is kept, in (0, 1].
        alpha: share of each token's positive activations that counts.
        rank: see the module docstring.
        norms: column norms of the down projection, for `"output"`.

    Raises:
        InputError: no tokens, a share outside (0, 1], an unknown ranking.
        NonFiniteError: NaN or infinity.
    """
    for name, share in (("keep", keep), ("alpha", alpha)):
        if not 0 < share <= 1:
            raise InputError(f"{name} is a share and must lie in (0, 1], not {share}")
    if rank not in get_args(Rank):
        raise InputError(f"rank is {rank!r}; it must be 'positive', 'abs' or 'output'")
    if h.ndim != 2 or not len(h):
        raise InputError(f"core neurons need the activations of at least one token, not {list(h.shape)}")
    h = h.float()
    mean = h.abs().mean(0)
    if not bool(torch.isfinite(mean).all()):
        raise NonFiniteError("the activations of the prompt hold NaN or infinity")
    if rank == "output":
        key = mean * (norms if norms is not None else 1.0)
    else:
        counts = core_counts(h, alpha, rank)
        key = counts.double() + 0.5 * (mean / mean.max().clamp_min(1e-30)).double()
    k = max(1, round(keep * h.shape[1]))
    chosen = torch.zeros(h.shape[1], dtype=torch.bool, device=h.device)
    chosen[key.argsort(descending=True, stable=True)[:k]] = True
    return chosen


def core_counts(h: Tensor, alpha: float, rank: Rank) -> Tensor:
    """Return how many tokens hold each neuron in their core, int64 `[d]`, for `h` `[n, d]`."""
    limit = (alpha * _row_counts(h > 0)).long()
    size = h if rank == "positive" else h.abs()
    bound = _row_bounds(size, limit)
    return _column_counts(size >= bound[:, None])


def _row_bounds(size: Tensor, limit: Tensor) -> Tensor:
    """Return each row's `limit`-th largest entry, infinity where the limit is 0.

    On a CPU every row is partitioned at its own place: half the time of a sort, the same bound.
    """
    d, most = size.shape[1], limit.clamp_min(1)
    if size.device.type != "cpu":
        bound = size.sort(dim=1).values.gather(1, (d - most)[:, None])[:, 0]
    else:
        rows, places = size.detach().numpy().copy(), (d - most).tolist()
        for row, place in zip(rows, places, strict=True):
            row.partition(place)
        bound = torch.from_numpy(rows[np.arange(len(rows)), places])
    return torch.where(limit > 0, bound, torch.full_like(bound, float("inf")))


def _row_counts(mask: Tensor) -> Tensor:
    if mask.device.type != "cpu":
        return mask.sum(1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))


def _column_counts(mask: Tensor) -> Tensor:
    """Return the true entries of each column; on a CPU in bytes, which 255 rows cannot overflow."""
    if mask.device.type != "cpu":
        return mask.sum(0)
    found = torch.zeros(mask.shape[1], dtype=torch.int64)
    for part in mask.split(255):
        found += torch.from_numpy(np.add.reduce(part.numpy().view(np.uint8), axis=0, dtype=np.uint8))
    return found


def sparse_blocks(model: Model, skip_first: int, skip_last: int) -> list[int]:
    """Return the blocks that become sparse: all with dense MLPs but the first and last few.

    Raises:
        InputError: none are left.
    """
    blocks = [s.block for s in mlp_sites(model) if s.block is not None]
    found = blocks[skip_first : len(blocks) - skip_last]
    if not found or skip_first < 0 or skip_last < 0:
        raise InputError(
            f"skip_first={skip_first} and skip_last={skip_last} leave none of {len(blocks)} blocks sparse"
        )
    return found


def prompt_sets(
    model: Model,
    prompt: Any,
    *,
    keep: float,
    alpha: float = 0.4,
    rank: Rank = "positive",
    blocks: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """Run a prompt and return the core neurons of each block, bool `[d]`; arguments as of `core_set`."""
    chosen = sparse_blocks(model, 0, 0) if blocks is None else list(blocks)
    trace = model.trace(prompt, [f"blocks.{b}.mlp.act" for b in chosen])
    norms = down_norms(model, chosen) if rank == "output" else {}
    return {
        b: core_set(trace.rows(f"blocks.{b}.mlp.act"), keep, alpha=alpha, rank=rank, norms=norms.get(b))
        for b in chosen
    }


def down_norms(model: Model, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return the column norms of the down projections by block."""
    tower = model.tower
    assert tower is not None
    end = "." + tower.down_proj
    return {
        p.block: p.column_norms(model)
        for p in linear_layers(model)
        if p.block in blocks and p.path.endswith(end)
    }


def freeze(model: Model, sets: Mapping[int, Tensor], phase: Phase = "generated") -> Edit:
    """Return the edit under which each block uses only its set of neurons."""
    made = [SkipInputs(f"blocks.{b}.mlp.act", frozen=chosen) for b, chosen in sets.items()]
    return finish(model, made, phase)


def overlap(first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> float:
    """Return the share of the first sets' neurons that the second hold too, mean over blocks.

    For sets of equal size drawn at random it is their share of all neurons.
    """
    shares = [float((a & second[b]).sum() / a.sum()) for b, a in first.items()]
    return sum(shares) / len(shares)


@method(
    "core-neurons",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="freeze the MLP neurons that a text uses, for all tokens generated after it (CoreInfer)",
    example="actlas fit core-neurons smollm2 prose --option keep=0.6 -o frozen/",
    papers=("coreinfer",),
)
def fit_core_neurons(
    model: Model,
    data: Any,
    *,
    keep: float = 0.4,
    alpha: float = 0.4,
    rank: Rank = "positive",
    skip_first: int = 6,
    skip_last: int = 4,
    phase: Phase = "generated",
    tokens: int = 256,
    context: int = 256,
) -> Edit:
    """Return the edit that keeps a text's core neurons.

    Args:
        model: a causal language model with dense MLPs.
        data: the prompt, or text on the same topic.
        keep: share of neurons that is kept (0.4 in the released code).
        alpha: share of each token's positive activations that counts.
        rank: `"positive"` as published, `"abs"` or `"output"`.
        skip_first, skip_last: so many blocks at either end stay dense.
        phase: generated tokens only, or all.
        tokens, context: how much of the text is read, in windows of how many tokens.

    Raises:
        InputError: a share outside (0, 1], no sparse block left, no text.
    """
    blocks = sparse_blocks(model, skip_first, skip_last)
    sites = [f"blocks.{b}.mlp.act" for b in blocks]
    context = min(context, model.context_length or context)
    rows: dict[str, list[Tensor]] = {s: [] for s in sites}
    for trace in model.stream(data, sites, batch_tokens=1024, context=context, max_tokens=tokens):
        for site in sites:
            rows[site].append(trace.rows(site).float())
    norms = down_norms(model, blocks) if rank == "output" else {}
    sets = {
        b: core_set(torch.cat(rows[s]), keep, alpha=alpha, rank=rank, norms=norms.get(b))
        for b, s in zip(blocks, sites, strict=True)
    }
    return freeze(model, sets, phase)
