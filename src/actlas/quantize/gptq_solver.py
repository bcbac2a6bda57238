"""GPTQ's solver for one matrix: round column by column, and repair each error in the columns to come.

For a layer y = W x with inputs X, the best change of the columns that are not rounded yet, given that column
j was moved by w_j - q_j, follows from H = X^T X + lambda I:

    e_j = (w_j - q_j) / U_jj,     W[:, k] -= e_j U_jk   for k > j,     U: upper Cholesky factor of H^-1

with lambda = `damp` times H's mean diagonal. Columns are updated in blocks of at most 128 (their product
with all later columns is one matrix product), and a group's scales are computed when the group starts, on
the weights as they are then. Columns that no input reaches (H_jj = 0) become 0.

With `order="activation"` columns are taken by falling H_jj. The groups stay those of the original columns, so
their scales are computed beforehand, on the original weights ("static groups").

Outliers (SpQR): the weights with the largest (w - q(w))^2 / [H^-1]_jj keep 16 bits; they are left out of the
groups' ranges and add no error.

Sources: Frantar et al. 2022, "GPTQ" (arXiv 2210.17323), Algorithm 1; Dettmers et al. 2023, "SpQR"
(arXiv 2306.03078), section 4.1, without its second level of scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers import QuantParams, QuantSpec, encode, lp_search, params_of, quantize

Order = Literal["none", "activation"]
BLOCK = 128
SHRINKS = 20  # ranges tried, 3% apart


@dataclass(frozen=True)
class Solved:
    """A rounded matrix.

    Attributes:
        codes: `[out, in]`.
        params: scales and zero points that the codes were made with, as they are stored.
        value: what codes (and outliers) stand for, float32 `[out, in]`.
        outliers: `[out, in]`, 0 where there is none; `None`: there are none.
        error: `||(W - W_hat) X||^2 / ||W X||^2` of each output, `[out]`.
    """

    codes: Tensor
    params: QuantParams
    value: Tensor
    outliers: Tensor | None
    error: Tensor


def solve(
    weight: Tensor,
    gram: Tensor,
    spec: QuantSpec,
    *,
    damp: float = 0.01,
    order: Order = "none",
    outliers: float = 0.0,
    search: bool = False,
    where: str = "the layer",
) -> Solved:
    """Round one matrix with GPTQ.

    Args:
        weight: `[out, in]`, float32 or wider.
        gram: `X^T X` of the layer's inputs, `[in, in]`; its scale does not matter.
        spec: the format.
        damp: lambda over the mean diagonal of the Hessian.
        order: of the columns.
        outliers: share of weights that stay in 16 bits.
        search: shrink each group's range to where its rounding error, weighted by the inputs' mean squares,
            is least.
        where: name of the layer, for messages.

    Raises:
        InputError: no input reaches the layer, or options out of range.
        NonFiniteError: the Gram matrix holds NaN or infinities, or the damping does not make it positive.
    """
    if order not in get_args(Order):
        raise InputError(f"order is {order!r}; it must be 'none' or 'activation'")
    if not 0 <= outliers < 0.5:
        raise InputError(f"the share of outliers lies in [0, 0.5), not {outliers}")
    if damp <= 0:
        raise InputError(f"damp must be positive, not {damp}")
    if spec.grid in ("binary", "log2"):
        raise InputError(f"{where}: GPTQ rounds to int, float, nf4, mx and nvfp4, not to {spec.name}")
    columns = weight.shape[1]
    spec.check(columns, where)
    w = weight.detach().to(torch.float32).T.contiguous().clone()  # [in, out]: columns are rows here
    upper, dead = _factor(gram, damp, where)
    w[dead] = 0.0
    kept = None
    if outliers:
        kept = _outliers(w, upper, spec, outliers)
    sizes = gram.diagonal().clamp_min(0).float()
    static = order == "activation" or spec.grid in ("mx", "nvfp4") or spec.granularity == "tensor"
    place = torch.arange(columns)
    if order == "activation":
        place = gram.diagonal().argsort(descending=True, stable=True).cpu()
        upper, _ = _factor(gram[place][:, place], damp, where)
        w = w[place].contiguous()
        kept = None if kept is None else kept[place]
    size = spec.group_size or columns
    groups = 1 if spec.granularity == "tensor" else columns // size
    own = _single(spec)
    found: list[QuantParams | None] = [None] * groups
    if static:
        found = _static_params(w, place, kept, spec, groups, sizes if search else None)
    value = torch.empty_like(w)
    for start, stop in _segments(columns, size if not static else 1):
        part = w[start:stop]
        errors = torch.empty_like(part)
        corner = upper[start:stop, start:stop]
        nearest: Callable[[Tensor], Tensor] | None = None
        now = -1
        for i in range(stop - start):
            group = int(place[start + i]) // size if spec.granularity != "tensor" else 0
            if found[group] is None:
                # The group's columns are up to date: those of this segment were repaired one by one.
                ahead = w[start + i : start + i + size]
                mask = None if kept is None else kept[start + i : start + i + size]
                ahead = ahead if mask is None else ahead.masked_fill(mask, 0.0)
                found[group] = _params(ahead, own, sizes[start + i : start + i + size] if search else None)
            if group != now:
                params = found[group]
                assert params is not None
                nearest, now = _nearest(own, params), group
            assert nearest is not None
            column = part[i]
            q = nearest(column)
            if kept is not None:
                q = torch.where(kept[start + i], column.half().float(), q)
            value[start + i] = q
            e = (column - q) / corner[i, i]
            if i + 1 < stop - start:
                part[i + 1 :].addr_(corner[i, i + 1 :], e, alpha=-1.0)
            errors[i] = e
        if stop < columns:
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
    back = place.argsort()
    value = value[back].T.contiguous()
    mask = None if kept is None else kept[back].T
    params = _joined(found, spec)
    base = value if mask is None else value.masked_fill(mask, 0.0)
    codes = encode(base, spec, params)
    exact = None if mask is None else value * mask
    return Solved(codes, params, value, exact, output_error(weight, value, gram))


def output_error(weight: Tensor, value: Tensor, gram: Tensor) -> Tensor:
    """Return `||(W - W_hat) X||^2 / ||W X||^2` of each output, `[out]`; 0 where both are 0."""
    g = (gram / gram.diagonal().max().clamp_min(1e-300)).float()
    off, whole = (weight - value).float(), weight.float()
    lost = ((off @ g) * off).sum(1).clamp_min(0)
    return lost / ((whole @ g) * whole).sum(1).clamp_min(1e-30)


def _factor(gram: Tensor, damp: float, where: str) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factor of the damped inverse, float32, and which columns are dead."""
    h = gram.to(torch.float64)
    if not bool(torch.isfinite(h).all()):
        raise NonFiniteError(f"{where}: the inputs' second moments hold NaN or infinities")
    diagonal = h.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        raise InputError(f"{where}: no calibration input reaches this layer")
    damping = damp * float(diagonal.mean())
    # H = R R^T with R upper (the Cholesky factor of H with rows and columns reversed), so U = R^-1.
    h = h.flip(0, 1)
    h.diagonal()[dead.flip(0)] = 1.0
    h.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(h)
    del h
    if int(failed):
        raise NonFiniteError(f"{where}: the Hessian is not positive with damp={damp}; give a larger damp")
    upper = lower.flip(0, 1)
    del lower
    factor = torch.linalg.solve_triangular(
        upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True
    )
    if not bool(torch.isfinite(factor).all()):
        raise NonFiniteError(
            f"{where}: the Hessian is too ill-conditioned with damp={damp}; give a larger damp"
        )
    return factor.float(), dead


