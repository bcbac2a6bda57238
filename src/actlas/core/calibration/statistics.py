"""The statistics of one site: what was collected, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from actlas.core.calibration.accumulators import (
    Accumulator,
    ChannelSketch,
    ChannelSums,
    Gram,
    Reservoir,
    Sketch,
    TokenKurtosis,
)
from actlas.core.calibration.massive import MassiveRows
from actlas.core.errors import InputError, did_you_mean

#: What can be collected, and what a site's statistics then offer.
STATISTICS: dict[str, str] = {
    "moments": "mean, second_moment, variance, std, mean_abs, channel_norm per channel",
    "absmax": "absmax per channel",
    "quantiles": "quantile(q), abs_quantile(q) over all channels, within 0.5%",
    "channel_quantiles": "channel_quantile(q) of abs(x) per channel, within 2%",
    "kurtosis": "excess_kurtosis per channel and token_kurtosis",
    "channel_norms": "channel_norm (L2) per channel",
    "hessian": "hessian (X^T X) and covariance",
    "rows": "a uniform sample of rows with their tokens and documents",
}
DEFAULT_STATISTICS: tuple[str, ...] = ("moments", "absmax", "quantiles")
_SUMS = frozenset({"moments", "absmax", "kurtosis", "channel_norms", "hessian"})

A = TypeVar("A", bound=Accumulator)


def check_statistics(stats: Iterable[str]) -> tuple[str, ...]:
    """Return the statistics to collect, each once, in the table's order.

    Raises:
        InputError: an unknown name, or none at all.
    """
    asked = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in asked:
        if name not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise InputError(f"unknown statistic {name!r}{did_you_mean(name, STATISTICS)} (known: {known})")
    if not asked:
        raise InputError(f"no statistics to collect; choose from {', '.join(STATISTICS)}")
    return tuple(name for name in STATISTICS if name in asked)


def make_parts(d: int, stats: tuple[str, ...], rows: int) -> dict[str, Accumulator]:
    """Return the empty accumulators that the statistics need, for d channels."""
    parts: dict[str, Accumulator] = {}
    if _SUMS & set(stats):
        parts["sums"] = ChannelSums.empty(d, "kurtosis" in stats)
    if "kurtosis" in stats:
        parts["token_kurtosis"] = TokenKurtosis()
    if "quantiles" in stats:
        parts["sketch"] = Sketch()
    if "channel_quantiles" in stats:
        parts["channel_sketch"] = ChannelSketch.empty(d)
    if "hessian" in stats:
        parts["gram"] = Gram.empty(d)
    if "rows" in stats:
        parts["reservoir"] = Reservoir.empty(d, rows)
    return parts


def memory_needed(d: int, stats: tuple[str, ...], rows: int) -> int:
    """Return the bytes that one site's accumulators take, for d channels."""
    need = 48 * d if _SUMS & set(stats) else 0
    need += 8 * (2 * Sketch.HALF + 1) if "quantiles" in stats else 0
    need += 8 * d * (ChannelSketch.HALF + 1) if "channel_quantiles" in stats else 0
    need += 8 * d * d if "hessian" in stats else 0
    return need + ((4 * d + 40) * rows if "rows" in stats else 0)


