"""One edge of a super-net: every operation at every bit width at once, and a logit for each pair.

    edge = MixedOp({"3x3": conv_op(24, 24, 3), "1x1": conv_op(24, 24, 1)}, bits=(4, 8))

    p = softmax(logits)  over (operation, bits)
    y = sum_o p_o op_o(x),      p_o = sum_b p_ob;     weights and input of op_o under the mixture p_ob / p_o

`mix_bits` (in core) says how a mixture of widths is imitated by noise (QuantNAS), which needs one convolution
for an operation. With `how="ste"` every width is rounded and computed by itself, `y = sum_ob p_ob op_o(Q_b x,
Q_b W)`: the direct search that noise replaces, with a convolution for each width. An
edge counts the bit operations it is expected to cost, `sum p_ob MACs_o b^2`, and its entropy, which a search
adds to its loss so that one pair wins. `edge.choice` is that pair, `edge.fixed()` a `QuantizedOp` of it with
real quantizers: learned steps for weights (LSQ, one for each output channel), and for the input, which has
passed a ReLU, the step that suits half of a Gaussian (Cai et al. 2017), in units of its standard deviation.
The step with the least squared error is found numerically; the released code has 0.2131 at 4 bits and 0.0203
at 8.

Source: Shvetsov et al. 2024, "QuantNAS for super resolution".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from actlas.core.bit_mixture import Imitation, mix_bits
from actlas.core.errors import InputError
from actlas.core.numbers import FakeQuant, QuantSpec, fake_quant


def conv_op(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps height and width.

    Raises:
        InputError: an even kernel, or groups that do not divide the channels.
    """
    if kernel % 2 == 0 or kernel < 1:
        raise InputError(f"kernel is {kernel}; it must be odd, so that the size is kept")
    if inputs % groups or outputs % groups:
        raise InputError(f"{groups} groups do not divide {inputs} and {outputs} channels")
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


def _formats(bits: Sequence[int], where: str) -> list[QuantSpec]:
    return [QuantSpec.parse(f"int{b}-{where}-float") for b in bits]


