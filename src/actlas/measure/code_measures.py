"""Measures on activation codes: are they one to a sample, and near each other within a class?

    redundancy(codes) -> Measurement                     redundancy_ratio(codes) -> float
    code_categorisation(train, train_labels, test, test_labels, *, methods=...) -> list[Measurement]
    hamming(a, b) -> distances                           nearest(a, b, k) -> (indices, distances)
    linear_region_diameter(model, x, *, step=0.05, reach=5.0, seed=0) -> Measurement
    gate_code_neighbours(model, corpus, *, site, tokens=2048) -> list[Measurement]

Codes, and the paper, are in `codes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure.codes import ActivationCode, Bits, Packed, unpack
from actlas.measure.reading import read
from actlas.measure.statistics import bootstrap_mean, wilson

if TYPE_CHECKING:
    from actlas.core.model import Model

METHODS = ("kmeans", "knn", "logistic")


def redundancy_ratio(codes: Packed | Bits) -> float:
    """Return (samples - distinct codes) / samples; 0 means that every sample has its own code."""
    if not len(codes):
        raise InputError("no codes: the redundancy ratio needs at least one sample")
    return 1 - len(np.unique(_as_bytes(codes), axis=0)) / len(codes)


def redundancy(codes: Packed | Bits, name: str = "code-redundancy") -> Measurement:
    """Return the redundancy ratio as a measurement, with Wilson's interval of the repeated samples.

    It grows with the number of samples: compare only at equal `n`.
    """
    n = len(codes)
    value = redundancy_ratio(codes)
    low, high = wilson(round(value * n), n)
    return Measurement(
        name,
        value,
        "fraction",
        n,
        low,
        high,
        "wilson",
        better="lower",
        note="depends on n: compare at equal n",
    )


def hamming(a: Packed, b: Packed) -> NDArray[np.int32]:
    """Return Hamming distances between packed codes, [len(a), len(b)]."""
    if a.shape[1] != b.shape[1]:
        raise InputError(f"codes of {a.shape[1]} and {b.shape[1]} bytes cannot be compared")
    out = np.zeros((len(a), len(b)), dtype=np.int32)
    rows = max(1, 8_000_000 // max(1, b.size))
    for start in range(0, len(a), rows):
        differs = a[start : start + rows, None, :] ^ b[None]
        out[start : start + rows] = np.bitwise_count(differs).sum(-1, dtype=np.int32)
    return out


def nearest(a: Packed, b: Packed, k: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the `k` nearest codes of `b` for each of `a` (ties by index), and their distances."""
    if not 1 <= k <= len(b):
        raise InputError(f"k must lie between 1 and the {len(b)} codes to choose from, not {k}")
    distances = hamming(a, b)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, 1)


def code_categorisation(
    train: Packed,
    train_labels: ArrayLike,
    test: Packed,
    test_labels: ArrayLike,
    *,
    width: int | None = None,
    methods: Sequence[str] = METHODS,
    k: int = 9,
    seed: int = 0,
) -> list[Measurement]:
    """Return how well codes alone tell the classes apart, for each method, on the test codes.

    Args:
        train, test: packed codes from one fitted ActivationCode.
        train_labels, test_labels: integer classes, [n].
        width: bits of a code; all bits of its bytes if missing (the padding is constant).
        methods: `"kmeans"` (one cluster a class, matched one to one on the training codes; also gives
            its purity), `"knn"` (Hamming distance, majority of `k`, ties to the nearer), `"logistic"`
            (one against one).
        k: neighbours.
        seed: seed of K-means.

    Raises:
        InputError: an unknown method, or labels that do not fit the codes.
    """
    y, z = np.asarray(train_labels), np.asarray(test_labels)
    if len(y) != len(train) or len(z) != len(test):
        raise InputError(f"{len(train)} and {len(test)} codes need as many labels, not {len(y)} and {len(z)}")
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise InputError(f"unknown method {unknown[0]!r}: one of {', '.join(METHODS)}")
    bits = width or 8 * train.shape[1]
    x, t = unpack(train, bits).astype(np.float32), unpack(test, bits).astype(np.float32)
    out = []
    if "kmeans" in methods:
        hits, purity = _kmeans(x, y, t, z, seed)
        out += [_rate("code-kmeans-accuracy", hits, seed), _rate("code-kmeans-purity", purity, seed)]
    if "knn" in methods:
        out.append(_rate("code-knn-accuracy", _vote(nearest(test, train, k)[0], y) == z))
    if "logistic" in methods:
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsOneClassifier

        fitted = OneVsOneClassifier(LogisticRegression(max_iter=500)).fit(x, y)
        out.append(_rate("code-logistic-accuracy", fitted.predict(t) == z))
    return out