@dataclass
class SiteStatistics:
    """What a calibration knows about one site. Channels of heads are flattened (`heads * head_dim`).

    Attributes:
        site: the site's name.
        channels: number of channels d.
        stats: what was collected.
        count: rows that went into the statistics.
        massive: massive-activation rows that were found (residual-stream sites only).
        parts: the accumulators behind the statistics, by name.

    Every statistic raises `InputError` if it was not collected, or if no row went into it.
    """

    site: str
    channels: int
    stats: tuple[str, ...]
    count: int
    massive: MassiveRows
    parts: dict[str, Accumulator]

    def _sums(self, what: str, *needs: str) -> ChannelSums:
        return self._part("sums", ChannelSums, what, *needs)

    def _part(self, name: str, kind: type[A], what: str, *needs: str) -> A:
        part = self.parts.get(name)
        if not set(needs) & set(self.stats) or not isinstance(part, kind):
            raise InputError(
                f"{what} of {self.site} was not collected (only {', '.join(self.stats)}); "
                f"calibrate with stats=({needs[0]!r}, ...)"
            )
        if not self.count:
            left_out = f" ({self.massive.describe()})" if self.massive.count else ""
            raise InputError(f"{self.site} has no {what}: no row reached it{left_out}")
        return part

    @property
    def mean(self) -> Tensor:
        """Mean per channel, float64 `[d]`."""
        return self._sums("mean", "moments", "hessian").sums / self.count

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude per channel, float64 `[d]`."""
        return self._sums("mean_abs", "moments").magnitudes / self.count

    @property
    def second_moment(self) -> Tensor:
        """Mean of x^2 per channel, float64 `[d]`."""
        return self._sums("second_moment", "moments").squares / self.count

    @property
    def variance(self) -> Tensor:
        """Population variance per channel (divided by n), float64 `[d]`, never below 0."""
        sums = self._sums("variance", "moments")
        mean = sums.sums / self.count
        return (sums.squares / self.count - mean.square()).clamp(min=0)

    @property
    def std(self) -> Tensor:
        """Square root of the variance, float64 `[d]`."""
        return self.variance.sqrt()

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude per channel, float64 `[d]`."""
        return self._sums("absmax", "absmax").absmax

    @property
    def channel_norm(self) -> Tensor:
        """L2 norm of each channel over all rows, `sqrt(sum x^2)`, float64 `[d]`."""
        return self._sums("channel_norm", "channel_norms", "moments").squares.sqrt()

    @property
    def excess_kurtosis(self) -> Tensor:
        """Excess kurtosis of each channel over rows, float64 `[d]`; NaN for a constant channel."""
        return self._sums("excess_kurtosis", "kurtosis").excess_kurtosis(self.count)

    @property
    def token_kurtosis(self) -> float:
        """Excess kurtosis of a row over its channels, averaged over rows."""
        part = self._part("token_kurtosis", TokenKurtosis, "token_kurtosis", "kurtosis")
        return float(part.total / part.rows)

    def quantile(self, q: float) -> float:
        """Return the value below which a fraction q of all values lie, within 0.5% of itself.

        Args:
            q: in [0, 1]. The answer stands for the value at rank `floor(q (n - 1))`, n counting every
                channel of every row.
        """
        sketch = self._part("sketch", Sketch, "quantile", "quantiles")
        return float(sketch.quantile(_fraction(q)))

    def abs_quantile(self, q: float) -> float:
        """Return the magnitude below which a fraction q of all magnitudes lie, within 0.5% of itself."""
        sketch = self._part("sketch", Sketch, "abs_quantile", "quantiles")
        return float(sketch.quantile(_fraction(q), magnitude=True))

    def channel_quantile(self, q: float) -> Tensor:
        """Return for each channel the q-quantile of its magnitudes, float64 `[d]`, within 2%."""
        part = self._part("channel_sketch", ChannelSketch, "channel_quantile", "channel_quantiles")
        return part.quantile(float(_fraction(q)))

    @property
    def hessian(self) -> Tensor:
        """`X^T X` over all rows (not divided by their number), float64 `[d, d]`."""
        return self._part("gram", Gram, "hessian", "hessian").matrix

    @property
    def covariance(self) -> Tensor:
        """Population covariance of the channels (divided by n), float64 `[d, d]`."""
        matrix = self._part("gram", Gram, "covariance", "hessian").matrix / self.count
        return matrix - torch.outer(self.mean, self.mean)

    @property
    def rows(self) -> Tensor:
        """The sampled rows, float32 `[k, d]`, in an order that is random but always the same."""
        return self.sample.rows

    @property
    def sample(self) -> Reservoir:
        """The sampled rows with `documents`, `position` and `token` of each."""
        return self._part("reservoir", Reservoir, "rows", "rows")

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """Return the statistics over the rows of both."""
        parts = {name: part.merge(other.parts[name]) for name, part in self.parts.items()}
        count, massive = self.count + other.count, self.massive.merge(other.massive)
        return SiteStatistics(self.site, self.channels, self.stats, count, massive, parts)


def _fraction(q: float) -> Tensor:
    if not 0 <= q <= 1:
        raise InputError(f"a quantile must lie between 0 and 1, not {q}")
    return torch.tensor(q, dtype=torch.float64)
