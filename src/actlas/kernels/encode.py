"""The dense half of a TopK encoder: the k largest of `x Wᵀ + b`, without keeping all m of them.

The product is made for some rows at a time, so that the pre-activations are still in cache when the k
largest are taken; `[n, m]` is never in memory.

With `precision="bfloat16"` the product is made in bfloat16, at about twice the speed where the processor
has instructions for it (`bfloat16_is_fast`), only to find candidates: somewhat more than k a row. Their
values are then computed in float32, and the k largest of those are taken, so the values are exact and so is
the choice, wherever the gap between the k-th value and the last candidate is three times the largest
error seen among the row's candidates. Rows for which it is not are computed in float32 altogether.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from actlas.kernels.sparse_codes import gather_dot, topk

_CHUNK = 1 << 21  # pre-activations at a time: 8 MB, about the size of a shared cache
_SURE = 3.0  # times the largest error seen

Precision = Literal["float32", "bfloat16"]


def bfloat16_is_fast() -> bool:
    """Return whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, ask)() for ask in asks if hasattr(torch.cpu, ask))


def encode_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    scale: Tensor | None = None,
    relu: bool = True,
    precision: Precision = "float32",
) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of `scale * (x @ weight.T + bias)` in each row, the largest first.

    Args:
        x: float `[n, d]`.
        weight: `[m, d]` of the same dtype.
        bias: `[m]`, or `None`.
        scale: `[m]`, or `None` for 1: with the norms of the atoms, latents are compared by what they add to
            the reconstruction.
        k: how many, `1 <= k <= m`.
        relu: replace negative values by 0.
        precision: of the product over all m; values are always those of the dtype of `x`.

    Returns:
        `values [n, k]` and `indices [n, k]` int64, as `topk` of the whole product.

    Raises:
        ValueError: a shape, dtype, k or precision that does not fit.
    """
    _check(x, weight, bias, scale, k, precision)
    x, weight = x.detach(), weight.detach()
    scale = None if scale is None else scale.detach()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    candidates = k + max(16, k // 2)
    if precision == "float32" or candidates >= len(weight):
        return _encode(x, weight, bias, scale, k, relu)
    low, low_weight, low_bias = (t.to(torch.bfloat16) for t in (x, weight, bias))
    low_scale = None if scale is None else scale.to(torch.bfloat16)
    rough, found = _encode(low, low_weight, low_bias, low_scale, candidates, False)
    exact = gather_dot(found, x, weight) + bias[found]
    if scale is not None:
        exact *= scale[found]
    values, at = topk(exact, k, relu=False)
    indices = found.gather(1, at)
    error = (rough.to(exact.dtype) - exact).abs().amax(1)
    least = values[:, -1].clamp_min(0) if relu else values[:, -1]  # what relu cuts off need not be right
    unsure = ~(least - rough[:, -1].to(exact.dtype) >= _SURE * error)
    if bool(unsure.any()):
        values[unsure], indices[unsure] = _encode(x[unsure], weight, bias, scale, k, False)
    return (values.relu() if relu else values), indices


def encode_topk_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    scale: Tensor | None = None,
    relu: bool = True,
    precision: Precision = "float32",
) -> tuple[Tensor, Tensor]:
    """Do what `encode_topk` does, with the whole product at once and in the precision of `x`."""
    _check(x, weight, bias, scale, k, precision)
    pre = x.detach() @ weight.detach().T
    pre = pre if bias is None else pre + bias.detach()
    return topk(pre if scale is None else pre * scale.detach(), k, relu)


def _encode(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    m = len(weight)
    size = max(1, min(len(x), _CHUNK // m))
    pre = x.new_empty(size, m)
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for start in range(0, len(x), size):
        at = slice(start, min(start + size, len(x)))
        part = pre[: at.stop - start]
        torch.addmm(bias, x[at], weight.T, out=part)
        if scale is not None:
            part *= scale
        values[at], indices[at] = topk(part, k, relu)
    return values, indices


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, k: int, precision: str
) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a float [n, d] tensor, not {x.dtype} {list(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be {x.dtype} [m, {x.shape[1]}], not {weight.dtype} {list(weight.shape)}"
        )
    for name, t in (("bias", bias), ("scale", scale)):
        if t is not None and (t.shape != weight.shape[:1] or t.dtype != x.dtype):
            raise ValueError(f"{name} must be {x.dtype} [{len(weight)}], not {t.dtype} {list(t.shape)}")
    if not 1 <= k <= len(weight):
        raise ValueError(f"k must be between 1 and the width {len(weight)}, not {k}")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', not {precision!r}")
