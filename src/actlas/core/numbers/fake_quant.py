"""Fake quantization with a gradient: forward on the grid, backward by a chosen estimator.

y = fake_quant(x, spec, grad="ste")

ste     dL/dx = dL/dy                                    straight through (Bengio et al. 2013)
clip    the same inside the representable range, 0 outside it
trust   the same where |y - x| is at most half a step (Panferov et al. 2025, QuEST): only clipped values
        lose their gradient, and only those that were clipped by more than half a step
lsq     straight through and clipped, and the scale is learned (Esser et al. 2020):
        ds = round(x/s) - x/s inside, the clipped end outside, times 1 / sqrt(n Q_p)
noise   forward x + step * N(0, 1/4) instead of rounding (QuantNAS)
none    no gradient
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.numbers.grids import QuantParams, _wide, params_of, quantize, representable
from actlas.core.numbers.spec import QuantSpec

Gradient = Literal["ste", "clip", "trust", "noise", "none"]
_SLACK = 1e-6


def fake_quant(
    x: Tensor,
    spec: QuantSpec,
    params: QuantParams | None = None,
    *,
    grad: Gradient = "ste",
    generator: torch.Generator | None = None,
    noise: float = 0.5,
) -> Tensor:
    """Return x on the grid, with a gradient for x.

    Args:
        x: floating point; groups along the last axis.
        spec: the format.
        params: scales, taken as constants; default: those of x.
        grad: the estimator; see the module's text.
        generator, noise: of the noise, whose standard deviation is `noise` steps.

    Raises:
        InputError: an estimator that does not exist or that the format has not got.
    """
    if grad not in get_args(Gradient):
        raise InputError(f"there is no gradient {grad!r}; there are {', '.join(get_args(Gradient))}")
    fixed = x.detach()
    if params is None:
        params = params_of(fixed, spec)
    if grad == "noise":
        if spec.grid != "int":
            raise InputError(f"noise stands for rounding to even steps, which {spec.name} has not got")
        step = _wide(params.scale).to(x.device).unsqueeze(-1)
        drawn = torch.randn(spec.groups(fixed).shape, generator=generator, device=x.device)
        return x + (drawn * step * noise).reshape(x.shape).to(x.dtype)
    value = quantize(fixed, spec, params)
    if grad == "none":
        return value
    if grad == "ste":
        return x + (value - x).detach()
    groups = spec.groups(fixed)
    if grad == "clip":
        low, high = (end.to(x.device).unsqueeze(-1) for end in representable(spec, params))
        inside = (groups >= low) & (groups <= high)
    else:
        if spec.grid != "int":
            raise InputError(f"trust is measured in even steps, which {spec.name} has not got")
        half = _wide(params.scale).to(x.device).unsqueeze(-1) / 2
        inside = (spec.groups(value) - groups).abs() <= half * (1 + _SLACK) + torch.finfo(torch.float32).tiny
    passed = x * inside.reshape(x.shape)
    return passed + (value - passed).detach()


class FakeQuant(nn.Module):
    """Fake quantization as a module, with a range of its own or a learned one.

    Args:
        spec: the format.
        grad: `"lsq"` learns the scale (and the zero point, for asymmetric integers); otherwise see
            `fake_quant`.
        params: a static range; default: of what comes in (dynamic), or with `"lsq"` initialised by the
            first input: `s = 2 mean|x| / sqrt(Q_p)`.
        shape: with `"lsq"`, of the scale `[rows, groups]`; default one scale.
    """

    scale: Tensor | nn.Parameter | None
    zero: Tensor | nn.Parameter | None

    def __init__(
        self,
        spec: QuantSpec,
        grad: Literal["ste", "clip", "trust", "noise", "none", "lsq"] = "ste",
        params: QuantParams | None = None,
        shape: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.spec, self.grad = spec, grad
        if grad == "lsq":
            if spec.grid != "int" or spec.centred:
                raise InputError(f"a learned scale is for integers that have a 0, not {spec.name}")
            self.scale = nn.Parameter(torch.ones(shape))
            self.zero = None if spec.symmetric else nn.Parameter(torch.zeros(shape))
            self.ready: Tensor
            self.register_buffer("ready", torch.tensor(params is not None))
            if params is not None:
                self._start(params)
        else:
            self.register_buffer("scale", None if params is None else params.scale)
            self.register_buffer("zero", None if params is None else params.zero)

    def _start(self, params: QuantParams) -> None:
        with torch.no_grad():
            assert isinstance(self.scale, nn.Parameter)
            self.scale.copy_(params.scale)
            if self.zero is not None and params.zero is not None:
                self.zero.copy_(params.zero)
            self.ready.fill_(True)

    @property
    def params(self) -> QuantParams | None:
        """The range as it stands; `None`: it is taken from each input."""
        if self.scale is None:
            return None
        zero = None if self.zero is None else self.zero.detach()
        if self.grad == "lsq" and zero is not None:
            zero = zero.round().clamp(0, 2**self.spec.bits - 1)
        return QuantParams(self.scale.detach().clamp_min(_SLACK) if self.grad == "lsq" else self.scale, zero)

    def forward(self, x: Tensor) -> Tensor:
        if self.grad != "lsq":
            grad: Any = self.grad
            return fake_quant(x, self.spec, self.params, grad=grad)
        assert self.scale is not None
        low, high = (-(2 ** (self.spec.bits - 1)), 2 ** (self.spec.bits - 1) - 1)
        if self.zero is not None:
            low, high = 0, 2**self.spec.bits - 1
        if not bool(self.ready):
            groups = _wide(self.spec.groups(x.detach()))
            axes = tuple(i for i in range(2) if self.scale.shape[i] == 1)
            mean = groups.abs().mean(-1)
            for axis in axes:
                mean = mean.mean(axis, keepdim=True)
            start = QuantParams((2 * mean / high**0.5).clamp_min(_SLACK))
            if self.zero is not None:
                start = QuantParams(start.scale, torch.full_like(mean, 2 ** (self.spec.bits - 1)))
            self._start(start)
        groups = self.spec.groups(x)
        slow = 1 / (groups.numel() / self.scale.numel() * high) ** 0.5
        scale = _slowed(self.scale, slow).clamp_min(_SLACK).unsqueeze(-1)
        offset: Tensor | float = 0.0
        if self.zero is not None:
            zero = _slowed(self.zero, slow)
            offset = _rounded(zero.clamp(low, high)).unsqueeze(-1)
        code = _rounded((groups / scale + offset).clamp(low, high))
        return ((code - offset) * scale).reshape(x.shape).to(x.dtype)


def _rounded(x: Tensor) -> Tensor:
    """round, straight through."""
    return x + (x.round() - x).detach()


def _slowed(x: Tensor, by: float) -> Tensor:
    """x, with its gradient times `by`."""
    return (x - x * by).detach() + x * by
