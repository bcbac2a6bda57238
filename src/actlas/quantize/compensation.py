"""Repair in the weights what rounding does to a layer's inputs, in closed form.

With the inputs X `[columns, n]` of the original network and X^ of the network as it will run,

    min_dW |W X - (W + dW) X^|^2 + lambda |dW|^2      =>      dW = W (X - X^) X^^T (X^ X^^T + lambda I)^-1

lambda is a share of the mean diagonal of X^ X^^T. The residual W X - (W + dW) X^ is then orthogonal to X^
(for lambda = 0): the normal equations. Convolutions are unfolded; grouped ones are solved group by group.

Source: QuartDepth (Shen et al. 2025). A summary of the paper prints dW with a minus sign; with X - X^ as
written it is a plus.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError
from actlas.core.quant_conv import _TF_SAME


def compensate(
    weight: Tensor, inputs: Tensor, seen: Tensor, *, damp: float = 0.01, groups: int = 1
) -> Tensor:
    """Return W + dW, of W's shape.

    Args:
        weight: `[out, columns]` (for grouped convolutions, columns of one group).
        inputs: X^T, `[n, groups * columns]`: what the layer gets in the original network.
        seen: X^^T, of the same shape: what it will get.
        damp: lambda over the mean diagonal of X^ X^^T.
        groups: of a convolution.

    Raises:
        ShapeError: inputs of other shapes.
        InputError: a negative damping, or no inputs.
    """
    rows, columns = weight.shape
    if inputs.shape != seen.shape or inputs.ndim != 2 or inputs.shape[1] != groups * columns or rows % groups:
        raise ShapeError(
            f"inputs are {list(inputs.shape)} and {list(seen.shape)}; a weight of {rows} x {columns} in "
            f"{groups} groups needs both [n, {groups * columns}]"
        )
    if damp < 0 or not len(inputs):
        raise InputError(
            f"compensation needs inputs and a damping of 0 or more, not {len(inputs)} and {damp:g}"
        )
    x = inputs.double().reshape(len(inputs), groups, columns).transpose(0, 1)
    y = seen.double().reshape(len(seen), groups, columns).transpose(0, 1)
    w = weight.double().reshape(groups, rows // groups, columns)
    gram = y.transpose(1, 2) @ y
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(columns, dtype=gram.dtype)
    gram = gram + (max(damp, 1e-10) * mean).view(-1, 1, 1) * eye
    cross = w @ ((x - y).transpose(1, 2) @ y)
    change = torch.linalg.solve(gram, cross.transpose(1, 2)).transpose(1, 2)
    return (w + change).reshape(rows, columns).to(weight.dtype)


def columns_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's inputs as rows, `[n, groups * columns]`, one for each output position.

    Args:
        layer: a linear map or a convolution (for its sizes).
        x: what goes into it.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    padding = layer.padding
    if type(layer).__name__ == _TF_SAME:
        high, wide = (
            max((math.ceil(n / s) - 1) * s + k - n, 0)
            for n, s, k in zip(x.shape[-2:], layer.stride, layer.kernel_size, strict=True)
        )
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        padding = (0, 0)
    if isinstance(padding, str):
        if padding == "valid":
            padding = (0, 0)
        else:
            both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            x = F.pad(x, (both[1] // 2, both[1] - both[1] // 2, both[0] // 2, both[0] - both[0] // 2))
            padding = (0, 0)
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """Return a layer's outputs (or their gradients) as rows `[n, out]`, in the order of `columns_of`."""
    if isinstance(layer, nn.Conv2d):
        return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])
    return y.reshape(-1, y.shape[-1])
