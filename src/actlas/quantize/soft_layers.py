"""SoftLayer: a linear map or a convolution whose rounding is still being decided.

With the scale s and zero point z of each weight's group, the weight that the layer multiplies with is

    soft      s (clip(floor(w / s) + h(v) + z, 0, 2^b - 1) - z)       h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
    hard      the same with (v >= 0) in the place of h(v); floor passes gradients straight through to w
    nearest   the same with round(w / s)
    float     w itself

(Nagel et al. 2020, AdaRound, equations 21 to 25). v starts so that h(v) is the fractional part of w / s: the
soft weight is then the float weight, within the range. Scales are those that will be stored, before and
after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.layout import weight_matrix
from actlas.core.numbers import QuantParams, QuantSpec, lp_search, params_of
from actlas.core.quant_conv import QuantConv2d, convolve
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.quantized_input import QuantizedInput

Mode = Literal["soft", "hard", "nearest", "float"]
_WIDE, _LOW = 1.2, -0.1


def rounding_share(v: Tensor) -> Tensor:
    """Return h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)."""
    return (_WIDE * torch.sigmoid(v) + _LOW).clamp(0, 1)


def start_of(share: Tensor) -> Tensor:
    """Return the v with h(v) = share, for shares in [0, 1]."""
    return -torch.log(_WIDE / (share - _LOW) - 1)


class SoftLayer(nn.Module):
    """See the module's text.

    Args:
        layer: `nn.Linear`, transformers' `Conv1D`, or a zero-padded `nn.Conv2d`.
        spec: integers with an integer or float zero point, or symmetric; for convolutions one scale a
            channel.
        split: sizes of runs of input channels with scales of their own (one scale a channel only).
        act: quantiser of the input; used when `act_on`.
        search: start from the range with the least L_2.4 error instead of the whole range.
        target: `[out, columns]`: what is rounded, instead of the layer's weight.
        where: the layer's name, for messages.

    Raises:
        InputError: a format without even steps, or a layer of another kind.
        NonFiniteError: NaN or infinite weights.
    """

    def __init__(
        self,
        layer: nn.Module,
        spec: QuantSpec | str,
        *,
        split: Sequence[int] | None = None,
        act: ActQuantizer | None = None,
        search: bool = True,
        target: Tensor | None = None,
        where: str = "the layer",
    ) -> None:
        super().__init__()
        spec = QuantSpec.parse(spec)
        if spec.grid != "int" or spec.centred or spec.granularity == "tensor" or spec.bits > 8:
            raise InputError(
                f"{where}: rounding up or down is decided on even steps of 2 to 8 bits, e.g. int4-channel or "
                f"int4-g64, not {spec}"
            )
        matrix = matrix_of(layer, where) if target is None else target.detach()
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError(f"{where}: the weight holds NaN or infinite values")
        self.spec, self.where, self.split = spec, where, tuple(split) if split else None
        self.mode: Mode = "nearest"
        self.act, self.act_on = act, act is not None
        self._layer = (layer,)  # not a submodule: its weight is copied
        self.matrix = nn.Parameter(matrix.float().clone(), requires_grad=False)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        sizes = self._columns(matrix.shape[1])
        self.params = []
        for part in self.matrix.detach().split(sizes, 1):
            spec.check(part.shape[1], where)
            found = lp_search(part, spec) if search else params_of(part, spec, where=where)
            self.params.append(found.stored(spec))
        self._spread()
        self.v = nn.Parameter(start_of(self._place() - self._place().floor()), requires_grad=False)

    s: Tensor
    z: Tensor
    offset: Tensor

    def _columns(self, total: int) -> list[int]:
        if self.split is None:
            return [total]
        area = total // sum(self.split)
        if sum(self.split) * area != total:
            raise InputError(f"{self.where}: a split into {list(self.split)} does not fit {total} columns")
        return [s * area for s in self.split]

    def _spread(self) -> None:
        """Spread scales and zero points over the entries."""
        rows = self.matrix.shape[0]
        s: list[Tensor] = []
        z: list[Tensor] = []
        o: list[Tensor] = []
        for part, found in zip(
            self.matrix.detach().split(self._columns(self.matrix.shape[1]), 1), self.params, strict=True
        ):
            like = self.spec.groups(part)
            scale = found.scale.float().unsqueeze(-1).expand(like.shape)
            if self.spec.symmetric:
                zero = torch.full_like(scale, 2 ** (self.spec.bits - 1))
                offset = torch.zeros_like(scale)
            else:
                assert found.zero is not None
                given = found.zero.float().unsqueeze(-1).expand(like.shape)
                whole = self.spec.zero_point == "int"
                zero = given if whole else torch.zeros_like(scale)
                offset = torch.zeros_like(scale) if whole else given
            for held, new in ((s, scale), (z, zero), (o, offset)):
                held.append(new.reshape(rows, -1))
        for name, parts in (("s", s), ("z", z), ("offset", o)):
            self.register_buffer(name, torch.cat(parts, 1), persistent=False)

    def _place(self) -> Tensor:
        return (self.matrix - self.offset) / self.s

    def reset(self, target: Tensor | None = None) -> None:
        """Start v anew, for the weight as it is or for another one `[out, columns]`; scales stay."""
        with torch.no_grad():
            if target is not None:
                self.matrix.copy_(target)
            place = self._place()
            self.v.copy_(start_of(place - place.floor()))

    def nearest(self) -> None:
        """Set v so that hardening rounds to nearest."""
        with torch.no_grad():
            place = self._place()
            self.v.copy_(torch.where(place - place.floor() >= 0.5, 2.0, -2.0))

    def codes(self, up: Tensor) -> Tensor:
        """Return `clip(floor(w / s) + up + z, 0, 2^b - 1)`; floor is straight through."""
        place = self._place()
        whole = place + (place.floor() - place).detach() if self.matrix.requires_grad else place.floor()
        return (whole + up + self.z).clamp(0, 2**self.spec.bits - 1)

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with in its mode, `[out, columns]`, with gradients."""
        if self.mode == "float":
            return self.matrix
        if self.mode == "nearest":
            place = self._place()
            code = (place + (place.round() - place).detach() + self.z).clamp(0, 2**self.spec.bits - 1)
        else:
            up = rounding_share(self.v) if self.mode == "soft" else (self.v >= 0).to(self.v)
            code = self.codes(up)
        return self.s * (code - self.z) + self.offset

    def forward(self, x: Tensor) -> Tensor:
        if self.act is not None and self.act_on:
            x = self.act(x)
        layer = self._layer[0]
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            return convolve(layer, x, weight.reshape(layer.weight.shape), bias)
        return F.linear(x, weight, bias)

    def penalty(self, beta: float) -> Tensor:
        """Return `sum(1 - |2 h(v) - 1|^beta)`, which is 0 when every h is 0 or 1."""
        return (1 - (2 * rounding_share(self.v) - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def export(self) -> nn.Module:
        """Return the layer as codes: a `QuantConv2d`, a `QuantLinear`, or the latter behind its quantiser."""
        if self.mode == "nearest":
            code = (self._place().round() + self.z).clamp(0, 2**self.spec.bits - 1)
        else:
            code = self.codes((self.v >= 0).to(self.v))
        codes = code.to(torch.uint8)
        layer: Any = self._layer[0]
        act = self.act if self.act_on else None
        if isinstance(layer, nn.Conv2d):
            return QuantConv2d.of(
                layer,
                self.spec,
                params=self.params,
                codes=codes,
                act=act,
                split=self.split,
                bias=self.bias,
                where=self.where,
            )
        if self.split is not None:
            raise InputError(f"{self.where}: a linear map is not split; its columns share the row's scale")
        own = None if self.bias is None else self.bias.detach()
        made = QuantLinear.of(
            layer, self.spec, params=self.params[0], codes=codes, bias=own, where=self.where
        )
        return made if act is None else _with_input(made, act, layer, self.spec, self.params[0], codes, own)


def _with_input(
    made: QuantLinear,
    act: ActQuantizer,
    layer: nn.Module,
    spec: QuantSpec,
    params: QuantParams,
    codes: Tensor,
    bias: Tensor | None,
) -> nn.Module:
    """Use the linear layer's own activation rounding where it can say the same."""
    plain = act.times is None and act.knee is None and not act.dynamic and len(act.segments) == 1
    if not plain:
        return QuantizedInput(act, made)
    static = ActQuant(
        QuantSpec(act.bits, granularity="tensor"), QuantParams(act.scale.detach().clone(), act.zero.clone())
    )
    return QuantLinear.of(layer, spec, params=params, codes=codes, act=static, bias=bias)


def matrix_of(layer: nn.Module, where: str = "the layer") -> Tensor:
    """Return a layer's weight as a matrix `[out, columns]`.

    Raises:
        InputError: not a linear map or a convolution of images.
    """
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise InputError(
                f"{where} pads with {layer.padding_mode!r}; only zero padding is exact on a grid"
            )
        return layer.weight.detach().flatten(1)
    if isinstance(getattr(layer, "weight", None), Tensor) and layer.weight.ndim == 2:
        return weight_matrix(layer).detach()
    raise InputError(f"{where} is a {type(layer).__name__}; linear maps and 2-d convolutions can be rounded")
