"""Linear maps and convolutions whose weights are sums of one or two signs, trained through the signs.

    W_hat = s_1 sign(W) + s_2 sign(W - s_1 sign(W))          one s an output channel, learned; order 2
    W_hat = s_1 sign(W)                                       order 1

The latent weight W learns with the clipped straight-through estimator: the sign's gradient is 1 where its
argument is at most 1 in size, 0 elsewhere. sign(0) is +1. The progressive start takes W from a trained layer,
s_1 = mean|W| and s_2 = the mean size of what is left: exactly the greedy fit of binary coding. `export` gives
the layer as packed signs (`QuantLinear`, `QuantConv2d` in the format `binary2-channel`).

Source: Zheng et al. 2024, "BinaryDM"; residual binarisation after Li et al. 2017.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.layout import weight_matrix
from actlas.core.numbers import QuantParams, QuantSpec
from actlas.core.quant_conv import QuantConv2d, convolve
from actlas.core.quant_linear import QuantLinear
from actlas.core.quantized_input import QuantizedInput

Start = Literal["progressive", "random"]


class _Sign(torch.autograd.Function):
    """+1 where x is 0 or more, -1 elsewhere; the gradient passes where |x| <= 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        passed: Tensor = grads[0] * (x.abs() <= 1)
        return passed


def sign(x: Tensor) -> Tensor:
    """Return +1 or -1, with the clipped straight-through gradient."""
    out: Tensor = _Sign.apply(x)  # type: ignore[no-untyped-call]
    return out


class BinaryLayer(nn.Module):
    """A binary linear map or convolution in the place of a float one.

    Args:
        layer: `nn.Linear`, or an `nn.Conv2d` with zero padding.
        order: how many signs are summed, 1 or 2.
        act: quantiser of the input, or `None`.
        start: `"progressive"`, or `"random"`: scales drawn evenly from 0 to twice the mean size of W.
        generator: of the random start.

    Raises:
        InputError: another order or kind of layer.
        NonFiniteError: NaN or infinite weights.
    """

    def __init__(
        self,
        layer: nn.Module,
        order: int = 1,
        *,
        act: ActQuantizer | None = None,
        start: Start = "progressive",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if order not in (1, 2):
            raise InputError(f"a binary layer sums 1 or 2 signs, not {order}")
        if start not in ("progressive", "random"):
            raise InputError(f"there is no start {start!r}; there are progressive and random")
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros":
                raise InputError(f"a convolution that pads with {layer.padding_mode!r} cannot be binary here")
            matrix = layer.weight.detach().flatten(1)
        elif isinstance(layer, nn.Linear):
            matrix = weight_matrix(layer).detach()
        else:
            raise InputError(
                f"a {type(layer).__name__} cannot be binary; linear maps and 2-d convolutions can"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError("the weight to binarise holds NaN or infinite values")
        self._layer = (layer,)
        self.order, self.act = order, act
        self.latent = nn.Parameter(matrix.float().clone())
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        scales, rest = [], self.latent.detach()
        for _ in range(order):
            s = rest.abs().mean(1, keepdim=True)
            if start == "random":
                s = 2 * torch.rand(s.shape, generator=generator) * self.latent.detach().abs().mean()
            rest = rest - s * torch.where(rest >= 0, 1.0, -1.0)
            scales.append(s)
        self.scales = nn.ParameterList(nn.Parameter(s.clone()) for s in scales)

    @property
    def weight(self) -> Tensor:
        """The sum of signs, `[out, columns]`, with gradients for the latent weight and the scales."""
        total, rest = torch.zeros_like(self.latent), self.latent
        for s in self.scales:
            b = sign(rest)
            total = total + s * b
            rest = rest - (s * b).detach()
        return total

    def forward(self, x: Tensor) -> Tensor:
        if self.act is not None:
            if not bool(self.act.ready):
                self.act.start_learning(x.detach())
            x = self.act(x)
        layer = self._layer[0]
        if isinstance(layer, nn.Conv2d):
            return convolve(layer, x, self.weight.reshape(layer.weight.shape), self.bias)
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def export(self) -> nn.Module:
        """Return the layer as packed signs and 16-bit scales."""
        spec = QuantSpec(self.order, "binary", granularity="channel")
        codes, rest = torch.zeros(self.latent.shape, dtype=torch.uint8), self.latent.detach()
        for i, s in enumerate(self.scales):
            up = rest >= 0
            codes |= up.to(torch.uint8) << i
            rest = rest - torch.where(up, s, -s)
        params = QuantParams(torch.stack([s.detach() for s in self.scales], -1))
        layer: Any = self._layer[0]
        bias = None if self.bias is None else self.bias.detach()
        if isinstance(layer, nn.Conv2d):
            return QuantConv2d.of(layer, spec, params=[params], codes=codes, act=self.act, bias=bias)
        made = QuantLinear.of(layer, spec, params=params, codes=codes, bias=bias)
        return made if self.act is None else QuantizedInput(self.act, made)
