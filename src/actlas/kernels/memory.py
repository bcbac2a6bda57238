"""Weights in large pages: what is read from end to end for every token should not wait for page tables.

    data = in_large_pages(data)                  # one tensor, where it is
    a, b, c = together([a, b, c])                # small ones, moved into one block of large pages

A page of 4 KB holds a few columns of a packed weight, and each page has to be looked up; with pages of 2 MB
there are few to look up. Linux gives them on request, and only for whole pages, so small
tensors are put side by side. Elsewhere, and where the system refuses, nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actlas.kernels.loading import native

_LEAST = 4 << 20
_LINE = 64


def in_large_pages(data: Tensor) -> Tensor:
    """Ask for large pages for a contiguous tensor on the CPU that can fill some; return it."""
    module = native()
    size = data.numel() * data.element_size()
    if module is not None and data.device.type == "cpu" and data.is_contiguous() and size >= _LEAST:
        module.use_large_pages(data.view(-1).view(torch.uint8))
    return data


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors side by side in one block of large pages, each on a line of its own.

    Args:
        tensors: on the CPU, of any types and shapes.

    Raises:
        ValueError: a tensor on another device.
    """
    places, end = [], 0
    for t in tensors:
        if t.device.type != "cpu":
            raise ValueError(f"a tensor is on {t.device}; only those on the CPU lie in its memory")
        places.append(end)
        end += -(-t.numel() * t.element_size() // _LINE) * _LINE
    block = in_large_pages(torch.empty(end, dtype=torch.uint8))
    moved = []
    for t, place in zip(tensors, places, strict=True):
        size = t.numel() * t.element_size()
        mine = block[place : place + size].view(t.dtype).view(t.shape)
        mine.copy_(t)
        moved.append(mine)
    return moved
