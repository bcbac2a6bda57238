"""Frechet distance between two sets of samples, with the distance of real data from itself beside it.

Both sets are taken as normal distributions over their features (here the pixels themselves):

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})

(Frechet 1957; Heusel et al. 2017 use features of an image classifier, which 8 x 8 pixels do not need). The
estimate is biased upwards for small sets, more so the more features there are, so it is compared with its
floor: the distance between random halves of the real data. Covariances get a ridge of `ridge` times their
mean variance, so that pixels that never change do no harm.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.measurement import Measurement


def frechet_distance(a: Float[Tensor, "n ..."], b: Float[Tensor, "m ..."], *, ridge: float = 1e-4) -> float:
    """Return the squared Frechet distance of two sets of samples.

    Args:
        a, b: samples in the first axis; all other axes are features. At least two samples each.
        ridge: share of the mean variance that is added to both covariances' diagonals.

    Raises:
        InputError: too few samples, or other features.
        NonFiniteError: NaN or infinite values.
    """
    x, y = _rows(a, "the first set"), _rows(b, "the second set")
    if x.shape[1] != y.shape[1]:
        raise InputError(f"the sets have {x.shape[1]} and {y.shape[1]} features; they must have as many")
    cx, cy = _covariance(x, ridge), _covariance(y, ridge)
    values, vectors = torch.linalg.eigh(cx)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cy @ root).clamp_min(0).sqrt().sum()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    return float(gap + cx.trace() + cy.trace() - 2 * shared)


def frechet_measurement(
    samples: Tensor,
    real: Tensor,
    *,
    name: str = "frechet-distance",
    seed: int = 0,
    resamples: int = 100,
    group: dict[str, str] | None = None,
    note: str = "",
) -> Measurement:
    """Return the distance of samples to real data, its interval and the real-against-real floor.

    The interval is that of the distance with samples drawn with replacement, shifted by the bias that drawing
    adds (basic bootstrap on the samples; the real data stay). The floor is the mean distance of 20 random
    halvings of the real data; it is the measurement's `baseline`.

    Args:
        samples, real: `[n, ...]` and `[m, ...]`.
        name, group, note: of the measurement.
        seed, resamples: of the bootstrap.
    """
    value = frechet_distance(samples, real)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(resamples):
        rows = torch.randint(len(samples), (len(samples),), generator=generator)
        drawn.append(frechet_distance(samples[rows], real))
    low, high = np.quantile(drawn, [0.025, 0.975]) - (float(np.mean(drawn)) - value)
    return Measurement(
        name,
        value,
        "squared pixel units",
        len(samples),
        float(low),
        float(high),
        "bootstrap over samples",
        seed=seed,
        group=group or {},
        better="lower",
        note=note,
        baseline=frechet_floor(real, seed=seed),
    )


def frechet_floor(real: Tensor, *, halvings: int = 20, seed: int = 0) -> Measurement:
    """Return the distance between random halves of the real data: what a perfect sampler would reach."""
    if len(real) < 4:
        raise InputError(f"a floor needs 4 or more real samples, not {len(real)}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(halvings):
        order = torch.randperm(len(real), generator=generator)
        half = len(real) // 2
        found.append(frechet_distance(real[order[:half]], real[order[half : 2 * half]]))
    low, high = np.quantile(found, [0.025, 0.975])
    return Measurement(
        "frechet-distance of real halves",
        float(np.mean(found)),
        "squared pixel units",
        halvings,
        float(low),
        float(high),
        "random halvings",
        seed=seed,
        better="lower",
    )


def _rows(x: Tensor, name: str) -> Tensor:
    if x.ndim < 2 or len(x) < 2:
        raise InputError(f"{name} has shape {list(x.shape)}; it must hold two or more samples with features")
    rows = x.detach().double().flatten(1)
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError(f"{name} holds NaN or infinite values; all must be finite")
    return rows


def _covariance(x: Tensor, ridge: float) -> Tensor:
    c = torch.atleast_2d(torch.cov(x.T))
    return c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
