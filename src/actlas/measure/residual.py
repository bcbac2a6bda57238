"""Sizes and tails of activations, layer by layer: norms, kurtosis, outlier channels, massive tokens.

    NormObserver(kinds)       activation-norm (median over tokens), activation-norm-p95
    TailObserver(kinds)       token-kurtosis, channel-kurtosis, outlier-channels
    MassiveObserver()         massive-activations

* Excess kurtosis is `m4 / m2^2 - 3` with central moments: of one token over its channels (averaged over
  tokens), and of one channel over tokens (averaged over channels). 0 for a normal distribution; large values
  mean that few entries carry most of the energy, which is what breaks low-bit quantization.
* A channel is an outlier if its absolute maximum exceeds `factor` times the median over channels of that.
* Massive activations: tokens whose residual state holds an entry far beyond all others (criterion and source
  in `actlas.core.calibration.massive`).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.intervals import percentiles
from actlas.core.measurement import Measurement
from actlas.measure.observing import (
    GROUPS,
    Batch,
    Observer,
    block_sites,
    group_draws,
    jackknife,
    quantile_interval,
    residual_sites,
)
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

_OVER = "bootstrap over documents"


class _ByKind(Observer):
    """Reads every existing block site of some kinds."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.found: list[Site] = []
        self.left_out = 0

    def sites(self, model: Model) -> list[str]:
        self.found = [s for kind in self.kinds for s in block_sites(model, kind)]
        return [s.name for s in self.found]

    @property
    def note(self) -> str:
        """How many tokens the averages leave out."""
        return f"{self.left_out:,} massive tokens left out" if self.left_out else ""


class NormObserver(_ByKind):
    """Euclidean norms of activations: their median and 0.95 quantile over tokens."""

    def __init__(self, kinds: tuple[str, ...] = ("resid_post", "attn.out", "mlp.out", "mlp.act")) -> None:
        super().__init__(kinds)
        self._norms: dict[str, list[NDArray[np.float64]]] = {}
        self._documents: list[NDArray[np.int64]] = []

    def update(self, batch: Batch) -> None:
        self.left_out += int(batch.massive.sum())
        self._documents.append(batch.document[batch.ordinary])
        for site in self.found:
            norms = batch.rows(site.name).float().norm(dim=1).double().cpu().numpy()
            self._norms.setdefault(site.name, []).append(norms[batch.ordinary])

    def results(self, seed: int) -> list[Measurement]:
        documents = np.concatenate(self._documents)
        out = []
        for site in self.found:
            norms = np.concatenate(self._norms[site.name])
            for name, q in (("activation-norm", 0.5), ("activation-norm-p95", 0.95)):
                value = float(np.quantile(norms, q)) if len(norms) else float("nan")
                low, high = quantile_interval(norms, documents, q, seed)
                group = {"layer": str(site.block), "site": site.kind}
                n = len(np.unique(documents))
                out.append(
                    Measurement(
                        name, value, "L2 norm", n, low, high, _OVER, seed, group=group, note=self.note
                    )
                )
        return out


