"""Streaming statistics of activations: one pass over the rows, accumulated in float64.

Two kernels serve the calibration pass. `accumulate` adds rows `[n, d]` to per-channel power sums and
absolute maxima; `log_histogram` counts values in fixed logarithmic buckets, so that quantile sketches
made in parts merge exactly, by adding their counts (the bucketing of DDSketch, Masson et al. 2019, with
a fixed number of buckets instead of collapsing ones).

Both have a native version (C++, `actlas.kernels._native`) and a plain PyTorch reference, held together
by the tests. The native one takes CPU tensors of float32, bfloat16 and float16 (the last two are widened
to float32 in small chunks, which is exact); everything else, and an installation without a compiler,
takes the reference. Memory beyond the arguments is a few megabytes whatever the number of rows.

NaN in `accumulate` makes every statistic of its channel NaN. NaN in `log_histogram` is not counted, so
`counts.sum()` is the number of values that were numbers. Infinities fall into the outermost buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from actlas.kernels.loading import native as _native
from actlas.kernels.loading import threads as _threads

_CHUNK = 1 << 19  # elements widened at a time: 4 MB in float64, near the size of a cache
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def native_available() -> bool:
    """Return whether the compiled kernels are installed; without them the PyTorch reference is used."""
    return _native() is not None


# -- power sums -------------------------------------------------------------------------------------


def accumulate(
    rows: Tensor,
    sums: Tensor,
    squares: Tensor,
    absmax: Tensor,
    fourths: Tensor | None = None,
    thirds: Tensor | None = None,
) -> None:
    """Add rows to running per-channel statistics, in place.

    For each channel c: `sums += Σ x`, `squares += Σ x²`, `thirds += Σ x³`, `fourths += Σ x⁴` and
    `absmax = max(absmax, max |x|)`. Powers and sums are float64. The result does not depend on the
    number of threads.

    Args:
        rows: activations `[n, d]`, any real dtype and device; n may be 0. Not changed.
        sums, squares, absmax: float64 `[d]`, updated; start them at zero.
        fourths, thirds: float64 `[d]`, updated, or `None` to save their cost.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    state = {"sums": sums, "squares": squares, "absmax": absmax, "thirds": thirds, "fourths": fourths}
    _check_state(rows, state)
    native = _native()
    plain = all(t is None or _is_plain(t) for t in state.values())
    if native is None or not plain or not _fits_native(rows):
        accumulate_reference(rows, sums, squares, absmax, fourths, thirds)
        return
    arrays = [None if t is None else t.detach().numpy() for t in (sums, squares, absmax, thirds, fourths)]
    threads = _threads()
    for chunk in _float32_chunks(rows.detach()):
        native.accumulate(chunk.numpy(), *arrays, threads)


def accumulate_reference(
    rows: Tensor,
    sums: Tensor,
    squares: Tensor,
    absmax: Tensor,
    fourths: Tensor | None = None,
    thirds: Tensor | None = None,
) -> None:
    """Do what `accumulate` does, in plain PyTorch, on the device of `rows`."""
    for chunk in _chunks(rows.detach()):
        x = chunk.to(sums.device, torch.float64) if chunk.device.type == "mps" else chunk.to(torch.float64)
        x2 = x.square()
        sums += x.sum(0).to(sums.device)
        squares += x2.sum(0).to(sums.device)
        absmax.copy_(torch.maximum(absmax, x.abs().amax(0).to(absmax.device)))
        if thirds is not None:
            thirds += (x2 * x).sum(0).to(thirds.device)
        if fourths is not None:
            fourths += x2.square().sum(0).to(fourths.device)


def _check_state(rows: Tensor, state: dict[str, Tensor | None]) -> None:
    if rows.ndim != 2 or rows.is_complex():
        raise ValueError(f"rows must be a real [n, d] tensor, not {rows.dtype} {list(rows.shape)}")
    for name, tensor in state.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.float64 or tensor.shape != rows.shape[1:]:
            raise ValueError(
                f"{name} must be float64 [{rows.shape[1]}] to match rows {list(rows.shape)}, "
                f"not {tensor.dtype} {list(tensor.shape)}"
            )


# -- logarithmic histogram ----------------------------------------------------------------------------


