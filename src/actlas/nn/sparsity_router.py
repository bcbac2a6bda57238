"""Route to the experts that are predicted to be sparsest, from the weights alone.

Take the D neurons of expert j as draws: column m of W_enc_j has mean mu_j[m] and variance s2_j[m] over
them, so the pre-activation of a neuron at x is about N(mu_j . x, s2_j . x^2) and

    t_j       = mu_j . x / sqrt(2 s2_j . x^2)
    P(active) = (1 + erf(t_j)) / 2             expected L0 = D P(active)
    score_j   = -erf(t_j)                      gates w = softmax over the top-k scores

A pre-activation bias adds its mean to mu_j . x and its variance to s2_j . x^2. There are no weights to
learn; gradients reach the experts' encoders through mu and s2. Source: "Mixture of Experts Made
Intrinsically Interpretable" (MoE-X, 2025).

What is not in the equations:
* Statistics and scores are float32 whatever the dtype of the weights: in bfloat16 a variance of 1e-3
  beside weights of 0.1 has two digits.
* The variance is clamped, so that x = 0 gives P = 1/2 (or the bias's answer) and finite gradients.
* erf saturates: beyond |t| of about 4 all scores are equal in float32. Experts are ranked by -t, which
  has the same order and no ties; the gates use the score as published.
* An expert can win by dying: no neuron active, nothing predicted. `floor` is the share of active neurons
  below which an expert gains nothing more; t is reflected there, so an emptier expert scores as a
  fuller one would. `floor=0` is as published.
* Statistics are cached until the weights change. With gradients on they are computed at each call, because
  each backward pass needs its own graph; that costs O(M D d), as much as running M / k tokens.
  PyTorch's count of changes misses those by fused optimizers and through `.data`, so a sample of the
  weights is compared too. `forget()` drops the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.nn.experts import Routing

_TINY = 1e-24  # of a variance: its inverse square root, cubed in the backward pass, is still a float32
_SAMPLE = 64  # weights that are compared to see whether any changed


class SparsityRouter(nn.Module):
    """The router; it has no parameters and is given the experts' encoders at each call.

    Args:
        top_k: experts that a token runs.
        floor: see the module docstring; in [0, 1/2).

    Raises:
        InputError: a floor outside of its range.
    """

    def __init__(self, top_k: int = 2, floor: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= floor < 0.5:
            raise InputError(f"floor is {floor:g}; it is a share of active neurons, at least 0 and below 0.5")
        self.top_k, self.floor = top_k, floor
        self._known: tuple[tuple[object, ...], tuple[Tensor, ...]] | None = None

    def statistics(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return mean `[M, d]` and variance `[M, d]` over the neurons, and those of the bias `[M]`, float32.

        Args:
            weight: encoders `[M, D, d]`.
            bias: `[M, D]`.
        """
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            self.forget()
            return _statistics(weight, bias)
        key = _key(weight, bias)
        if key is None:
            return _statistics(weight, bias)
        if self._known is None or self._known[0] != key:
            with torch.no_grad():
                self._known = (key, _statistics(weight, bias))
        return self._known[1]

    def forget(self) -> None:
        """Drop the cached statistics."""
        self._known = None

    def standardised(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return t `[..., M]`, float32: the mean pre-activation in units of sqrt(2) standard deviations."""
        mean, variance, bias_mean, bias_variance = self.statistics(weight, bias)
        x = x.float()
        centre = x @ mean.T + bias_mean
        spread = (x * x) @ variance.T + bias_variance
        return centre * torch.rsqrt((2 * spread).clamp(min=_TINY))

    def predicted_l0(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return how many neurons of each expert are expected to be active, float32 `[..., M]`."""
        return weight.shape[1] * 0.5 * (1 + torch.erf(self.standardised(x, weight, bias)))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Routing:
        """Route rows `[n, d]`."""
        t = self.standardised(x, weight, bias)
        if self.floor > 0.0:
            least = _inverse_erf(2 * self.floor - 1)
            t = least + (t - least).abs()
        scores = -torch.erf(t)
        experts = (-t).topk(self.top_k, dim=-1).indices
        gates = torch.softmax(scores.gather(-1, experts), dim=-1)
        return Routing(experts, gates, scores)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_known": None}


def _statistics(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    wide = weight.float()
    variance, mean = torch.var_mean(wide, dim=1, correction=0)
    if bias is None:
        zero = mean.new_zeros(len(mean))
        return mean, variance, zero, zero
    bias_variance, bias_mean = torch.var_mean(bias.float(), dim=1, correction=0)
    return mean, variance, bias_mean, bias_variance


def _key(weight: Tensor, bias: Tensor | None) -> tuple[object, ...] | None:
    """Return what changes when the weights do; `None` where PyTorch does not count changes."""
    key: list[object] = []
    for tensor in (weight, bias):
        if tensor is None:
            continue
        if tensor.is_inference() or torch.compiler.is_compiling():
            return None
        key += [tensor._version, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)]
        if tensor.requires_grad:  # somebody may be training it
            key += tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLE)].tolist()
    return tuple(key)


def _inverse_erf(y: float) -> float:
    return (
        float(torch.erfinv(torch.tensor(y, dtype=torch.float64)))
        if abs(y) < 1
        else math.copysign(math.inf, y)
    )