class TailObserver(_ByKind):
    """Kurtosis over channels and over tokens, and outlier channels.

    Args:
        kinds: which sites.
        factor: how far above the median a channel's maximum must lie to count as an outlier.
    """

    def __init__(self, kinds: tuple[str, ...] = ("resid_post", "mlp.act"), factor: float = 10.0) -> None:
        super().__init__(kinds)
        self.factor = factor
        self._token: dict[str, list[NDArray[np.float64]]] = {}
        self._documents: list[NDArray[np.int64]] = []
        self._sums: dict[str, Tensor] = {}  # [groups, 4, d], raw power sums
        self._largest: dict[str, Tensor] = {}  # [groups, d]
        self._counts = np.zeros(GROUPS)

    def update(self, batch: Batch) -> None:
        self.left_out += int(batch.massive.sum())
        chosen = batch.ordinary
        documents = batch.document[chosen]
        self._documents.append(documents)
        group = documents % GROUPS
        self._counts += np.bincount(group, minlength=GROUPS)
        index = torch.from_numpy(group)
        for site in self.found:
            x = batch.rows(site.name)[torch.from_numpy(chosen)].double().cpu()
            d = x.shape[1]
            centred = x - x.mean(1, keepdim=True)
            square = centred.square()
            kurtosis = square.square().mean(1) / square.mean(1).square().clamp_min(1e-300) - 3
            self._token.setdefault(site.name, []).append(kurtosis.numpy())
            sums = self._sums.setdefault(site.name, torch.zeros(GROUPS, 4, d, dtype=torch.float64))
            largest = self._largest.setdefault(site.name, torch.zeros(GROUPS, d, dtype=torch.float64))
            for g in np.unique(group):
                part = x[index == int(g)]
                power = part.square()
                sums[g] += torch.stack(
                    [part.sum(0), power.sum(0), (power * part).sum(0), power.square().sum(0)]
                )
                largest[g] = torch.maximum(largest[g], part.abs().amax(0))

    def results(self, seed: int) -> list[Measurement]:
        documents = np.concatenate(self._documents)
        n = len(np.unique(documents))
        held = np.flatnonzero(self._counts)
        draws = group_draws(len(held), seed) if len(held) else np.zeros((0, 0))
        out = []
        for site in self.found:
            group = {"layer": str(site.block), "site": site.kind}
            token = np.concatenate(self._token[site.name])
            weights = np.bincount(documents).astype(float)
            present = weights > 0
            means = np.bincount(documents, weights=token)[present] / weights[present]
            out.append(
                mean_measurement(
                    "token-kurtosis",
                    "excess kurtosis",
                    means,
                    weights[present],
                    seed=seed,
                    group=group,
                    note=self.note,
                    better="lower",
                )
            )
            out += self._channels(site, held, draws, group, n, seed)
        return out

    def _channels(
        self,
        site: Site,
        held: NDArray[np.int64],
        draws: NDArray[np.float64],
        group: dict[str, str],
        n: int,
        seed: int,
    ) -> list[Measurement]:
        if not len(held):
            return [
                missing(name, unit, "no tokens but massive ones", group=group)
                for name, unit in (("channel-kurtosis", "excess kurtosis"), ("outlier-channels", "channels"))
            ]
        sums = self._sums[site.name][held].numpy()
        counts = self._counts[held]
        kurtosis = channel_kurtosis(sums.sum(0), counts.sum())
        varying = kurtosis[np.isfinite(kurtosis)]
        average = _mean(varying)
        without = [
            _mean(channel_kurtosis(sums.sum(0) - part, counts.sum() - count))
            for part, count in zip(sums, counts, strict=True)
            if count < counts.sum()
        ]
        low, high = jackknife(average, without)
        largest = self._largest[site.name][held].numpy()
        peak = largest.max(0)
        outliers = outlier_channels(peak, self.factor)
        peaks = np.stack([largest[w > 0].max(0) for w in draws])
        counts_drawn = (peaks > self.factor * np.median(peaks, axis=1, keepdims=True)).sum(1)
        few, many = percentiles(counts_drawn.astype(float), len(held)) if len(held) > 1 else (None, None)
        median = float(np.median(peak))
        return [
            Measurement(
                "channel-kurtosis",
                average,
                "excess kurtosis",
                n,
                low,
                high,
                f"jackknife over {len(held)} groups of documents",
                group=group,
                better="lower",
                note=self.note,
                details={
                    "largest": float(varying.max()) if len(varying) else None,
                    "channels": len(kurtosis),
                },
            ),
            Measurement(
                "outlier-channels",
                float(len(outliers)),
                "channels",
                n,
                few,
                many,
                "bootstrap over groups of documents",
                seed,
                group=group,
                better="lower",
                note=", ".join(
                    p for p in (f"absolute maximum above {self.factor:g} x median", self.note) if p
                ),
                details={
                    "factor": self.factor,
                    "largest_over_median": float(peak.max() / median) if median else None,
                    "median": median,
                    "channels": [[int(c), float(peak[c])] for c in outliers[:8]],
                    "of": len(peak),
                },
            ),
        ]


def _mean(x: NDArray[np.float64]) -> float:
    """The mean of what is finite (constant channels have no kurtosis); `nan` if nothing is."""
    x = x[np.isfinite(x)]
    return float(x.mean()) if len(x) else float("nan")


def channel_kurtosis(sums: NDArray[np.float64], count: float) -> NDArray[np.float64]:
    """Return each channel's excess kurtosis from raw power sums `[4, d]`; `nan` for constant channels."""
    m1, m2, m3, m4 = sums / count
    variance = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    constant = variance <= 1e-12 * np.maximum(m2, 1e-300)
    return np.where(constant, np.nan, fourth / np.where(constant, 1.0, variance) ** 2 - 3)


def outlier_channels(peak: NDArray[np.float64], factor: float) -> NDArray[np.int64]:
    """Return the channels whose absolute maximum exceeds `factor` times the median, largest first."""
    found = np.flatnonzero(peak > factor * np.median(peak))
    return found[np.argsort(-peak[found], kind="stable")]


class MassiveObserver(Observer):
    """Tokens with massive activations: how many, where, how large."""

    def __init__(self) -> None:
        self._flags: dict[str, list[NDArray[np.bool_]]] = {}
        self._documents: list[NDArray[np.int64]] = []
        self._found: dict[str, list[tuple[float, int, int, str]]] = {}  # value, channel, place, token

    def update(self, batch: Batch) -> None:
        self._documents.append(batch.document)
        ids = None if batch.trace.tokens is None else batch.trace.tokens[batch.trace.mask].cpu()
        self._sites = [s.name for s in residual_sites(batch.model)]
        for site in self._sites:
            rows = batch.rows(site)
            flags = massive_rows(rows).cpu()
            self._flags.setdefault(site, []).append(flags.numpy())
            held = self._found.setdefault(site, [])
            for i in flags.nonzero().flatten().tolist():
                channel = int(rows[i].abs().argmax())
                token = "" if ids is None else batch.model.token_strings([int(ids[i])])[0]
                held.append((float(rows[i, channel]), channel, int(batch.place[i]), token))

    def results(self, seed: int) -> list[Measurement]:
        documents = np.concatenate(self._documents)
        out = []
        for layer, site in enumerate(self._sites):
            flags, found = np.concatenate(self._flags[site]), self._found[site]
            details = {
                "count": int(flags.sum()),
                "of": len(flags),
                "at_first_token": sum(place == 0 for _, _, place, _ in found),
                "largest": max((abs(v) for v, *_ in found), default=0.0),
                "channels": dict(Counter(str(c) for _, c, _, _ in found).most_common(4)),
                "tokens": dict(Counter(t for *_, t in found).most_common(4)),
            }
            out.append(
                mean_measurement(
                    "massive-activations",
                    "fraction",
                    flags.astype(float),
                    clusters=documents,
                    seed=seed,
                    group={"layer": str(layer)},
                    details=details,
                )
            )
        return out
