"""Which inputs a token keeps: the k largest scores, or those above a threshold, without a sort.

    mask = topk_mask(scores, 300)              # scores [..., d] -> bool [..., d], exactly 300 in each row

The k-th largest score is found bit by bit on integers of the same order, which takes 32 passes of comparisons
over a row; a stable sort of the row, which gives the same mask, takes several times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.kernels.loading import native, threads


def topk_mask(scores: Tensor, k: int, *, level: str = "best") -> Tensor:
    """Return which scores are among the k largest of their row, bool of the shape of `scores`.

    Args:
        scores: `[..., d]`, of any float type; the kernel takes float32 on the CPU. Equal scores: the lower
            channel first. NaN counts as larger than every number, as in torch's sort.
        k: from 1 to d.
        level: the instruction set.

    Raises:
        ValueError: k is not from 1 to d, or scores are not numbers of a float type.
    """
    if not scores.is_floating_point() or scores.ndim == 0:
        raise ValueError(f"scores must be floats [..., d], not {scores.dtype} {list(scores.shape)}")
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be from 1 to {scores.shape[-1]} (the scores of a row), not {k}")
    module = native()
    if module is None or scores.device.type != "cpu" or scores.dtype != torch.float32:
        return topk_mask_reference(scores, k)
    rows = scores.detach().reshape(-1, scores.shape[-1]).contiguous()
    mask = torch.empty(rows.shape, dtype=torch.uint8)
    if len(rows):
        module.topk_mask(rows, k, mask, threads(), level)
    return mask.view(torch.bool).view(scores.shape)


def topk_mask_reference(scores: Tensor, k: int) -> Tensor:
    """The same in PyTorch, with a stable sort."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