def _single(spec: QuantSpec) -> QuantSpec:
    """Return the format of one column with given scales."""
    if spec.grid in ("mx", "nvfp4"):
        return QuantSpec(spec.bits, "float", granularity="channel", exp_bits=spec.exp_bits)
    return spec.with_group(None)


def _segments(columns: int, size: int) -> list[tuple[int, int]]:
    """Cut columns into runs of at most 128 such that every group starts a run or lies in one."""
    step = max(1, BLOCK // size) * size if size <= BLOCK else BLOCK
    stride = step if size <= BLOCK else size
    out = []
    for first in range(0, columns, stride):
        last = min(first + stride, columns)
        out += [(s, min(s + step, last)) for s in range(first, last, step)]
    return out


def _params(columns: Tensor, own: QuantSpec, sizes: Tensor | None) -> QuantParams:
    """Return the stored scales `[out, 1]` of some columns `[n, out]`."""
    rows = columns.T.contiguous()
    if sizes is None:
        return params_of(rows, own).stored(own)
    return lp_search(rows, own, p=2.0, steps=SHRINKS, shrink=0.03, weight=sizes.to(rows)).stored(own)


def _static_params(
    w: Tensor,
    place: Tensor,
    kept: Tensor | None,
    spec: QuantSpec,
    groups: int,
    sizes: Tensor | None,
) -> list[QuantParams | None]:
    back = place.argsort()
    plain = w if kept is None else w.masked_fill(kept, 0.0)
    whole = _params(plain[back], spec, sizes)
    if spec.granularity == "tensor":
        return [whole]
    zero = whole.zero
    return [
        QuantParams(whole.scale[:, g : g + 1], None if zero is None else zero[:, g : g + 1], whole.outer)
        for g in range(groups)
    ]


def _joined(found: list[QuantParams | None], spec: QuantSpec) -> QuantParams:
    parts = [p for p in found if p is not None]
    assert len(parts) == len(found)
    wide = any(p.scale.dtype == torch.float32 for p in parts)
    scale = torch.cat([p.scale.float() if wide else p.scale for p in parts], 1)
    if parts[0].zero is None:
        return QuantParams(scale, None, parts[0].outer)
    zeros = [p.zero for p in parts if p.zero is not None]
    mixed = any(z.dtype == torch.float32 for z in zeros)
    return QuantParams(scale, torch.cat([z.float() if mixed else z for z in zeros], 1), parts[0].outer)


def _nearest(own: QuantSpec, params: QuantParams) -> Callable[[Tensor], Tensor]:
    """Return the function that rounds one column `[out]` with scales `[out, 1]`."""
    if own.grid != "int" or own.centred or own.scale_rule != "max":
        return lambda column: quantize(column.unsqueeze(1), own, params).squeeze(1)
    s = params.scale.float().squeeze(1)
    top, half = 2**own.bits - 1, 2 ** (own.bits - 1)
    if own.symmetric:
        return lambda column: (column / s).round_().clamp_(-half, half - 1).mul_(s)
    assert params.zero is not None
    z = params.zero.float().squeeze(1)
    if own.zero_point == "float":
        return lambda column: ((column - z) / s).round_().clamp_(0, top).mul_(s).add_(z)
    return lambda column: (column / s).round_().add_(z).clamp_(0, top).sub_(z).mul_(s)


def _outliers(w: Tensor, upper: Tensor, spec: QuantSpec, share: float) -> Tensor:
    """Return which weights `[in, out]` stay exact: the share that costs most when rounded alone."""
    rounded = quantize(w.T.contiguous(), spec).T
    # [H^-1]_jj = sum_{i <= j} U_ij^2, since H^-1 = U^T U.
    inverse = upper.double().square().sum(0).clamp_min(1e-30).float()
    cost = (w - rounded).square() / inverse.unsqueeze(1)
    n = max(1, round(share * cost.numel()))
    bound = cost.flatten().kthvalue(cost.numel() - n + 1).values
    return (cost >= bound) & (w != 0)
