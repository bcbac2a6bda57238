"""Streaming statistics of rows of activations: each independent, bounded in memory and mergeable.

An accumulator takes rows `[n, d]` as they come and keeps sums, counts or extremes. Two accumulators
that saw different rows merge into the one that would have seen all of them: counts and extremes
exactly, sums to float64 rounding, in any order. Nothing is divided before it is asked for.

| accumulator | keeps | memory (bytes) |
| --- | --- | --- |
| `ChannelSums` | sums of x, abs(x), x^2 (x^3, x^4) and the largest abs(x), per channel | 48 d |
| `TokenKurtosis` | sum and sum of squares of the rows' excess kurtosis | 24 |
| `Sketch` | counts of values in logarithmic buckets, both signs | 48 kB |
| `ChannelSketch` | counts of abs(x) in logarithmic buckets, per channel | 4.8 kB d |
| `Gram` | X^T X | 8 d^2 |
| `Reservoir` | a uniform sample of whole rows with their origins | (4 d + 40) k |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from actlas.core.calibration.origin import Origin
from actlas.kernels.statistics import accumulate, bucket_edges, bucket_value, log_histogram

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCK = 256  # rows multiplied at once in float32; short sums keep the rounding near 1e-6


@dataclass
class Accumulator:
    """Base: every field is a tensor that merges by `add` or, if listed in `EXTREMES`, by maximum."""

    EXTREMES: ClassVar[frozenset[str]] = frozenset()

    def update(self, rows: Tensor, origin: Origin) -> None:
        """Take in rows `[n, d]`, finite, of any real dtype and device."""
        raise NotImplementedError

    def merge(self, other: Self) -> Self:
        """Return the accumulator that would have seen the rows of both."""
        merged: dict[str, Tensor] = {}
        for name, mine in self.tensors().items():
            theirs = other.tensors()[name]
            merged[name] = torch.maximum(mine, theirs) if name in self.EXTREMES else mine + theirs
        return type(self)(**merged)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name (not copied)."""
        found = {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _zeros(d: int) -> Tensor:
    return torch.zeros(d, dtype=torch.float64)


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK]


@dataclass
class ChannelSums(Accumulator):
    """Power sums and the absolute maximum per channel, float64 `[d]`.

    `thirds` and `fourths` are empty unless kurtosis is asked for. Moments are formed from raw power
    sums, so a channel whose mean is m standard deviations loses about `m^2 * 1e-16` of its variance
    and `m^4 * 1e-16` of its kurtosis to rounding.
    """

    EXTREMES = frozenset({"absmax"})
    sums: Tensor
    magnitudes: Tensor
    squares: Tensor
    absmax: Tensor
    thirds: Tensor
    fourths: Tensor

    @classmethod
    def empty(cls, d: int, kurtosis: bool) -> Self:
        """Return the state before any rows."""
        high = d if kurtosis else 0
        return cls(_zeros(d), _zeros(d), _zeros(d), _zeros(d), _zeros(high), _zeros(high))

    def update(self, rows: Tensor, origin: Origin) -> None:
        high = len(self.fourths) > 0
        accumulate(
            rows,
            self.sums,
            self.squares,
            self.absmax,
            self.fourths if high else None,
            self.thirds if high else None,
        )
        for block in _blocks(rows):
            self.magnitudes += block.abs().sum(0, dtype=torch.float64).cpu()

    def excess_kurtosis(self, count: int) -> Tensor:
        """Return `E[(x - m)^4] / Var^2 - 3` per channel, float64 `[d]`; NaN for constant channels."""
        m, m2 = self.sums / count, self.squares / count
        m3, m4 = self.thirds / count, self.fourths / count
        variance = m2 - m.square()
        central = m4 - 4 * m * m3 + 6 * m.square() * m2 - 3 * m.pow(4)
        constant = variance <= 1e-14 * m2
        return torch.where(constant, torch.nan, central / variance.square() - 3)


