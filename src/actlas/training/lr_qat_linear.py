"""A linear layer whose low-rank part lies inside the rounding, so that it vanishes into the integers.

    W_hat = s clip(round(Phi0 + (alpha / r) U D), -2^(b-1), 2^(b-1) - 1),     Phi0 = phi(W0 / s0), frozen

U `[out, r]` (zero at the start) and D `[r, in]` (Kaiming uniform) are trained, and the scale s; s0 in Phi0
stays. phi keeps W0 / s0 in few bytes:

    fixed8   clipped to the grid, times 2^(8-b), rounded to int8: 8 - b bits of fraction, so that small U D
             can flip a rounding
    int      rounded to the grid, in int8: no fraction; U D must reach half a step before anything changes
    bf16, fp32

The backward pass rounds again instead of keeping W_hat: for a batch nothing of the size `[out, in]` is held
besides Phi0. With G = dL/dW_hat = dY^T X, straight through the rounding and zero where it was clipped,

    dV = s G inside,   dU = (alpha / r) dV D^T,   dD = (alpha / r) U^T dV,   ds = sum over the group of G q.

`merge()` gives the `QuantLinear` of the same integers and scales: the same outputs, bit for bit, without U
and D.

Source: Bondarenko, Del Chiaro and Nagel 2024, "Low-Rank Quantization-Aware Training for LLMs", and its code.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.layout import weight_matrix
from actlas.core.numbers import QuantParams, QuantSpec, fake_quant, lp_search
from actlas.core.quant_linear import ActQuant, QuantLinear

Downcast = Literal["fixed8", "int", "bf16", "fp32"]
Start = Literal["zero", "svd"]
_ROUNDS = 4  # of the alternation that finds a start by singular vectors


class LowRankQuantLinear(nn.Module):
    """See the module's text.

    Args:
        linear: where it starts.
        spec: format of the weight: symmetric integers of 2 to 7 bits, any granularity.
        rank, alpha: r and alpha.
        downcast: phi.
        start: `"zero"`, or `"svd"`: U D is what is left of W0 / s0 after rounding, at rank r, and Phi0 is
            W0 / s0 without it.
        act: format of the inputs, dynamic (`None`: left as they are).
        recompute: whether the backward pass rounds again; else W_hat is kept, as autograd does.
        params: s0; default the scale with the least L4 error (`lp_search`).
        tries: ranges tried for it, from the whole one down to a fifth.
        seed: of D.
        where: the layer's name, for messages.

    Raises:
        InputError: a format without symmetric integers, 8 bits or more in fixed8 (no fraction is left), or a
            rank out of range.
        NonFiniteError: the weight holds NaN or infinities.
    """

    up: nn.Parameter
    down: nn.Parameter
    scale: nn.Parameter
    frozen: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Module,
        spec: QuantSpec,
        *,
        rank: int = 32,
        alpha: float = 1.0,
        downcast: Downcast = "fixed8",
        start: Start = "zero",
        act: QuantSpec | None = None,
        recompute: bool = True,
        params: QuantParams | None = None,
        tries: int = 80,
        seed: int = 0,
        where: str = "the layer",
    ) -> None:
        super().__init__()
        weight = weight_matrix(linear).detach().float()
        _check(spec, rank, weight, downcast, start, where)
        self.spec, self.act_spec, self.downcast = spec, act, downcast
        self.recompute, self.where, self.factor = recompute, where, alpha / rank
        self.out_features, self.in_features = weight.shape
        self.low, self.high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
        own = getattr(linear, "bias", None)
        self.register_buffer("bias", None if own is None else own.detach().float().clone())
        scale = (
            (params or lp_search(weight, spec, p=4.0, steps=tries, shrink=0.8 / tries)).scale.detach().float()
        )
        wanted = self._grouped(weight) / scale.unsqueeze(-1)
        wanted = wanted.reshape(weight.shape)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.in_features)  # Kaiming uniform with a = sqrt 5, as for nn.Linear
        down = (torch.rand(rank, self.in_features, generator=generator) * 2 - 1) * bound
        up = torch.zeros(self.out_features, rank)
        if start == "svd":
            up, down = self._residual_factors(wanted, rank)
            wanted = wanted - self.factor * up @ down
        self.register_buffer("frozen", self._downcast(wanted))
        self.scale = nn.Parameter(scale)
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        self.to(weight.device)

    def _grouped(self, x: Tensor) -> Tensor:
        return self.spec.groups(x)

    def _downcast(self, wanted: Tensor) -> Tensor:
        """phi."""
        if self.downcast == "fp32":
            return wanted
        if self.downcast == "bf16":
            return wanted.bfloat16()
        if self.downcast == "int":
            return wanted.round().clamp(self.low, self.high).to(torch.int8)
        fraction = 2 ** (8 - self.spec.bits)
        return (wanted.clamp(self.low, self.high) * fraction).round().to(torch.int8)

    def phi(self) -> Tensor:
        """Return Phi0 as numbers, float32 `[out, in]`."""
        if self.downcast == "fixed8":
            return self.frozen.float() / 2 ** (8 - self.spec.bits)
        return self.frozen.float()

    def _residual_factors(self, wanted: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return U, D so that (alpha / r) U D is the rank-r part of what rounding leaves, found by turns."""
        part = torch.zeros_like(wanted)
        up, down = wanted.new_zeros(len(wanted), rank), wanted.new_zeros(rank, wanted.shape[1])
        for _ in range(_ROUNDS):
            left = wanted - (wanted - part).round().clamp(self.low, self.high)
            u, s, v = torch.linalg.svd(left.double(), full_matrices=False)
            root = s[:rank].sqrt()
            up, down = (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()
            part = up @ down
        spread = math.sqrt(self.factor)
        return up / spread, down / spread

    def integers(self) -> Tensor:
        """Return the integers of the grid, float `[out, in]`, without gradients."""
        with torch.no_grad():
            return (self.phi() + self.factor * self.up @ self.down).round().clamp(self.low, self.high)

    def stored_params(self) -> QuantParams:
        """Return the scale as `merge` stores it."""
        return QuantParams(self.scale.detach().clamp_min(1e-12)).stored(self.spec)

    def quantized(self) -> Tensor:
        """Return W_hat, float32 `[out, in]`, through autograd."""
        v = self.phi() + self.factor * self.up @ self.down
        code = (v + (v.round() - v).detach()).clamp(self.low, self.high)
        stored = self.scale + (self.stored_params().scale.float() - self.scale).detach()
        return (self._grouped(code) * stored.unsqueeze(-1)).reshape(code.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.act_spec is not None:
            x = fake_quant(x, self.act_spec)
        if not self.recompute or not torch.is_grad_enabled():
            return F.linear(x, self.quantized(), self.bias)
        y: Tensor = _RoundedProduct.apply(x, self.up, self.down, self.scale, self)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def merge(self) -> QuantLinear:
        """Return the layer of the same integers and scales."""
        codes = (self.integers() - self.low).to(torch.uint8)
        return QuantLinear.of(
            self,
            self.spec,
            params=QuantParams(self.scale.detach().clamp_min(1e-12)),
            codes=codes,
            act=None if self.act_spec is None else ActQuant(self.act_spec),
            weight=codes.float(),
            bias=self.bias,
            where=self.where,
        )


class _RoundedProduct(torch.autograd.Function):
    """`x W_hat^T`, keeping x and the factors alone for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, down: Tensor, scale: Tensor, layer: LowRankQuantLinear
    ) -> Tensor:
        ctx.save_for_backward(x, up, down, scale)
        ctx.layer = layer
        return F.linear(x, layer.quantized())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, _ = ctx.saved_tensors
        layer: LowRankQuantLinear = ctx.layer
        rounded = (layer.phi() + layer.factor * up @ down).round()
        inside = (rounded >= layer.low) & (rounded <= layer.high)
        code = rounded.clamp_(layer.low, layer.high)
        stored = layer.stored_params().scale.float().unsqueeze(-1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (layer._grouped(code) * stored).reshape(code.shape)
        g = dy.flatten(0, -2).T @ x.flatten(0, -2)
        ds = (layer._grouped(g) * layer._grouped(code)).sum(-1)
        dv = (layer._grouped(g) * stored).reshape(code.shape).mul_(inside).mul_(layer.factor)
        return dx, dv @ down.T, up.T @ dv, ds, None


def _check(spec: QuantSpec, rank: int, weight: Tensor, downcast: str, start: str, where: str) -> None:
    if downcast not in get_args(Downcast):
        raise InputError(f"downcast is {downcast!r}; it must be {', '.join(get_args(Downcast))}")
    if start not in get_args(Start):
        raise InputError(f"start is {start!r}; it must be 'zero' or 'svd'")
    if spec.grid != "int" or not spec.symmetric:
        raise InputError(f"{where}: {spec.name} has no symmetric integers; take e.g. int3-channel-sym")
    if spec.bits > 7:
        raise InputError(f"{where}: {spec.bits} bits leave no fraction in 8 bits; take 2 to 7 bits")
    if not 1 <= rank <= min(weight.shape):
        raise InputError(
            f"{where}: rank is {rank}; this {weight.shape[0]} x {weight.shape[1]} map allows 1 to "
            f"{min(weight.shape)}"
        )
    spec.check(weight.shape[1], where)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{where} holds NaN or infinite weights; they must be finite")