class MixedOp(nn.Module):
    """See the module's text.

    Args:
        ops: convolutions by name, of equal input and output shapes.
        bits: widths, of weights and input alike.
        how: how a width is imitated.
        noise: standard deviation of the noise, in steps.

    Attributes:
        logits: `[operations, widths]`, trained apart from the weights.

    Raises:
        InputError: no operations or widths.
    """

    def __init__(
        self,
        ops: Mapping[str, nn.Conv2d],
        bits: Sequence[int] = (4, 8),
        *,
        how: Imitation = "noise",
        noise: float = 0.5,
    ) -> None:
        super().__init__()
        if not ops or not bits:
            raise InputError(f"an edge needs an operation and a width; given {len(ops)} and {len(bits)}")
        self.names, self.bits, self.how, self.noise = tuple(ops), tuple(bits), how, noise
        self.ops = nn.ModuleList(ops.values())
        self.logits = nn.Parameter(torch.zeros(len(ops), len(bits)))
        self._weights, self._inputs = _formats(bits, "channel"), _formats(bits, "tensor")
        self.positions = 0  # outputs of one channel and image in the last pass, for the count of operations

    @property
    def probabilities(self) -> Tensor:
        """`[operations, widths]`, summing to 1."""
        return self.logits.flatten().softmax(0).view_as(self.logits)

    def entropy(self) -> Tensor:
        """Return the entropy of the choice, nats."""
        log_p = self.logits.flatten().log_softmax(0)
        return -(log_p.exp() * log_p).sum()

    def forward(self, x: Tensor) -> Tensor:
        self.positions = x.shape[-2] * x.shape[-1]
        p = self.probabilities
        out: Tensor | None = None
        for row, op in zip(p, self.ops, strict=True):
            assert isinstance(op, nn.Conv2d)
            if self.how == "ste":
                for share, w_spec, x_spec in zip(row, self._weights, self._inputs, strict=True):
                    weight = fake_quant(op.weight.flatten(1), w_spec).view_as(op.weight)
                    y = share * _convolve(fake_quant(x, x_spec), weight, op)
                    out = y if out is None else out + y
                continue
            given = row / row.sum()
            weight = mix_bits(op.weight.flatten(1), self._weights, given, noise=self.noise)
            inner = mix_bits(x, self._inputs, given, noise=self.noise)
            y = row.sum() * _convolve(inner, weight.view_as(op.weight), op)
            out = y if out is None else out + y
        assert out is not None
        return out

    def macs(self) -> list[int]:
        """Return the multiply-adds of each operation for one image of the size seen last.

        Raises:
            InputError: no image was seen yet.
        """
        if not self.positions:
            raise InputError("an edge knows its operations after the first image; run one")
        return [self.positions * op.weight.numel() for op in self.ops if isinstance(op, nn.Conv2d)]

    def bit_operations(self) -> Tensor:
        """Return the expected bit operations of one image, differentiable."""
        cost = torch.tensor(self.macs(), dtype=self.logits.dtype, device=self.logits.device)
        squares = torch.tensor([float(b * b) for b in self.bits]).to(cost)
        return (self.probabilities * cost[:, None] * squares).sum()

    @property
    def choice(self) -> tuple[str, int]:
        """The likeliest operation and width."""
        best = int(self.logits.detach().flatten().argmax())
        return self.names[best // len(self.bits)], self.bits[best % len(self.bits)]

    def fixed(self, name: str | None = None, bits: int | None = None) -> QuantizedOp:
        """Return one operation with real quantizers; default: the choice. It starts from the shared weight.

        Raises:
            InputError: no such operation.
        """
        chosen, width = self.choice
        chosen, width = name or chosen, bits or width
        if chosen not in self.names:
            raise InputError(f"there is no operation {chosen!r}; there are {', '.join(self.names)}")
        op = self.ops[self.names.index(chosen)]
        assert isinstance(op, nn.Conv2d)
        return QuantizedOp(copy.deepcopy(op), width)


class QuantizedOp(nn.Module):
    """A convolution whose weights (LSQ) and non-negative input (half-wave steps) are quantized.

    Args:
        op: the convolution.
        bits: of both, 2 to 8.
    """

    def __init__(self, op: nn.Conv2d, bits: int) -> None:
        super().__init__()
        self.op, self.bits = op, bits
        spec = QuantSpec.parse(f"int{bits}-channel-sym")
        self.weight_quant = FakeQuant(spec, "lsq", shape=(op.weight.shape[0], 1))
        self.step = half_wave_step(bits)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quant(self.op.weight.flatten(1)).view_as(self.op.weight)
        return _convolve(half_wave(x, self.bits), weight, self.op)


def half_wave(x: Tensor, bits: int) -> Tensor:
    """Return what has passed a ReLU on `2^bits` levels from 0, straight through and clipped above.

    The step is that of half a Gaussian whose standard deviation is read off the tensor, `sqrt(2 mean x^2)`.
    """
    deviation = (2 * x.detach().square().mean()).sqrt().clamp_min(1e-8)
    step = half_wave_step(bits) * deviation
    code = (x / step).clamp(0, 2**bits - 1)
    code = code + (code.round() - code).detach()
    return code * step


@cache
def half_wave_step(bits: int) -> float:
    """Return the step of `2^bits` levels from 0 with the least squared error on a Gaussian's positive half,
    in
    standard deviations; found numerically."""
    from scipy.optimize import minimize_scalar

    top = 2**bits - 1
    x = torch.linspace(0, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * x.square())

    def error(log_step: float) -> float:
        step = math.exp(log_step)
        return float(((x - (x / step).round().clamp(0, top) * step).square() * density).sum())

    ends = (math.log(0.5 / top), math.log(8 / top))
    return math.exp(minimize_scalar(error, bounds=ends, method="bounded", options={"xatol": 1e-8}).x)


def _convolve(x: Tensor, weight: Tensor, op: nn.Conv2d) -> Tensor:
    padding = op.padding if isinstance(op.padding, str) else tuple(op.padding)
    return functional.conv2d(x, weight, op.bias, op.stride, padding, op.dilation, op.groups)