def log_histogram(values: Tensor, counts: Tensor, gamma: float, smallest: float) -> None:
    """Count values in logarithmic buckets, in place.

    `counts` has `2B + 1` entries, ordered by value, so that a cumulative sum gives quantiles. With
    `k = position - B`:

    * `k = 0` (the middle) counts `|x| <= smallest`;
    * `k > 0` counts `smallest * gamma^(k-1) < x <= smallest * gamma^k`;
    * `k < 0` counts the negative values likewise, the most negative at position 0;
    * what lies beyond the outermost edge, infinities included, is counted in the outermost bucket;
    * NaN is not counted.

    The edges are rounded to float32 once and values are compared with them as float32, so the native
    version and the reference agree exactly, and so do sketches made on different machines.

    Args:
        values: any shape, dtype and device; taken as float32. Not changed.
        counts: int64 `[2B + 1]`, updated.
        gamma: ratio of neighbouring edges, > 1; the relative error of `bucket_value` is
            `(gamma - 1) / (gamma + 1)`, about 1% for 1.02.
        smallest: magnitude at and under which a value counts as zero, > 0.

    Raises:
        ValueError: `counts` or the bucket parameters do not fit.
    """
    half = _check_counts(counts)
    native = _native()
    if native is None or not _is_plain(counts) or not _fits_native(values):
        log_histogram_reference(values, counts, gamma, smallest)
        return
    buckets = _native_buckets(half, gamma, smallest)
    array = counts.numpy()
    threads = _threads()
    for chunk in _float32_chunks(values.detach()):
        buckets.add(chunk.reshape(-1).numpy(), array, threads)


def log_histogram_reference(values: Tensor, counts: Tensor, gamma: float, smallest: float) -> None:
    """Do what `log_histogram` does, in plain PyTorch, on the device of `values`."""
    half = _check_counts(counts)
    edges = torch.tensor(bucket_edges(half, gamma, smallest), device=values.device)
    for chunk in _chunks(values.detach()):
        x = chunk.reshape(-1).to(torch.float32)
        x = x[~x.isnan()]
        k = torch.searchsorted(edges, x.abs()).clamp_(max=half)
        position = half + torch.where(x < 0, -k, k)
        counts += torch.bincount(position, minlength=2 * half + 1).to(counts.device)


@overload
def bucket_value(index: int, gamma: float, smallest: float) -> float: ...
@overload
def bucket_value(index: Tensor, gamma: float, smallest: float) -> Tensor: ...
def bucket_value(index: int | Tensor, gamma: float, smallest: float) -> float | Tensor:
    """Return the value that stands for a bucket: within `(gamma - 1) / (gamma + 1)` of all in it.

    Args:
        index: signed bucket number `k = position - B`: 0 for the middle of `counts`, negative for
            negative values. An int, or an integer tensor of any shape.
        gamma, smallest: as given to `log_histogram`.

    Returns:
        `sign(k) * smallest * 2 gamma^|k| / (gamma + 1)`, and 0 for `k = 0`; float64.
    """
    scale = 2.0 * smallest / (gamma + 1.0)
    if isinstance(index, Tensor):
        return index.sign() * scale * torch.pow(gamma, index.abs().to(torch.float64))
    if index == 0:
        return 0.0
    return float(scale * gamma ** abs(index)) * (1 if index > 0 else -1)


@lru_cache(maxsize=16)
def bucket_edges(half: int, gamma: float, smallest: float) -> np.ndarray:
    """Return the upper edges of buckets 0 ... `half` as float32 `[half + 1]`; read-only, cached.

    Raises:
        ValueError: edges that float32 cannot hold or tell apart.
    """
    if not (gamma > 1.0 and smallest >= float(np.finfo(np.float32).tiny)):
        raise ValueError(f"gamma must be > 1 and smallest >= 1.2e-38, not gamma={gamma}, smallest={smallest}")
    with np.errstate(over="ignore"):
        exact = smallest * np.power(float(gamma), np.arange(half + 1, dtype=np.float64))
        edges = exact.astype(np.float32)
    if not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ValueError(
            f"{half} buckets of ratio {gamma} from {smallest} do not fit float32; "
            "use fewer buckets, or a ratio further from 1"
        )
    edges.setflags(write=False)
    return edges


@lru_cache(maxsize=16)
def _native_buckets(half: int, gamma: float, smallest: float) -> Any:
    native = _native()
    assert native is not None
    return native.LogBuckets(bucket_edges(half, gamma, smallest))


def _check_counts(counts: Tensor) -> int:
    if counts.dtype != torch.int64 or counts.ndim != 1 or counts.numel() % 2 == 0 or counts.numel() < 3:
        raise ValueError(
            "counts must be int64 [2B + 1] with B >= 1 buckets on each side, "
            f"not {counts.dtype} {list(counts.shape)}"
        )
    return counts.numel() // 2


# -- shared -------------------------------------------------------------------------------------------


def _fits_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.layout == torch.strided and x.dtype in _NATIVE_DTYPES


def _is_plain(state: Tensor) -> bool:
    return state.device.type == "cpu" and state.is_contiguous()


def _float32_chunks(x: Tensor) -> Iterable[Tensor]:
    """Return `x` itself when it is contiguous float32, else pieces of it converted one at a time."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return [x] if x.numel() else []
    return (chunk.to(torch.float32).contiguous() for chunk in _chunks(x))


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """Yield slices of `x` along its first dimension, of about `_CHUNK` elements each."""
    if x.ndim == 0:
        x = x.reshape(1)
    if x.numel() == 0:
        return
    step = max(1, _CHUNK * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]
