"""Sparse codes: k active latents of m a row, so that only the encoder's forward product is dense.

A TopK dictionary writes a row as `x_i ≈ Σ_j v_ij W[idx_ij] + b` with k of m latents active. All that
follows from the codes is then k/m of the dense work:

* `topk` picks the active latents of the pre-activations `[n, m]`;
* `sparse_decode` is `v @ W`: `y_i = Σ_j v_ij W[idx_ij]`;
* `gather_dot` is the gradient with respect to the values: `g_ij = <e_i, W[idx_ij]>`;
* `scatter_outer` is a weight gradient: `G[l] += Σ_(i,j: idx_ij = l) c_ij rows_i`, one row per latent;
* `adam_rows` is the optimizer, told which rows have a gradient; `fused_step` does both at once;
* `matching_pursuit` finds signed codes for a dictionary of atoms;
* `gather_rows` takes scattered rows out of a memory map.

Each has a native version (C++, `actlas.kernels._native`) and a plain PyTorch reference, `*_reference`,
held together by the tests. The native ones take float32 on the CPU; on CUDA there are Triton kernels for
some (`triton_sparse_codes`); everything else takes the reference. Results do not depend on the number
of threads. Source of the sparse TopK step: Gao et al. 2024, "Scaling and evaluating sparse
autoencoders", appendix D (the kernels are for CUDA there).
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.kernels.gather import gather_rows, gather_rows_reference
from actlas.kernels.loading import cuda_kernels, takes_rows, takes_whole, threads
from actlas.kernels.loading import native as _native
from actlas.kernels.pursuit import matching_pursuit, matching_pursuit_reference
from actlas.kernels.row_steps import adam_rows, adam_rows_reference

__all__ = [
    "topk",
    "topk_reference",
    "sparse_decode",
    "sparse_decode_reference",
    "gather_dot",
    "gather_dot_reference",
    "scatter_outer",
    "scatter_outer_reference",
    "adam_rows",
    "adam_rows_reference",
    "matching_pursuit",
    "matching_pursuit_reference",
    "gather_rows",
    "gather_rows_reference",
]

_CHUNK = 1 << 22  # elements of a temporary at a time, 16 MB in float32


# -- top k ----------------------------------------------------------------------------------------------


def topk(x: Tensor, k: int, relu: bool = True) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row, the largest first; of equal ones, the first.

    NaN counts as larger than every number, as in `torch.topk`, so that it shows in the values.

    Args:
        x: `[n, m]`, any float dtype; n may be 0.
        k: how many, `1 <= k <= m`.
        relu: replace negative values by 0, which means "not active" in a code.

    Returns:
        `values [n, k]` of the dtype of `x` and `indices [n, k]` int64.

    Raises:
        ValueError: a shape, dtype or k that does not fit.
    """
    _check_topk(x, k)
    native = _native()
    low = x.dtype == torch.bfloat16
    if native is None or not takes_rows(x, low=low):
        return topk_reference(x, k, relu)
    x = x.detach()
    values = torch.empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    if low:
        native.topk_bfloat16(x.view(torch.uint16).numpy(), relu, values.numpy(), indices.numpy(), threads())
        return values.to(x.dtype), indices
    native.topk(x.numpy(), relu, values.numpy(), indices.numpy(), threads())
    return values, indices


def topk_reference(x: Tensor, k: int, relu: bool = True) -> tuple[Tensor, Tensor]:
    """Do what `topk` does, in plain PyTorch, on the device of `x`."""
    _check_topk(x, k)
    x = x.detach()
    values, indices = x.topk(k, dim=1)
    if len(x):
        # Which of the entries equal to the k-th value are taken is left open by torch: put those rows right.
        last = values[:, -1:]
        same = (x == last).sum(1) != (values == last).sum(1)
        same |= x.isnan().sum(1) > values.isnan().sum(1)
        if same.any():
            fixed = x[same].sort(dim=1, descending=True, stable=True)
            values[same], indices[same] = fixed.values[:, :k], fixed.indices[:, :k]
        by_index = indices.argsort(dim=1)
        values, indices = values.gather(1, by_index), indices.gather(1, by_index)
        by_value = values.argsort(dim=1, descending=True, stable=True)
        values, indices = values.gather(1, by_value), indices.gather(1, by_value)
    return (values.relu() if relu else values), indices