@dataclass
class TokenKurtosis(Accumulator):
    """Excess kurtosis of each row over its channels, averaged over rows (the outlier measure of
    Elhage et al. 2023, "Privileged bases"); rows whose channels are all equal are left out."""

    total: Tensor = field(default_factory=lambda: _zeros(1))
    squared: Tensor = field(default_factory=lambda: _zeros(1))
    rows: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def update(self, rows: Tensor, origin: Origin) -> None:
        for block in _blocks(rows):
            k = row_excess_kurtosis(block).cpu()
            k = k[~k.isnan()]
            self.total += k.sum()
            self.squared += k.square().sum()
            self.rows += len(k)


def row_excess_kurtosis(rows: Tensor) -> Tensor:
    """Return each row's excess kurtosis over its channels, float64 `[n]`; NaN for constant rows."""
    x = rows.to(torch.float64)
    x = x - x.mean(1, keepdim=True)
    x2 = x.square()
    variance = x2.mean(1)
    kurtosis = x2.square().mean(1) / variance.square() - 3
    return torch.where(variance > 0, kurtosis, torch.nan)


@dataclass
class Sketch(Accumulator):
    """Sign-aware logarithmic buckets of all values at a site, int64 `[2 B + 1]`.

    A quantile is within `ERROR` of the value it stands for, relatively; magnitudes up to `SMALLEST`
    count as zero and magnitudes beyond `LARGEST` as `LARGEST`.
    """

    ERROR: ClassVar[float] = 0.005
    SMALLEST: ClassVar[float] = 1e-6
    HALF: ClassVar[int] = 3000
    GAMMA: ClassVar[float] = 1.005 / 0.995
    LARGEST: ClassVar[float] = 1e-6 * (1.005 / 0.995) ** 3000  # about 1.1e7
    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * Sketch.HALF + 1, dtype=torch.int64))

    def update(self, rows: Tensor, origin: Origin) -> None:
        log_histogram(rows, self.counts, self.GAMMA, self.SMALLEST)

    def quantile(self, q: Tensor, magnitude: bool = False) -> Tensor:
        """Return the values at ranks `floor(q (n - 1))` of the sorted values (or magnitudes).

        Args:
            q: float64, any shape, in [0, 1].
            magnitude: of abs(x) instead of x.
        """
        counts, first = self.counts, -self.HALF
        if magnitude:
            positive, negative = counts[self.HALF + 1 :], counts[: self.HALF].flip(0)
            counts, first = torch.cat([counts[self.HALF : self.HALF + 1], positive + negative]), 0
        rank = torch.floor(q.double() * (counts.sum() - 1).clamp(min=0).double()).to(torch.int64)
        bucket = torch.searchsorted(counts.cumsum(0), rank.reshape(-1), right=True).reshape(q.shape)
        return bucket_value(bucket.clamp(max=len(counts) - 1) + first, self.GAMMA, self.SMALLEST)


@dataclass
class ChannelSketch(Accumulator):
    """Logarithmic buckets of abs(x) for every channel, int64 `[d, B + 1]`; for channel thresholds."""

    ERROR: ClassVar[float] = 0.02
    SMALLEST: ClassVar[float] = 1e-5
    HALF: ClassVar[int] = 600
    GAMMA: ClassVar[float] = 1.02 / 0.98
    counts: Tensor

    @classmethod
    def empty(cls, d: int) -> Self:
        """Return the state before any rows."""
        return cls(torch.zeros(d, cls.HALF + 1, dtype=torch.int64))

    def update(self, rows: Tensor, origin: Origin) -> None:
        d = rows.shape[1]
        edges = torch.tensor(bucket_edges(self.HALF, self.GAMMA, self.SMALLEST), device=rows.device)
        first = torch.arange(d, device=rows.device) * (self.HALF + 1)
        for block in _blocks(rows):
            bucket = torch.searchsorted(edges, block.abs().to(torch.float32)).clamp_(max=self.HALF)
            flat = (bucket + first).reshape(-1)
            self.counts += torch.bincount(flat, minlength=self.counts.numel()).view(d, -1).cpu()

    def quantile(self, q: float) -> Tensor:
        """Return each channel's magnitude at rank `floor(q (n - 1))`, float64 `[d]`."""
        totals = self.counts.sum(1, keepdim=True)
        rank = torch.floor(q * (totals - 1).clamp(min=0).double()).to(torch.int64)
        bucket = torch.searchsorted(self.counts.cumsum(1), rank, right=True).squeeze(1)
        return bucket_value(bucket.clamp(max=self.HALF), self.GAMMA, self.SMALLEST)


