"""How well and how sparsely a dictionary reconstructs: SAEBench's core metrics without the model.

    l0                  mean number of active features
    explained_variance  1 - sum |x - x_hat|^2 / sum |x - m|^2          fvu = 1 - explained_variance
    mse                 mean of |x - x_hat|^2 over tokens (summed over channels)
    normalized_mse      mean of |x - x_hat|^2 / |x|^2
    cossim              mean cosine of x and x_hat
    l2_ratio            mean of |x_hat| / |x|          (below 1: shrinkage)
    relative_reconstruction_bias   mean |x_hat|^2 / mean x . x_hat
    frac_alive          share of the features that fired at all          dead_fraction = 1 - frac_alive
    freq_over_1_percent, freq_over_10_percent        share of the features that fire so often (dense)
    normalized_freq_over_...                         their share of all activations
    average_max_decoder_cosine_sim                   how alike an atom is to its nearest other atom

Names are SAEBench's (Karvonen et al. 2025), definitions too, with two exceptions, where its code (0.6)
differs from what it says: `explained_variance` takes the variance around the mean of all rows (as
SAELens does; SAEBench's code subtracts a mean of squares), and `mse` is not divided by the number of
tokens a second time. Intervals are bootstraps over documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import ShapeError
from actlas.core.intervals import Array, percentiles, resample_counts
from actlas.core.measurement import Better, Measurement
from actlas.dictionaries.evaluation.rows import Sample
from actlas.dictionaries.evaluation.similarity import max_cosine
from actlas.measure.samples import mean_measurement

_ROWS = 2048
EDGES = tuple(float(e) for e in np.arange(-6, 0.01, 0.5))  # log10 of the density


@dataclass(frozen=True)
class RowNumbers:
    """Numbers of each row, float64 `[n]`, and how often each feature fired in each document.

    Attributes:
        squared: `|x|^2`. error: `|x - x_hat|^2`. spread: `|x - m|^2`. made: `|x_hat|^2`.
        product: `x . x_hat`. l0, l1: number and summed magnitude of the active features.
        counts: int64 `[documents, features]`.
    """

    squared: Tensor
    error: Tensor
    spread: Tensor
    made: Tensor
    product: Tensor
    l0: Tensor
    l1: Tensor
    counts: Tensor


@torch.no_grad()
def row_numbers(lens: Dictionary, sample: Sample) -> RowNumbers:
    """Encode and decode all rows once.

    Raises:
        ShapeError: the dictionary writes to another site than it reads (a transcoder).
    """
    centre = sample.x.double().mean(0)
    parts: list[tuple[Tensor, ...]] = []
    counts = torch.zeros(sample.documents, lens.features, dtype=torch.int64)
    for start in range(0, len(sample), _ROWS):
        x = sample.x[start : start + _ROWS]
        codes = lens.encode(x)
        made = lens.decode(codes)
        if made.shape != x.shape:
            raise ShapeError(
                f"{type(lens).__name__} writes {made.shape[-1]} channels and reads {x.shape[-1]}; only a "
                "dictionary that reconstructs its own site is evaluated so"
            )
        wide, out = x.double(), made.double().cpu()
        parts.append(
            (
                wide.square().sum(1),
                (wide - out).square().sum(1),
                (wide - centre).square().sum(1),
                out.square().sum(1),
                (wide * out).sum(1),
                codes.l0.double().cpu(),
                codes.values.abs().sum(-1).double().cpu(),
            )
        )
        document = torch.from_numpy(sample.document[start : start + _ROWS])
        active = codes.active.cpu()
        place = document.unsqueeze(1).expand_as(active)[active] * lens.features + codes.indices.cpu()[active]
        counts += torch.bincount(place, minlength=counts.numel()).reshape(counts.shape)
    squared, error, spread, made, product, l0, l1 = (torch.cat(p) for p in zip(*parts, strict=True))
    return RowNumbers(squared, error, spread, made, product, l0, l1, counts)


def reconstruction_measurements(
    lens: Dictionary, sample: Sample, *, seed: int = 0, group: Mapping[str, str] | None = None
) -> list[Measurement]:
    """Return the metrics of the module's text.

    Args:
        lens: the dictionary.
        sample: rows that it was not trained on.
        seed: of the bootstrap.
        group: labels of the measurements.

    Raises:
        ShapeError: see `row_numbers`.
    """
    found = row_numbers(lens, sample)
    return [*_rows(found, sample, seed, group), *frequencies(lens, found.counts, sample, seed, group)]


def _rows(found: RowNumbers, sample: Sample, seed: int, group: Mapping[str, str] | None) -> list[Measurement]:
    ones = torch.ones_like(found.squared)
    length, made = found.squared.sqrt(), found.made.sqrt()
    note = f"{len(sample):,} tokens"
    if sample.left_out:
        note += f", {sample.left_out} massive rows left out"

    def ratio(name: str, unit: str, top: Tensor, bottom: Tensor, better: Better | None = None) -> Measurement:
        num, den = sample.sums(top), sample.sums(bottom)
        values = np.divide(num, den, out=np.zeros_like(num), where=den != 0)
        return mean_measurement(name, unit, values, den, seed=seed, better=better, group=group, note=note)

    def safe(top: Tensor, bottom: Tensor) -> Tensor:
        return torch.where(bottom > 0, top / bottom.clamp_min(1e-300), 0.0)

    return [
        ratio("l0", "features/token", found.l0, ones, "lower"),
        ratio("l1", "units of the codes", found.l1, ones),
        ratio("explained_variance", "fraction", found.spread - found.error, found.spread, "higher"),
        ratio("fvu", "fraction", found.error, found.spread, "lower"),
        ratio("mse", "squared units of the site", found.error, ones, "lower"),
        ratio("normalized_mse", "fraction", safe(found.error, found.squared), ones, "lower"),
        ratio("cossim", "cosine", safe(found.product, length * made), ones, "higher"),
        ratio("l2_ratio", "ratio", safe(made, length), ones),
        ratio("relative_reconstruction_bias", "ratio", found.made, found.product),
    ]


def frequencies(
    lens: Dictionary,
    counts: Tensor,
    sample: Sample,
    seed: int = 0,
    group: Mapping[str, str] | None = None,
) -> list[Measurement]:
    """Return how often features fire: alive, dead, dense, and the histogram of densities.

    Args:
        lens: the dictionary.
        counts: int `[documents, features]`, tokens at which each feature fired.
        sample: the rows behind them.
        seed: of the bootstrap.
        group: labels.
    """
    fired = counts.numpy().astype(np.float64)
    tokens = sample.sums(torch.ones(len(sample)))
    density = fired.sum(0) / tokens.sum()
    alive = float((density > 0).mean())
    note = f"a feature that did not fire in {len(sample):,} tokens fires less often than 1 in "
    note += f"{max(1, len(sample) // 3):,}, with 95% confidence"
    group, n = dict(group or {}), len(tokens)
    out = [
        Measurement("frac_alive", alive, "fraction", n, group=group, better="higher", note=note),
        Measurement("dead_fraction", 1 - alive, "fraction", n, group=group, better="lower", note=note),
    ]
    for percent in (1, 10):
        bound = percent / 100

        def dense(p: Array, bound: float = bound) -> Array:
            share: Array = (p > bound).mean(-1)
            return share

        def weighted(p: Array, bound: float = bound) -> Array:
            total = np.maximum(p.sum(-1), 1e-300)
            share: Array = np.where(p > bound, p, 0.0).sum(-1) / total
            return share

        for name, statistic in (
            (f"freq_over_{percent}_percent", dense),
            (f"normalized_freq_over_{percent}_percent", weighted),
        ):
            value = float(statistic(density))
            low, high = _interval(_over(fired, tokens, statistic), value, len(tokens), seed)
            out.append(
                Measurement(
                    name,
                    value,
                    "fraction",
                    n,
                    low,
                    high,
                    "bootstrap over documents, without its bias",
                    seed,
                    better="lower",
                    group=group,
                )
            )
    return [*out, _histogram(density, n, group), _alike(lens, group)]


def _interval(
    statistic: Callable[[Array], Array], value: float, n: int, seed: int
) -> tuple[float | None, float | None]:
    """Return a bootstrap interval around the value.

    Densities of drawn documents are more uneven than those of the whole, so more of them cross a bound; the
    draws are moved back by that bias.
    """
    if n < 2:
        return None, None
    draws = np.concatenate([statistic(c) for c in resample_counts(n, 1000, seed)])
    low, high = percentiles(np.clip(draws - draws.mean() + value, 0.0, 1.0), n)
    return low, high


def _over(
    fired: NDArray[np.float64], tokens: NDArray[np.float64], statistic: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """Return a statistic of the densities as a function of how often each document is drawn."""

    def of(draws: Array) -> Array:
        step = max(1, 4_000_000 // max(1, fired.shape[1]))
        blocks = (draws[i : i + step] for i in range(0, len(draws), step))
        return np.concatenate([statistic(b @ fired / (b @ tokens)[:, None]) for b in blocks])

    return of


def _histogram(density: NDArray[np.float64], n: int, group: dict[str, str]) -> Measurement:
    fires = density[density > 0]
    counts = np.histogram(np.log10(fires), bins=np.array([-np.inf, *EDGES[1:-1], np.inf]))[0]
    details = {"log10_edges": list(EDGES), "features": counts.tolist(), "silent": int((density == 0).sum())}
    value = float(np.median(fires)) if len(fires) else float("nan")
    return Measurement(
        "feature_density",
        value,
        "fraction of tokens",
        n,
        interval="none: the median over the features that fired; the histogram is in the details",
        group=group,
        details=details,
    )


def _alike(lens: Dictionary, group: dict[str, str]) -> Measurement:
    atoms = lens.atoms
    nearest = max_cosine(atoms, atoms, own=True).values.double().numpy() if len(atoms) > 1 else np.zeros(0)
    return mean_measurement(
        "average_max_decoder_cosine_sim", "cosine", nearest, over="features", group=group, better="lower"
    )
