"""Take scattered rows out of a large matrix, such as a memory-mapped shard, as float32."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from actlas.kernels.loading import native as _native
from actlas.kernels.loading import threads

Rows: TypeAlias = "np.ndarray[Any, Any] | Tensor"


def gather_rows(
    source: Rows,
    indices: Rows,
    out: Tensor | None = None,
    *,
    scales: Rows | None = None,
    workers: int | None = None,
    checked: bool = False,
) -> Tensor:
    """Return `source[indices]` as float32, times `scales[indices]` if there are any.

    Args:
        source: `[n, d]`, a NumPy array, memory map or CPU tensor of float32, float16, bfloat16 or int8. A
            NumPy array of uint16 holds the bits of bfloat16, which NumPy has no name for.
        indices: int64 `[rows]`, each in 0 ... n - 1, in any order, repeats allowed.
        out: contiguous float32 `[rows, d]` to fill; `None` makes one.
        scales: float32 `[n]` or `[n, 1]`, a factor for each row (int8 stores).
        workers: threads to use; `None`: as many as the other kernels.
        checked: the caller knows that the indices are int64 and inside the source.

    Returns:
        float32 `[rows, d]`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an index outside the source.
    """
    at = indices if checked and isinstance(indices, Tensor) else _check_indices(indices, source)
    native, held = _native(), _held(source)
    if native is None or held is None:
        return gather_rows_reference(source, at, out, scales=scales)
    array, number = held
    # NumPy asks the system for large pages, which are filled in half the time.
    result = torch.from_numpy(np.empty((len(at), array.shape[1]), np.float32)) if out is None else out
    _check_out(result, torch.Size((len(at), array.shape[1])))
    factors = None if scales is None else _factors(scales, len(array))
    count = threads() if workers is None else workers
    native.gather_rows(array, number, factors, at.contiguous().numpy(), result.detach().numpy(), count)
    return result


def gather_rows_reference(
    source: Rows,
    indices: Rows,
    out: Tensor | None = None,
    *,
    scales: Rows | None = None,
) -> Tensor:
    """Do what `gather_rows` does, in plain NumPy and PyTorch."""
    at = _check_indices(indices, source)
    rows = _take(source, at)
    if scales is not None:
        factors = torch.from_numpy(_factors(scales, len(source))[at.numpy()])
        rows = rows * factors.reshape(-1, 1).to(rows.device)
    if out is None:
        return rows
    _check_out(out, rows.shape)
    return out.copy_(rows)


def _held(source: Rows) -> tuple[np.ndarray[Any, Any], str] | None:
    """Return the source as an array and the name of its numbers, or `None` if it is not for the kernel."""
    if isinstance(source, Tensor):
        if source.device.type != "cpu" or source.layout != torch.strided:
            return None
        number = str(source.dtype).removeprefix("torch.")
        source = source.detach()
        array = (source.view(torch.int16) if number == "bfloat16" else source).numpy()
    else:
        number = "bfloat16" if source.dtype == np.uint16 else source.dtype.name
        array = source.view(np.uint16) if number == "bfloat16" else source
    if number not in ("float32", "float16", "bfloat16", "int8") or not array.dtype.isnative:
        return None
    width = array.itemsize
    plain = array.strides[0] >= 0 and array.strides[0] % width == 0 and array.strides[1] == width
    return (array, number) if plain else None


def _factors(scales: Rows, n: int) -> np.ndarray[Any, Any]:
    array = scales.detach().cpu().numpy() if isinstance(scales, Tensor) else np.asarray(scales)
    if array.shape not in ((n,), (n, 1)):
        raise ValueError(f"scales must be [{n}] to match the source, not {list(array.shape)}")
    return np.ascontiguousarray(array.reshape(n), dtype=np.float32)


def _take(source: Rows, at: Tensor) -> Tensor:
    if isinstance(source, Tensor):
        return source.detach().index_select(0, at.to(source.device)).to(torch.float32)
    rows = torch.from_numpy(np.take(source, at.numpy(), axis=0))
    if source.dtype == np.uint16:
        rows = rows.view(torch.bfloat16)
    return rows.to(torch.float32)


def _check_indices(indices: Rows, source: Rows) -> Tensor:
    if source.ndim != 2:
        raise ValueError(f"source must be [n, d], not {list(source.shape)}")
    at = torch.as_tensor(indices)
    if at.ndim != 1 or (at.numel() and at.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"indices must be int64 [rows], not {at.dtype} {list(at.shape)}")
    at = at.to(torch.int64)
    if at.numel():
        low, high = at.aminmax()
        if low < 0 or high >= len(source):
            raise ValueError(f"indices must lie in 0 ... {len(source) - 1}, not {int(low)} ... {int(high)}")
    return at


def _check_out(out: Tensor, shape: torch.Size) -> None:
    if out.dtype != torch.float32 or out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32 {list(shape)}, not {out.dtype} {list(out.shape)}")
