"""TIES: add up changes of weights that partly contradict each other (trim, elect sign, merge).

For changes d_1 .. d_m of the same weights:

    trim    keep of each d_i the share `density` of greatest |entry|, set the others to 0
    elect   s = sign(sum_i w_i d_i), entry by entry
    merge   the (weighted) mean over those d_i whose entry has the sign s; 0 where none has

Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4. Trimming is
global, over all tensors of one change, as in the paper; `trim="tensor"` trims each by itself, as some
released code does. Exactly the wanted number of entries is kept (the first ones where magnitudes are equal).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.weight_edit import check_alike

Trim = Literal["global", "tensor"]


def ties(
    changes: Sequence[Mapping[str, Tensor]],
    *,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    trim: Trim = "global",
) -> dict[str, Tensor]:
    """Return the merged change, in float32.

    Args:
        changes: each by tensor name; names and shapes must agree.
        density: share of entries that each change keeps, in (0, 1].
        weights: of each change; equal if missing.
        trim: see the module docstring.

    Raises:
        InputError: no changes, a density outside (0, 1], weights that do not fit, or unlike changes.
    """
    share = _check(changes, density, weights)
    if trim not in ("global", "tensor"):
        raise InputError(f"trim is {trim!r}; it must be 'global' or 'tensor'")
    names = list(changes[0])
    kept = [_trimmed(change, names, density, trim) for change in changes]
    merged: dict[str, Tensor] = {}
    for name in names:
        stack = torch.stack([k[name] for k in kept])
        w = torch.tensor(share, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.ndim - 1))
        sign = (stack * w).sum(0).sign()
        agree = (stack.sign() == sign) & (sign != 0)
        total, count = (stack * w * agree).sum(0), (w * agree).sum(0)
        merged[name] = torch.where(count > 0, total / count.clamp_min(1e-30), torch.zeros_like(total))
    return merged


def average(
    changes: Sequence[Mapping[str, Tensor]], *, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Return the (weighted) mean of changes, the baseline that TIES is held against."""
    share = _check(changes, 1.0, weights)
    total = sum(share)
    return {
        n: torch.stack([w * c[n].float() for w, c in zip(share, changes, strict=True)]).sum(0) / total
        for n in changes[0]
    }


def _check(
    changes: Sequence[Mapping[str, Tensor]], density: float, weights: Sequence[float] | None
) -> list[float]:
    if not changes or not changes[0]:
        raise InputError("there is nothing to merge; give at least one change of weights")
    if not 0 < density <= 1:
        raise InputError(f"density is {density:g}; it is the share that is kept, above 0 and at most 1")
    for i, change in enumerate(changes[1:], start=2):
        check_alike(changes[0], change, "change 1", f"change {i}")
    share = [1.0] * len(changes) if weights is None else [float(w) for w in weights]
    if len(share) != len(changes) or min(share) <= 0:
        raise InputError(f"weights must be {len(changes)} positive numbers, not {list(share)}")
    return share


def _trimmed(
    change: Mapping[str, Tensor], names: Sequence[str], density: float, trim: Trim
) -> dict[str, Tensor]:
    wide = {n: change[n].detach().float() for n in names}
    if density == 1.0:
        return wide
    if trim == "tensor":
        return {n: _largest(t.flatten(), density).view(t.shape) for n, t in wide.items()}
    flat = _largest(torch.cat([t.flatten() for t in wide.values()]), density)
    parts = flat.split([t.numel() for t in wide.values()])
    return {n: part.view(t.shape) for part, (n, t) in zip(parts, wide.items(), strict=True)}


def _largest(flat: Tensor, density: float) -> Tensor:
    """Return a vector with all but its `density` share of greatest magnitudes set to 0."""
    size, k = flat.abs(), max(1, round(density * flat.numel()))
    limit = size.kthvalue(flat.numel() - k + 1).values
    kept = size > limit
    equal = (size == limit).nonzero().flatten()
    kept[equal[: k - int(kept.sum())]] = True
    return torch.where(kept, flat, torch.zeros_like(flat))
