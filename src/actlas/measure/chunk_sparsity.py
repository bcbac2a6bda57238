"""Token-level and chunk-level sparsity of any activation mask: experts, or an MLP's neurons.

    TLS     = 1 - mean over tokens of the share of active units
    CLS_L   = 1 - mean over chunks of L consecutive tokens of the share of units that any of them uses

A device that runs L draft tokens at once must load the union. CLS_1 = TLS, and CLS never rises with L. A mask
whose tokens are in random order (`shuffled`) is the control: the same TLS, no locality. Source: "BlockFFN"
(2025), section 3.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError, ShapeError
from actlas.core.measurement import Measurement
from actlas.measure.samples import mean_measurement


def tls(active: Tensor, documents: NDArray[np.int64] | None = None, *, seed: int = 0) -> Measurement:
    """Return the token-level sparsity.

    Args:
        active: bool `[n, M]`.
        documents: of each token, for the interval.
        seed: of the bootstrap.
    """
    _check(active)
    per_token = 1 - active.double().mean(1).numpy()
    return mean_measurement(
        "token-level sparsity",
        "fraction",
        per_token,
        clusters=documents,
        seed=seed,
        over="documents",
        better="higher",
    )


def cls(
    active: Tensor,
    windows: NDArray[np.int64],
    length: int = 8,
    documents: NDArray[np.int64] | None = None,
    *,
    shuffled: bool = False,
    seed: int = 0,
) -> Measurement:
    """Return the chunk-level sparsity; what is left of a window behind its last whole chunk is not used.

    Args:
        active: bool `[n, M]`.
        windows: of each token; a chunk never crosses windows.
        length: L, tokens in a chunk.
        documents: of each token, for the interval; `windows` by default.
        shuffled: permute the tokens first (a control).
        seed: of the bootstrap and the permutation.

    Raises:
        InputError: no window has L tokens.
    """
    _check(active)
    if length < 1:
        raise InputError(f"length is {length}; a chunk has at least 1 token")
    if shuffled:
        active = active[torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))]
    docs = windows if documents is None else documents
    values, groups = [], []
    starts = np.flatnonzero(np.r_[True, windows[1:] != windows[:-1]])
    for a, b in zip(starts, np.r_[starts[1:], len(windows)], strict=True):
        count = (b - a) // length
        if count:
            union = active[a : a + count * length].unflatten(0, (count, length)).any(1)
            values.append(1 - union.double().mean(1).numpy())
            groups.append(np.full(count, docs[a]))
    if not values:
        raise InputError(f"no window has {length} tokens; take a smaller length")
    return mean_measurement(
        f"chunk-level sparsity over {length} tokens",
        "fraction",
        np.concatenate(values),
        clusters=np.concatenate(groups),
        seed=seed,
        over="documents",
        better="higher",
        note="tokens in random order" if shuffled else "",
    )


def _check(active: Tensor) -> None:
    if active.ndim != 2 or active.dtype != torch.bool or not active.numel():
        raise ShapeError(f"a mask is bool [tokens, units], not {active.dtype} {list(active.shape)}")
