"""QuantConv2d: a convolution that is stored as codes and scales, beside `QuantLinear`.

    layer = QuantConv2d.of(conv, "int4-channel", act=ActQuantizer(8, conv.in_channels))
    layer = QuantConv2d.of(conv, "int4-channel", split=(64, 32))     # weight slices with scales of their own

The weight is read as a matrix `[out, in / groups * height * width]`, a channel is one of its rows. With
`split` the input channels are cut into runs, and each run of every row has its own scale (Q-Diffusion's split
for the convolution after a concatenated skip): `Q(X1) Q(W1) + Q(X2) Q(W2)`. Zero padding stays exact, because
0 is on the activations' grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.errors import InputError, ShapeError
from actlas.core.numbers import QuantParams, QuantSpec, decode, encode, pack, params_of, unpack
from actlas.core.swap import register_module

_TF_SAME = "SameConv2d"  # models.efficientnet_lite: pads on the right and below where the amount is odd


@register_module
class QuantConv2d(nn.Module):
    """See the module's text; make one with `of`.

    Args:
        config: sizes and formats, as `config()` returns it.
    """

    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._config = dict(config)
        c = self._config
        self.in_channels, self.out_channels = int(c["in_channels"]), int(c["out_channels"])
        self.kernel_size = tuple(int(k) for k in c["kernel_size"])
        self.stride = tuple(int(k) for k in c["stride"])
        self.dilation = tuple(int(k) for k in c["dilation"])
        self.groups = int(c["groups"])
        self.padding: str | tuple[int, ...] = (
            c["padding"] if isinstance(c["padding"], str) else tuple(int(p) for p in c["padding"])
        )
        self.spec = QuantSpec.parse(c["spec"])
        area = math.prod(self.kernel_size)
        self.split: tuple[int, ...] = tuple(c["split"] or (self.in_channels // self.groups,))
        self._columns = tuple(s * area for s in self.split)
        rows = self.out_channels
        n, bits = rows * sum(self._columns), self.spec.bits
        self.register_buffer("codes", torch.empty(n if bits == 8 else -(-n // 8) * bits, dtype=torch.uint8))
        groups = sum(self.spec.groups(torch.empty(rows, k, device="meta")).shape[1] for k in self._columns)
        shape = (rows, groups, bits) if self.spec.grid == "binary" else (rows, groups)
        self.register_buffer("scale", torch.empty(shape, dtype=getattr(torch, c["scale_dtype"])))
        zero = torch.empty(rows, groups, dtype=getattr(torch, c["zero_dtype"])) if c["zero_dtype"] else None
        self.register_buffer("zero", zero)
        self.register_buffer("bias", torch.empty(rows) if c["bias"] else None)
        self.act = ActQuantizer.from_config(c["act"]) if c["act"] else None
        self.keep_dense = False
        self._dense: Tensor | None = None

    codes: Tensor

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        spec: QuantSpec | str,
        *,
        params: Sequence[QuantParams] | None = None,
        codes: Tensor | None = None,
        act: ActQuantizer | None = None,
        split: Sequence[int] | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        where: str = "the convolution",
    ) -> QuantConv2d:
        """Return a convolution with its weight in a number format.

        Args:
            conv: zero-padded.
            spec: format of the weight's rows: `"channel"` or `"group"`, 2 to 8 bits.
            params: scales, one for each slice of the split; rounded to what is stored. Default: of the range.
            codes: `[out, columns]`, made with `params.stored(spec)`; default: round to nearest.
            act: quantiser of the input.
            split: sizes of the runs of input channels with scales of their own.
            weight, bias: instead of the convolution's own.
            where: its name, for messages.

        Raises:
            InputError: another padding mode, a format or split that does not fit.
            NonFiniteError: the weight holds NaN or infinities.
        """
        spec = QuantSpec.parse(spec)
        if conv.padding_mode != "zeros":
            raise InputError(f"{where} pads with {conv.padding_mode!r}; only zero padding is exact on a grid")
        if spec.granularity == "tensor" or spec.grid in ("log2", "nvfp4") or spec.bits > 8:
            raise InputError(
                f"{where}: weights of convolutions are int4-channel, fp4-e2m1-g32 and the like, not {spec}"
            )
        kernel = (conv.weight if weight is None else weight).detach()
        rows, inner = kernel.shape[:2]
        area = kernel[0, 0].numel()
        sizes = tuple(int(s) for s in (split or (inner,)))
        if sum(sizes) != inner or any(s < 1 for s in sizes) or (len(sizes) > 1 and conv.groups > 1):
            raise InputError(f"{where}: a split into {list(sizes)} does not fit {inner} input channels")
        if act is not None and act.channels != conv.in_channels:
            raise ShapeError(f"{where} has {conv.in_channels} input channels, its quantiser {act.channels}")
        matrix = kernel.reshape(rows, -1).float()
        columns = [s * area for s in sizes]
        for k in columns:
            spec.check(k, where)
        parts = matrix.split(columns, 1)
        if codes is not None and params is None:
            raise InputError(f"{where}: codes need the scales that they were made with")
        if params is None:
            params = [params_of(p, spec, where=where) for p in parts]
        stored = [p.stored(spec) for p in params]
        if codes is None:
            codes = torch.cat([encode(p, spec, s) for p, s in zip(parts, stored, strict=True)], 1)
        if codes.shape != matrix.shape:
            raise ShapeError(f"{where}: codes are {list(codes.shape)}; the weight is {list(matrix.shape)}")
        wide = any(s.scale.dtype != torch.float16 for s in stored)
        scale = torch.cat([s.scale.float() if wide else s.scale for s in stored], 1)
        zero = None
        if stored[0].zero is not None:
            zero = torch.cat([s.zero.float() for s in stored if s.zero is not None], 1)
            zero = zero.to(torch.uint8 if spec.zero_point == "int" else torch.float32)
        own = conv.bias if bias is None else bias
        padding: Any = list(conv.padding) if not isinstance(conv.padding, str) else conv.padding
        config = {
            "in_channels": conv.in_channels,
            "out_channels": rows,
            "kernel_size": list(conv.kernel_size),
            "stride": list(conv.stride),
            "dilation": list(conv.dilation),
            "groups": conv.groups,
            "padding": "tf-same" if type(conv).__name__ == _TF_SAME else padding,
            "spec": spec.name,
            "split": list(sizes) if len(sizes) > 1 else None,
            "scale_dtype": str(scale.dtype).removeprefix("torch."),
            "zero_dtype": None if zero is None else str(zero.dtype).removeprefix("torch."),
            "bias": own is not None,
            "act": None if act is None else act.config(),
        }
        layer = cls(config)
        layer.codes = pack(codes, spec.bits)
        layer.scale, layer.zero = scale.contiguous(), zero
        layer.bias = None if own is None else own.detach().float().clone()
        if act is not None:
            assert layer.act is not None
            layer.act.load_state_dict(act.state_dict())
        return layer.to(kernel.device).eval()

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with, float32 `[out, in / groups, height, width]`."""
        codes = unpack(self.codes, self.spec.bits, (self.out_channels, sum(self._columns)))
        counts = [self.spec.groups(codes[:, :k]).shape[1] for k in self._columns]
        zeros = [None] * len(counts) if self.zero is None else list(self.zero.split(counts, 1))
        parts = [
            decode(c, self.spec, QuantParams(s, z))
            for c, s, z in zip(codes.split(self._columns, 1), self.scale.split(counts, 1), zeros, strict=True)
        ]
        return torch.cat(parts, 1).reshape(self.out_channels, -1, *self.kernel_size)

    @property
    def n_weights(self) -> int:
        """How many weights there are."""
        return self.out_channels * sum(self._columns)

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that the layer keeps."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes, scales and zero points over weights."""
        parts = [t for t in (self.codes, self.scale, self.zero) if t is not None]
        return 8 * sum(t.numel() * t.element_size() for t in parts) / self.n_weights

    def forward(self, x: Tensor) -> Tensor:
        if self._dense is None or self._dense.device != x.device:
            weight = self.weight
            self._dense = weight if self.keep_dense else None
        else:
            weight = self._dense
        if self.act is not None:
            x = self.act(x)
        return convolve(self, x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def drop(self) -> None:
        """Forget the dequantised weight."""
        self._dense = None

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantConv2d:
        """Build an empty one of these sizes and formats."""
        return cls(config)


def convolve(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve as `conv` (an `nn.Conv2d` or a `QuantConv2d`) does, with another weight."""
    padding = conv.padding
    if padding == "tf-same" or type(conv).__name__ == _TF_SAME:
        amounts = [
            max((math.ceil(n / s) - 1) * s + k - n, 0)
            for n, s, k in zip(x.shape[-2:], conv.stride, conv.kernel_size, strict=True)
        ]
        high, wide = amounts
        if high or wide:
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        padding = 0
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
