"""The whole update of a sparse dictionary's weight matrix in one pass over its rows.

For each latent l, while its row is in cache:

    g = Σ_(i,j: idx_ij = l) c_ij rows_i  (+ its row of `extra`)
    g -= <g, w> w / <w, w>                                if `remove_parallel`
    Adam on w with the gradient `gradient_scale * g`      see `row_steps`
    w /= |w|                                              if `renormalise`

That is `scatter_outer`, the projection, `adam_rows` and the renormalisation without ever writing the
matrix of gradients. `gradient_norm` gives its norm beforehand, for clipping by the global norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from actlas.kernels.loading import native as _native
from actlas.kernels.loading import takes_rows, takes_whole, threads
from actlas.kernels.row_steps import adam_constants, adam_rows_reference, check_state
from actlas.kernels.sparse_codes import check_outer, scatter_outer_reference

Extra = tuple[Tensor, Tensor]


def fused_row_step(
    parameter: Tensor,
    m: Tensor,
    v: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    gradient_scale: float = 1.0,
    lazy: bool = False,
    remove_parallel: bool = False,
    renormalise: bool = False,
    extra: Extra | None = None,
) -> None:
    """Compute the gradient of a weight matrix from sparse codes and do one step of Adam, in place.

    Args:
        parameter: `[latents, d]`.
        m, v: Adam's moments, `[latents, d]`; they start at zero.
        indices: int64 `[n, k]`.
        coefficients: `[n, k]`: the codes (decoder) or the gradient with respect to them (encoder).
        rows: `[n, d]`: the gradient with respect to the reconstruction (decoder) or the input (encoder).
        step, lr, beta1, beta2, eps, lazy, gradient_scale: see `adam_rows`; which rows are touched is found
            here.
        remove_parallel: take the part along a row out of its gradient, before `gradient_scale`.
        renormalise: bring the rows to unit norm after the step.
        extra: latents, int64 `[r]` without repeats, and a gradient `[r, d]` to add at them (an auxiliary
            loss on dead latents).

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    _check(parameter, indices, coefficients, rows, extra)
    check_state(parameter, parameter, m, v, step, None)
    native = _native()
    if native is None or not _takes(parameter, coefficients, rows, extra) or not takes_whole(m, v):
        fused_row_step_reference(
            parameter, m, v, indices, coefficients, rows, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            gradient_scale=gradient_scale, lazy=lazy, remove_parallel=remove_parallel,
            renormalise=renormalise, extra=extra,
        )  # fmt: skip
        return
    native.fused_row_step(
        parameter.detach().numpy(),
        m.detach().numpy(),
        v.detach().numpy(),
        *_arrays(indices, coefficients, rows, extra),
        lazy,
        remove_parallel,
        renormalise,
        *adam_constants(step, lr, beta1, beta2, eps, gradient_scale),
        threads(),
    )


def fused_row_step_reference(
    parameter: Tensor,
    m: Tensor,
    v: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    gradient_scale: float = 1.0,
    lazy: bool = False,
    remove_parallel: bool = False,
    renormalise: bool = False,
    extra: Extra | None = None,
) -> None:
    """Do what `fused_row_step` does, in plain PyTorch."""
    _check(parameter, indices, coefficients, rows, extra)
    g = _gradient(parameter, indices, coefficients, rows, remove_parallel, extra)
    touched = torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device)
    touched[indices[coefficients != 0]] = True
    if extra is not None:
        touched[extra[0]] = True
    adam_rows_reference(
        parameter, g, m, v, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        touched=touched, lazy=lazy, gradient_scale=gradient_scale,
    )  # fmt: skip
    if renormalise:
        with torch.no_grad():
            norm = torch.linalg.vector_norm(parameter, dim=1, keepdim=True)
            stepped = (touched if lazy else torch.ones_like(touched))[:, None] & (norm > 0)
            parameter.copy_(torch.where(stepped, parameter / norm, parameter))


def gradient_norm(
    parameter: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    *,
    remove_parallel: bool = False,
    extra: Extra | None = None,
) -> float:
    """Return the Frobenius norm of the gradient that `fused_row_step` would use, before `gradient_scale`.

    Args:
        parameter, indices, coefficients, rows, remove_parallel, extra: as in `fused_row_step`.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(parameter, indices, coefficients, rows, extra)
    native = _native()
    if native is None or not _takes(parameter, coefficients, rows, extra):
        return gradient_norm_reference(
            parameter, indices, coefficients, rows, remove_parallel=remove_parallel, extra=extra
        )
    arrays = _arrays(indices, coefficients, rows, extra)
    square = native.fused_square_norm(parameter.detach().numpy(), *arrays, remove_parallel, threads())
    return math.sqrt(square)


def gradient_norm_reference(
    parameter: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    *,
    remove_parallel: bool = False,
    extra: Extra | None = None,
) -> float:
    """Do what `gradient_norm` does, in plain PyTorch."""
    _check(parameter, indices, coefficients, rows, extra)
    g = _gradient(parameter, indices, coefficients, rows, remove_parallel, extra)
    return float(torch.linalg.vector_norm(g, dtype=torch.float64))


def _gradient(
    parameter: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    remove_parallel: bool,
    extra: Extra | None,
) -> Tensor:
    g = scatter_outer_reference(indices, coefficients, rows, len(parameter))
    if extra is not None:
        g[extra[0]] += extra[1].detach().to(g.dtype)
    if remove_parallel:
        w = parameter.detach()
        square = w.square().sum(1, keepdim=True)
        g -= torch.where(square > 0, (g * w).sum(1, keepdim=True) / square, 0) * w
    return g


def _check(
    parameter: Tensor, indices: Tensor, coefficients: Tensor, rows: Tensor, extra: Extra | None
) -> None:
    if parameter.ndim != 2 or not parameter.is_floating_point():
        raise ValueError(
            f"parameter must be float [latents, d], not {parameter.dtype} {list(parameter.shape)}"
        )
    check_outer(indices, coefficients, rows, len(parameter), None)
    if rows.shape[1] != parameter.shape[1]:
        raise ValueError(f"rows must be [n, {parameter.shape[1]}] as the parameter, not {list(rows.shape)}")
    if extra is None:
        return
    latents, gradient = extra
    if latents.ndim != 1 or latents.dtype != torch.int64 or len(latents.unique()) != len(latents):
        raise ValueError(
            f"extra latents must be int64 [r] without repeats, not {latents.dtype} {list(latents.shape)}"
        )
    if gradient.shape != (len(latents), parameter.shape[1]) or not gradient.is_floating_point():
        raise ValueError(
            f"the extra gradient must be float [{len(latents)}, {parameter.shape[1]}], "
            f"not {gradient.dtype} {list(gradient.shape)}"
        )
    if len(latents) and not 0 <= int(latents.min()) <= int(latents.max()) < len(parameter):
        raise ValueError(
            f"extra latents must lie in 0 ... {len(parameter) - 1}, not up to {int(latents.max())}"
        )


def _takes(parameter: Tensor, coefficients: Tensor, rows: Tensor, extra: Extra | None) -> bool:
    more = () if extra is None else (extra[1],)
    return takes_whole(parameter) and takes_rows(coefficients, rows, *more)


def _arrays(indices: Tensor, coefficients: Tensor, rows: Tensor, extra: Extra | None) -> tuple[object, ...]:
    latents, gradient = (None, None) if extra is None else extra
    return (
        indices.contiguous().numpy(),
        coefficients.detach().contiguous().numpy(),
        rows.detach().numpy(),
        None if latents is None else latents.contiguous().numpy(),
        None if gradient is None else gradient.detach().numpy(),
    )
