"""Optimizer steps on the rows of a weight matrix, one row a latent.

Adam (Kingma & Ba 2015), in the form of `torch.optim.Adam`: with the gradient g and the step t (from 1),

    m = β1 m + (1 - β1) g        v = β2 v + (1 - β2) g²
    w -= lr / (1 - β1^t) * m / (sqrt(v / (1 - β2^t)) + ε)

A latent that was not active in a batch has the gradient 0, so that its row of the gradient need neither
be written nor read; its moments still decay and its momentum still moves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.kernels.loading import cuda_kernels, takes_whole, threads
from actlas.kernels.loading import native as _native


def adam_rows(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    touched: Tensor | None = None,
    lazy: bool = False,
    gradient_scale: float = 1.0,
) -> None:
    """Do one step of Adam, in place.

    Args:
        parameter, gradient, m, v: the same shape, `[rows, d]` or `[rows]`; m and v start at zero.
        step: number of this step, counted from 1.
        lr, beta1, beta2, eps: as in `torch.optim.Adam`.
        touched: bool `[rows]` or int64 row numbers: rows whose gradient is not zero. The gradient of the
            others is not read and counts as zero. `None`: all.
        lazy: leave rows that were not touched as they are, as `torch.optim.SparseAdam` does, instead of
            stepping them with the gradient zero, as Adam does.
        gradient_scale: factor on the gradient, for clipping by the global norm.

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    mask = check_state(parameter, gradient, m, v, step, touched)
    constants = adam_constants(step, lr, beta1, beta2, eps, gradient_scale)
    tables = [_table(t) for t in (parameter, gradient, m, v)]
    if (cuda := cuda_kernels(*tables)) is not None and all(t.is_contiguous() for t in tables):
        cuda.adam_rows(*tables, mask, lazy, constants)
        return
    native = _native()
    if native is None or not takes_whole(*tables):
        adam_rows_reference(
            parameter, gradient, m, v, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            touched=mask, lazy=lazy, gradient_scale=gradient_scale,
        )  # fmt: skip
        return
    native.adam_rows(
        *(t.numpy() for t in tables),
        None if mask is None else mask.contiguous().view(torch.uint8).numpy(),
        lazy,
        *constants,
        threads(),
    )


def adam_rows_reference(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    touched: Tensor | None = None,
    lazy: bool = False,
    gradient_scale: float = 1.0,
) -> None:
    """Do what `adam_rows` does, in plain PyTorch."""
    mask = check_state(parameter, gradient, m, v, step, touched)
    with torch.no_grad():
        if mask is not None and lazy:
            rows = mask.nonzero()[:, 0]
            w, g, first, second = (t[rows] for t in (parameter, gradient, m, v))
            _adam(w, g, first, second, step, lr, beta1, beta2, eps, gradient_scale)
            parameter[rows], m[rows], v[rows] = w, first, second
            return
        if mask is not None:
            shape = [-1] + [1] * (gradient.ndim - 1)
            gradient = torch.where(mask.reshape(shape), gradient, 0)
        _adam(parameter, gradient, m, v, step, lr, beta1, beta2, eps, gradient_scale)


def _table(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.ndim == 2 else x.unsqueeze(1)


def adam_constants(
    step: int, lr: float, beta1: float, beta2: float, eps: float, scale: float
) -> tuple[float, float, float, float, float, float]:
    """Return rate, correction, β1, β2, ε, scale, with the bias corrections in float64."""
    return lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, beta1, beta2, eps, scale


def _adam(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
) -> None:
    if scale != 1.0:
        g = g * scale
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    w.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))


def check_state(
    parameter: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, touched: Tensor | None
) -> Tensor | None:
    """Return `touched` as a bool mask."""
    if parameter.ndim not in (1, 2) or not parameter.is_floating_point():
        raise ValueError(
            f"parameter must be float [rows, d] or [rows], not {parameter.dtype} {list(parameter.shape)}"
        )
    for name, tensor in (("gradient", gradient), ("m", m), ("v", v)):
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} must be {list(parameter.shape)} as the parameter, not {list(tensor.shape)}"
            )
    if step < 1:
        raise ValueError(f"step counts from 1, not {step}")
    rows = len(parameter)
    if touched is None:
        return None
    if touched.dtype == torch.bool and touched.shape == (rows,):
        return touched
    if touched.dtype == torch.int64 and touched.ndim == 1:
        mask = torch.zeros(rows, dtype=torch.bool, device=parameter.device)
        if touched.numel() and not 0 <= int(touched.min()) <= int(touched.max()) < rows:
            raise ValueError(f"touched must lie in 0 ... {rows - 1}, not up to {int(touched.max())}")
        mask[touched] = True
        return mask
    raise ValueError(
        f"touched must be bool [{rows}] or int64 row numbers, not {touched.dtype} {list(touched.shape)}"
    )