def _kmeans(x: Any, y: Any, t: Any, z: Any, seed: int) -> tuple[Bits, Bits]:
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    classes = np.unique(y)
    model = KMeans(len(classes), n_init=10, random_state=seed).fit(x)
    table = np.array(
        [[np.sum((model.labels_ == c) & (y == k)) for k in classes] for c in range(len(classes))]
    )
    cluster, label = linear_sum_assignment(-table)
    name_of = np.empty(len(classes), dtype=classes.dtype)
    name_of[cluster] = classes[label]
    found = model.predict(t)
    majority = np.zeros(len(z), dtype=bool)
    for c in np.unique(found):
        inside = found == c
        values, counts = np.unique(z[inside], return_counts=True)
        majority[inside] = z[inside] == values[counts.argmax()]
    return name_of[found] == z, majority


def _vote(neighbours: NDArray[np.int64], labels: NDArray[Any]) -> NDArray[Any]:
    classes, codes = np.unique(labels, return_inverse=True)
    picked = codes[neighbours]
    votes = np.stack([(picked == c).sum(1) for c in range(len(classes))], 1).astype(float)
    first = np.stack(
        [np.where((picked == c).any(1), (picked == c).argmax(1), 10**6) for c in range(len(classes))], 1
    )
    return classes[np.lexsort((first, -votes), axis=1)[:, 0]]


def _rate(name: str, hits: Bits, seed: int | None = None) -> Measurement:
    low, high = wilson(int(hits.sum()), len(hits))
    return Measurement(
        name, float(hits.mean()), "fraction", len(hits), low, high, "wilson", seed, better="higher",
        samples=hits.astype(float),
    )  # fmt: skip


def linear_region_diameter(
    model: Model | nn.Module,
    x: Tensor,
    *,
    sites: str | Sequence[str] = "relu",
    threshold: float | None = None,
    step: float = 0.05,
    reach: float = 5.0,
    seed: int = 0,
) -> Measurement:
    """Return the mean width of the linear regions around samples, along one random direction each.

    From each sample both ways in steps of `step` until the code changes or `reach` is passed ("average
    stochastic activation diameter"); the value is steps that keep the code, times `step`.

    Args:
        model: what makes the codes; all units count here, constant ones too.
        x: samples, float [n, ...].
        sites, threshold: as of `ActivationCode`.
        step, reach: in units of the input's norm.
        seed: seed of the directions.
    """
    if not 0 < step <= reach:
        raise InputError(f"step must be positive and at most reach={reach}, not {step}")
    code = ActivationCode(model, sites, threshold)
    home = code.encode(x)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    norms = directions.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
    directions = (directions / norms).to(x)
    steps = np.zeros(len(x))
    for sign in (1.0, -1.0):
        inside = np.arange(len(x))
        for i in range(1, round(reach / step) + 1):
            if not len(inside):
                break
            there = torch.from_numpy(inside)
            moved = code.encode(x[there] + sign * i * step * directions[there])
            inside = inside[(moved == home[inside]).all(1)]
            steps[inside] += 1
    widths = steps * step
    low, high = bootstrap_mean(widths, seed=seed)
    return Measurement(
        "linear-region-diameter", float(widths.mean()), "input units", len(x), low, high,
        "bootstrap over samples", seed, details={"step": step, "reach": reach}, samples=widths,
    )  # fmt: skip


def gate_code_neighbours(
    model: Model,
    corpus: Any,
    *,
    site: str,
    threshold: float = 0.0,
    tokens: int = 2048,
    per_document: int = 128,
) -> list[Measurement]:
    """Return redundancy of token codes in context, and how often the nearest code is the same token.

    Args:
        model: a language model.
        corpus: documents to read.
        site: e.g. `"blocks.15.mlp.gate"`; its bits are `activation > threshold`.
        tokens: how many token positions to code; per_document: of one document, about.

    Returns:
        `code-redundancy`, and `code-neighbour-same-token`, whose baseline is the rate of two random
        positions that hold the same token.
    """
    codes, ids = [], []
    for trace in read(model, corpus, site, tokens=tokens, context=256, per_document=per_document):
        assert trace.tokens is not None and trace.mask is not None
        codes.append(np.packbits((trace.rows(site) > threshold).flatten(1).cpu().numpy(), axis=1))
        ids.append(trace.tokens[trace.mask].cpu().numpy())
    code, token = np.concatenate(codes), np.concatenate(ids)
    distances = hamming(code, code)
    np.fill_diagonal(distances, np.iinfo(np.int32).max)
    same = token[distances.argmin(1)] == token
    counts = np.unique(token, return_counts=True)[1]
    n = len(token)
    chance = float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else float("nan")
    base = Measurement("same-token-by-chance", chance, "fraction", n, note="two random positions")
    low, high = wilson(int(same.sum()), n)
    return [
        redundancy(code),
        Measurement(
            "code-neighbour-same-token",
            float(same.mean()),
            "fraction",
            n,
            low,
            high,
            "wilson",
            baseline=base,
        ),
    ]


def _as_bytes(codes: Packed | Bits) -> Packed:
    return np.packbits(codes, axis=1) if codes.dtype == np.bool_ else codes  # type: ignore[return-value]
