"""Cache policies that look at the prompt alone: SnapKV, streaming window, H2O, and a random control.

| policy | what stays of the prompt | sources |
| --- | --- | --- |
| `SnapKV` | the positions that the last `window` tokens attend to most, and the window | Li et al. 2024 |
| `StreamingWindow` | the first `sinks` tokens and the last ones; goes on while decoding | Xiao et al. 2023 |
| `H2O` | the tokens that received most attention so far, and the last ones; goes on | Zhang et al. 2023 |
| `RandomKV` | random positions and the window: the control | |

SnapKV's score of a position, with A the attention of the last w rows, is the reduction over the rows and the
query heads of its key-value head, smoothed by a max-pool over neighbouring positions:

    s_j = pool_j( max_{g, r} A[g, r, j] ),   j < n - w
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.edit import register_edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.sparsity.kv_policy import KeptLayer, KVPolicy, check_sizes

Reduce = Literal["max", "mean"]


def window_columns(score: Tensor, kept: int, length: int) -> Tensor:
    """Return the `kept` best columns of a score `[batch, kv_heads, n]` and all columns from n to `length`."""
    best = score.topk(kept, dim=-1).indices
    tail = torch.arange(score.shape[-1], length, device=score.device).expand(*score.shape[:2], -1)
    return torch.cat([best, tail], -1).sort(-1).values


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class SnapKV(KVPolicy):
    """Keep what the prompt's last tokens attend to.

    Attributes:
        window: last tokens whose attention votes, and which stay themselves.
        kernel: width of the max-pool over positions, odd.
        reduce: over rows and query heads of a key-value head: `"max"` (as in SpecKV's code) or `"mean"`.
    """

    window: int = 32
    kernel: int = 7
    reduce: Reduce = "max"

    def __post_init__(self) -> None:
        check_sizes(capacity=self.capacity, window=self.window, kernel=self.kernel)
        if self.window >= self.capacity:
            raise InputError(f"window is {self.window}; it must be below the capacity, {self.capacity}")
        if self.kernel % 2 == 0:
            raise InputError(f"kernel is {self.kernel}; it must be odd, so that pooling is centred")
        if self.reduce not in ("max", "mean"):
            raise InputError(f"reduce is {self.reduce!r}; it must be 'max' or 'mean'")

    def rows(self, length: int, ahead: int) -> int:
        return min(self.window, length) + ahead

    def choose(self, layer: KeptLayer, pattern: Tensor | None, length: int) -> Tensor:
        assert pattern is not None
        score = self.score(pattern, length)
        return window_columns(score, self.capacity - self.window, length)

    def score(self, pattern: Tensor, length: int) -> Tensor:
        """Return the score of the columns before the window, float32 `[batch, kv_heads, length - window]`.

        Args:
            pattern: attention of the last rows, `[batch, kv_heads, group, rows, columns]`.
            length: columns of the prompt.
        """
        part = pattern[..., : length - self.window].float()
        score = part.amax((2, 3)) if self.reduce == "max" else part.mean((2, 3))
        return F.max_pool1d(score, self.kernel, 1, self.kernel // 2)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class RandomKV(KVPolicy):
    """Keep random positions and the last ones: the control of every rule.

    Attributes:
        window: last tokens that stay.
        seed: of the draw; each layer draws anew.
    """

    window: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(capacity=self.capacity, window=self.window, seed=self.seed)
        if self.window >= self.capacity:
            raise InputError(f"window is {self.window}; it must be below the capacity, {self.capacity}")

    def rows(self, length: int, ahead: int) -> int:
        return 0

    def choose(self, layer: KeptLayer, pattern: Tensor | None, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + layer.index)
        shape = (*layer.positions.shape[:2], length - self.window)
        score = torch.rand(shape, generator=generator).to(layer.positions.device)
        return window_columns(score, self.capacity - self.window, length)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class StreamingWindow(KVPolicy):
    """Keep the first tokens (attention sinks) and the last ones, also while decoding.

    Attributes:
        sinks: first tokens that stay.
    """

    sinks: int = 4
    rolling: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sizes(capacity=self.capacity, sinks=self.sinks)
        if self.sinks >= self.capacity:
            raise InputError(f"sinks is {self.sinks}; it must be below the capacity, {self.capacity}")

    def rows(self, length: int, ahead: int) -> int:
        return 0

    def choose(self, layer: KeptLayer, pattern: Tensor | None, length: int) -> Tensor:
        columns = torch.arange(length, device=layer.positions.device)
        if length > self.capacity:
            columns = torch.cat([columns[: self.sinks], columns[length - self.capacity + self.sinks :]])
        return columns.expand(*layer.positions.shape[:2], -1)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class H2O(KVPolicy):
    """Keep the heavy hitters, by the attention received so far, and the last tokens, also while decoding.

    Attributes:
        recent: last tokens that stay; default half the capacity.
    """

    recent: int | None = None
    rolling: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sizes(capacity=self.capacity, recent=self.last)
        if self.last >= self.capacity:
            raise InputError(f"recent is {self.last}; it must be below the capacity, {self.capacity}")

    @property
    def last(self) -> int:
        """How many of the last tokens stay."""
        return max(1, self.capacity // 2) if self.recent is None else self.recent

    def rows(self, length: int, ahead: int) -> int:
        return length + ahead

    def choose(self, layer: KeptLayer, pattern: Tensor | None, length: int) -> Tensor:
        assert pattern is not None
        received = pattern.float().sum((2, 3))
        if layer.mass is not None:
            received[..., : layer.mass.shape[-1]] += layer.mass
        layer.mass = received
        if length <= self.capacity:
            return torch.arange(length, device=received.device).expand(*received.shape[:2], -1)
        return window_columns(received[..., : length - self.last], self.capacity - self.last, length)


@method(
    "snap-kv",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="keep the keys and values that the prompt's last tokens attend to",
    example="actlas fit snap-kv smollm2 --option capacity=256 -o snap/",
    papers=("draft-approx",),
)
def fit_snap_kv(
    model: Model, *, capacity: int = 256, window: int = 32, kernel: int = 7, reduce: Reduce = "max"
) -> SnapKV:
    """Return the policy, bound to the model; see `SnapKV` for the options. Nothing is fitted."""
    return SnapKV(capacity, window, kernel, reduce).bind(model.fingerprint)  # type: ignore[return-value]


@method(
    "streaming-window",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="keep the keys and values of the first tokens and of the last ones, while decoding too",
    example="actlas fit streaming-window smollm2 --option capacity=256 -o window/",
    papers=("draft-approx",),
)
def fit_streaming_window(model: Model, *, capacity: int = 256, sinks: int = 4) -> StreamingWindow:
    """Return the policy, bound to the model; see `StreamingWindow` for the options. Nothing is fitted."""
    return StreamingWindow(capacity, sinks).bind(model.fingerprint)  # type: ignore[return-value]


@method(
    "h2o",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="keep the keys and values that received most attention so far, while decoding too",
    example="actlas fit h2o smollm2 --option capacity=256 -o h2o/",
    papers=("draft-approx",),
)
def fit_h2o(model: Model, *, capacity: int = 256, recent: int | None = None) -> H2O:
    """Return the policy, bound to the model; see `H2O` for the options. Nothing is fitted."""
    return H2O(capacity, recent).bind(model.fingerprint)  # type: ignore[return-value]
