"""Which tokens of a prompt matter, by attention, and which stay; the equations are in `token_pruning`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scores = Literal["first_token", "column_mean", "random", "reversed"]


def token_scores(pattern: Tensor, scores: Scores, seed: int = 0, real: Tensor | None = None) -> Tensor:
    """Return the score of each token, float32 `[batch, tokens]`.

    Args:
        pattern: attention `[batch, heads, query, key]` of the same tokens.
        scores: see the module's text.
        seed: of `"random"`.
        real: bool `[batch, tokens]`, False at padding, which counts neither as query nor as first token.
    """
    batch, _, n, _ = pattern.shape
    if real is None:
        real = torch.ones(batch, n, dtype=torch.bool, device=pattern.device)
    if scores == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(n, generator=generator).to(pattern.device)
        return drawn[(real.long().cumsum(1) - 1).clamp_min(0)]
    if scores == "column_mean":
        asked = real[:, None, :, None]
        received = torch.where(asked, pattern.float(), torch.zeros(())).sum(
            (1, 2)
        )  # zeros above the diagonal
        queries = real.flip(1).long().cumsum(1).flip(1)
        return received / queries.clamp_min(1)
    first = real.int().argmax(1)[:, None, None, None].expand(-1, pattern.shape[1], n, 1)
    to_first = pattern.gather(3, first)[..., 0].float().sum(1)
    return -to_first if scores == "reversed" else to_first


def keep_best(score: Tensor, real: Tensor, gone: Tensor) -> Tensor:
    """Return the columns that stay, ascending, int64 `[batch, kept]`.

    Args:
        score: `[batch, n]`.
        real: bool `[batch, n]`: padding is False, and is kept only to fill up rows.
        gone: how many real tokens of each row go, int64 `[batch]`.
    """
    batch, n = score.shape
    kept = int((real.sum(1) - gone).max())
    rank = torch.where(real, score.double(), torch.full_like(score, -torch.inf, dtype=torch.float64))
    columns = torch.arange(n, device=score.device)
    first = torch.where(real, columns, n).min(1).values
    last = torch.where(real, columns, -1).max(1).values
    rows = torch.arange(batch, device=score.device)
    rank[rows, first] = rank[rows, last] = torch.inf
    order = rank.argsort(dim=1, descending=True, stable=True)  # real tokens first, best first; then padding
    chosen = []
    for row in range(batch):
        alive = int(real[row].sum() - gone[row])
        padding = order[row, int(real[row].sum()) :]
        chosen.append(torch.cat([order[row, :alive], padding[: kept - alive]]).sort().values)
    return torch.stack(chosen)
