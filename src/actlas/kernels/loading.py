"""Find the compiled kernels, and say which tensors they take."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

_MOST_THREADS = 2  # the kernels are bound by memory bandwidth; more threads do not make them faster


@lru_cache(maxsize=1)
def native() -> ModuleType | None:
    """Return the compiled module `actlas.kernels._native`, or `None` where nothing could be compiled."""
    try:
        return import_module("actlas.kernels._native")
    except ImportError:
        return None


def threads() -> int:
    """Return how many threads a native kernel may use: at most two, fewer if torch is told so."""
    return min(torch.get_num_threads(), _MOST_THREADS)


def _plain_rows(t: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    plain = t.dtype == dtype and t.layout == torch.strided and t.ndim == 2
    return plain and (t.shape[1] <= 1 or t.stride(1) == 1) and t.stride(0) >= 0


def takes_rows(*matrices: Tensor, low: bool = False) -> bool:
    """Return whether these are float32 (`low`: bfloat16) matrices on the CPU with contiguous rows."""
    dtype = torch.bfloat16 if low else torch.float32
    return all(t.device.type == "cpu" and _plain_rows(t, dtype) for t in matrices)


def takes_whole(*tensors: Tensor) -> bool:
    """Return whether these are contiguous float32 tensors on the CPU, to be changed in place."""
    return all(
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.layout == torch.strided
        and t.is_contiguous()
        for t in tensors
    )


def cuda_kernels(*matrices: Tensor) -> ModuleType | None:
    """Return the Triton kernels if these are float32 matrices with contiguous rows on one CUDA device."""
    device = matrices[0].device
    if device.type != "cuda" or any(t.device != device or not _plain_rows(t) for t in matrices):
        return None
    return _triton()


@lru_cache(maxsize=1)
def triton_products() -> ModuleType | None:
    """Return the Triton products for CUDA tensors, where Triton is installed and not switched off."""
    if os.environ.get("ACTLAS_TRITON") == "0":
        return None
    try:
        return import_module("actlas.kernels.triton_products")
    except ImportError:
        return None


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    if os.environ.get("ACTLAS_TRITON") == "0":
        return None
    try:
        return import_module("actlas.kernels.triton_sparse_codes")
    except ImportError:
        return None
