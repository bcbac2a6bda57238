"""Let a student's features follow its teacher's in the directions in which the teacher's vary most.

    V = principal_directions(teacher features)                      # once, on the first batch
    L = mean over blocks of |F_s V - F_t V|^2 / entries

Low-rank representation mimicking of BinaryDM (Zheng et al. 2024, section 3.3). Only the space that V spans
matters, not the signs or the order of its columns, since they are orthonormal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.network_blocks import first_tensor


def principal_directions(features: Tensor, rank: int | None = None, axis: str = "channel") -> Tensor:
    """Return orthonormal leading principal directions of features, `[size of the axis, rank]`.

    Args:
        features: `[batch, channels, height, width]`, or `[..., channels]` with up to three axes.
        rank: how many; default a quarter of the axis, at least 2.
        axis: `"channel"`, or `"width"`: the last axis, as in the official code.
    """
    rows = channels_last(features, axis).reshape(-1, channels_last(features, axis).shape[-1]).double()
    rank = min(rows.shape[1], max(2, rows.shape[1] // 4) if rank is None else rank)
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors[:, -rank:].flip(1).to(features.dtype)


def lowrank_mimic(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    bases: Mapping[str, Tensor],
    axis: str = "channel",
) -> Tensor:
    """Return the mean over blocks of the mean squared difference of projected features."""
    errors = []
    for path, base in bases.items():
        gap = channels_last(student[path] - teacher[path], axis) @ base
        errors.append(gap.square().mean())
    return torch.stack(errors).mean()


def channels_last(features: Tensor, axis: str) -> Tensor:
    """Put the axis that is projected last."""
    if axis not in ("channel", "width"):
        raise InputError(f"features are projected over their channel or their width, not {axis!r}")
    return features.movedim(1, -1) if features.ndim == 4 and axis == "channel" else features


def watched(network: nn.Module, paths: list[str]) -> tuple[dict[str, Tensor], list[Any]]:
    """Keep the output of some modules from now on; return where, and the hooks."""
    held: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def keep(m: nn.Module, args: Any, output: Any, path: str = path) -> None:
            held[path] = first_tensor(output)

        handles.append(network.get_submodule(path).register_forward_hook(keep))
    return held, handles


def unwatch(features: tuple[dict[str, Tensor], list[Any]]) -> None:
    """Take the hooks of `watched` away."""
    for handle in features[1]:
        handle.remove()