def _check_topk(x: Tensor, k: int) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a float [n, m] tensor, not {x.dtype} {list(x.shape)}")
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k must be between 1 and the width {x.shape[1]}, not {k}")


# -- decoder --------------------------------------------------------------------------------------------


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Return `y_i = Σ_j values_ij weight[indices_ij]`.

    Args:
        indices: int64 `[n, k]`; an index may occur twice in a row.
        values: `[n, k]`; entries of value 0 add nothing.
        weight: `[m, d]`, one row a latent.

    Returns:
        `[n, d]` of the dtype of `weight`.

    Raises:
        ValueError: shapes that do not fit, or an index outside 0 ... m - 1.
    """
    _check_codes(indices, values, len(weight), "values")
    _check_rows(weight, "weight")
    if (cuda := cuda_kernels(weight, values)) is not None:
        return cuda.sparse_decode(indices, values.detach(), weight.detach())  # type: ignore[no-any-return]
    native = _native()
    if native is None or not takes_rows(values, weight):
        return sparse_decode_reference(indices, values, weight)
    out = torch.empty(len(indices), weight.shape[1])
    native.sparse_decode(
        indices.contiguous().numpy(),
        values.detach().contiguous().numpy(),
        weight.detach().numpy(),
        out.numpy(),
        threads(),
    )
    return out


def sparse_decode_reference(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Do what `sparse_decode` does, in plain PyTorch, on the device of `weight`."""
    _check_codes(indices, values, len(weight), "values")
    _check_rows(weight, "weight")
    weight = weight.detach()
    if indices.numel() == 0:
        return weight.new_zeros(len(indices), weight.shape[1])
    values = values.detach().to(weight.dtype)
    return torch.nn.functional.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def gather_dot(indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return `g_ij = <rows_i, weight[indices_ij]>`, the gradient with respect to the values of a code.

    Args:
        indices: int64 `[n, k]`.
        rows: `[n, d]`.
        weight: `[m, d]`.

    Returns:
        `[n, k]` of the dtype of `rows`.

    Raises:
        ValueError: shapes that do not fit, or an index outside 0 ... m - 1.
    """
    _check_dot(indices, rows, weight)
    if (cuda := cuda_kernels(rows, weight)) is not None:
        return cuda.gather_dot(indices, rows.detach(), weight.detach())  # type: ignore[no-any-return]
    native = _native()
    if native is None or not takes_rows(rows, weight):
        return gather_dot_reference(indices, rows, weight)
    out = torch.empty(indices.shape)
    native.gather_dot(
        indices.contiguous().numpy(),
        rows.detach().numpy(),
        weight.detach().numpy(),
        out.numpy(),
        threads(),
    )
    return out


def gather_dot_reference(indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Do what `gather_dot` does, in plain PyTorch, on the device of `rows`."""
    _check_dot(indices, rows, weight)
    rows, weight = rows.detach(), weight.detach()
    out = rows.new_empty(indices.shape)
    step = max(1, _CHUNK // max(1, indices.shape[1] * rows.shape[1]))
    for start in range(0, len(rows), step):
        at = slice(start, start + step)
        out[at] = torch.einsum("nd,nkd->nk", rows[at], weight[indices[at]].to(rows.dtype))
    return out


# -- weight gradients -----------------------------------------------------------------------------------


def scatter_outer(
    indices: Tensor, coefficients: Tensor, rows: Tensor, m: int, out: Tensor | None = None
) -> Tensor:
    """Return `out[l] + Σ coefficients_ij rows_i` over all (i, j) with `indices_ij = l`.

    With the values and the error's gradient this is the decoder's gradient; with the gradient of the
    values and the input it is the encoder's.

    Args:
        indices: int64 `[n, k]`.
        coefficients: `[n, k]`; entries of 0 add nothing.
        rows: `[n, d]`.
        m: number of latents, rows of the result.
        out: `[m, d]` to add to in place; `None` starts from zero.

    Returns:
        `[m, d]`: `out`, or a new tensor of the dtype of `rows`.

    Raises:
        ValueError: shapes that do not fit, or an index outside 0 ... m - 1.
    """
    check_outer(indices, coefficients, rows, m, out)
    native = _native()
    if (cuda := cuda_kernels(rows, coefficients)) is not None and (out is None or out.is_contiguous()):
        return cuda.scatter_outer(indices, coefficients.detach(), rows.detach(), m, out)  # type: ignore[no-any-return]
    plain = takes_rows(coefficients, rows) and (out is None or takes_whole(out))
    if native is None or not plain:
        return scatter_outer_reference(indices, coefficients, rows, m, out)
    result = torch.empty(m, rows.shape[1]) if out is None else out
    native.scatter_outer(
        indices.contiguous().numpy(),
        coefficients.detach().contiguous().numpy(),
        rows.detach().numpy(),
        result.detach().numpy(),
        out is not None,
        threads(),
    )
    return result


def scatter_outer_reference(
    indices: Tensor, coefficients: Tensor, rows: Tensor, m: int, out: Tensor | None = None
) -> Tensor:
    """Do what `scatter_outer` does, in plain PyTorch, on the device of `rows`."""
    check_outer(indices, coefficients, rows, m, out)
    rows, coefficients = rows.detach(), coefficients.detach().to(rows.dtype)
    if out is None:
        out = rows.new_zeros(m, rows.shape[1])
    step = max(1, _CHUNK // max(1, indices.shape[1] * rows.shape[1]))
    for start in range(0, len(rows), step):
        at = slice(start, start + step)
        outer = coefficients[at].unsqueeze(-1) * rows[at].unsqueeze(1)
        out.index_add_(0, indices[at].reshape(-1), outer.reshape(-1, rows.shape[1]).to(out.dtype))
    return out


# -- checks ---------------------------------------------------------------------------------------------


def _check_codes(indices: Tensor, values: Tensor, m: int, name: str) -> None:
    if indices.dtype != torch.int64 or indices.ndim != 2:
        raise ValueError(f"indices must be int64 [n, k], not {indices.dtype} {list(indices.shape)}")
    if values.shape != indices.shape or not values.is_floating_point():
        raise ValueError(
            f"{name} must be float {list(indices.shape)} to match indices, "
            f"not {values.dtype} {list(values.shape)}"
        )
    _check_range(indices, m)


def _check_range(indices: Tensor, m: int) -> None:
    if indices.numel():
        low, high = indices.aminmax()
        if low < 0 or high >= m:
            raise ValueError(f"indices must lie in 0 ... {m - 1}, not {int(low)} ... {int(high)}")


def _check_rows(rows: Tensor, name: str) -> None:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(f"{name} must be a float matrix, not {rows.dtype} {list(rows.shape)}")


def _check_dot(indices: Tensor, rows: Tensor, weight: Tensor) -> None:
    _check_rows(rows, "rows")
    _check_rows(weight, "weight")
    if indices.dtype != torch.int64 or indices.ndim != 2 or len(indices) != len(rows):
        raise ValueError(
            f"indices must be int64 [{len(rows)}, k] to match rows, not {indices.dtype} {list(indices.shape)}"
        )
    if rows.shape[1] != weight.shape[1]:
        raise ValueError(f"weight must be [m, {rows.shape[1]}] to match rows, not {list(weight.shape)}")
    _check_range(indices, len(weight))


def check_outer(indices: Tensor, coefficients: Tensor, rows: Tensor, m: int, out: Tensor | None) -> None:
    _check_codes(indices, coefficients, m, "coefficients")
    _check_rows(rows, "rows")
    if len(indices) != len(rows):
        raise ValueError(f"rows must be [{len(indices)}, d] to match indices, not {list(rows.shape)}")
    if out is not None and (out.shape != (m, rows.shape[1]) or not out.is_floating_point()):
        raise ValueError(f"out must be float [{m}, {rows.shape[1]}], not {out.dtype} {list(out.shape)}")