@dataclass
class Gram(Accumulator):
    """`X^T X`, float64 `[d, d]`: what GPTQ, whitening and PCA need.

    float32 rows are multiplied in float32, 256 at a time, and added up in float64: entry (i, j) is
    exact to about `1e-6 sqrt(G_ii G_jj)`. float64 rows are multiplied in float64.
    """

    matrix: Tensor

    @classmethod
    def empty(cls, d: int) -> Self:
        """Return the state before any rows."""
        return cls(torch.zeros(d, d, dtype=torch.float64))

    def update(self, rows: Tensor, origin: Origin) -> None:
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        for block in _blocks(rows):
            x = block.to(dtype)
            self.matrix += (x.T @ x).cpu()


@dataclass
class Reservoir(Accumulator):
    """A uniform sample of up to `size` rows: those with the smallest priorities.

    A row's priority comes from (seed, document, position) alone, so the same rows are kept in any
    order, batching or split of the corpus, and the same tokens at every site.

    Attributes:
        size: how many rows to keep at most.
        rows: float32 `[k, d]` (float64 for float64 models).
        priority: int64 `[k]`, ascending.
        position, token: int64 `[k]`.
        documents: names, k of them.
    """

    size: int
    rows: Tensor
    priority: Tensor
    position: Tensor
    token: Tensor
    documents: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, d: int, size: int) -> Self:
        """Return the state before any rows."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(size, torch.zeros(0, d), none, none, none)

    def update(self, rows: Tensor, origin: Origin) -> None:
        candidate = torch.arange(len(origin))
        if len(self.documents) == self.size:
            candidate = candidate[origin.priority < self.priority[-1]]
        if len(candidate) > self.size:
            candidate = candidate[origin.priority[candidate].argsort(stable=True)[: self.size]]
        if not len(candidate):
            return
        chosen = origin.select(candidate)
        picked = rows[candidate.to(rows.device)].cpu()
        new = Reservoir(
            self.size,
            picked.to(torch.float64 if rows.dtype == torch.float64 else torch.float32),
            chosen.priority,
            chosen.position,
            chosen.token,
            [chosen.names[i] for i in chosen.document.tolist()],
        )
        merged = self.merge(cast("Self", new))
        self.rows, self.priority, self.position = merged.rows, merged.priority, merged.position
        self.token, self.documents = merged.token, merged.documents

    def merge(self, other: Self) -> Self:
        priority = torch.cat([self.priority, other.priority])
        position = torch.cat([self.position, other.position])
        documents = [*self.documents, *other.documents]
        # Equal priorities mean the same document and position, or a collision; sort those by name.
        keys = list(zip(priority.tolist(), documents, position.tolist(), strict=True))
        order = sorted(range(len(keys)), key=keys.__getitem__)[: self.size]
        index = torch.tensor(order, dtype=torch.int64)
        dtype = self.rows.dtype if len(self.rows) else other.rows.dtype
        return type(self)(
            self.size,
            torch.cat([self.rows.to(dtype), other.rows.to(dtype)])[index],
            priority[index],
            position[index],
            torch.cat([self.token, other.token])[index],
            [documents[i] for i in order],
        )
