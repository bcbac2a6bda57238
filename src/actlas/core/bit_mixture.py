"""Several bit widths at once: a tensor as it would be if each width were chosen with some probability.

    y = mix_bits(w, (QuantSpec.parse("int4-channel"), QuantSpec.parse("int8-channel")), p)

    noise     y = w0 x + sum_b w_b (x + step_b n_b),      n_b ~ N(0, noise^2),     w = (p_0, p) / (p_0 + sum
              p) ~ x + noise sqrt(sum_b (w_b step_b)^2) n    one draw, as independent Gaussians add; gradient
              1 for x
    ste       y = w0 x + sum_b w_b Q_b(x)                 rounding itself, straight through

The share p_0 of the exact value is `1 / (B + 1)`, so that a search can leave quantization out. One weight is
held for all widths. True rounding noise has a standard deviation of 0.29 steps; `noise = 0.5` is QuantNAS's.
The released code of QuantNAS detaches its whole noisy value, so that x is reached through p_0 alone, and does
not divide by the sum; both are put right here.

Source: "QuantNAS for super resolution: searching for efficient quantization-friendly architectures against
quantization noise" (Shvetsov et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.numbers import QuantSpec, fake_quant, params_of

Imitation = Literal["noise", "ste"]


def shares(p: Tensor) -> Tensor:
    """Return `(w_0, w)`, float `[1 + B]`, from what the widths weigh, `[B]`: their sum is 1."""
    rest = p.new_full((1,), 1 / (len(p) + 1))
    whole = torch.cat([rest, p])
    return whole / whole.sum()


def mix_bits(
    x: Tensor,
    specs: Sequence[QuantSpec],
    p: Tensor,
    *,
    how: Imitation = "noise",
    noise: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a tensor under a mixture of number formats; see the module's text.

    Args:
        x: floating point; groups along its last axis.
        specs: the formats, B of them.
        p: what they weigh, `[B]`, not negative; need not sum to 1.
        how: see the module's text.
        noise: standard deviation of the noise, in steps.
        generator: of the noise.

    Raises:
        InputError: another number of weights than formats, an imitation that does not exist, or noise for a
            format without even steps.
    """
    if how not in get_args(Imitation):
        raise InputError(f"how is {how!r}; it must be 'noise' or 'ste'")
    if p.shape != (len(specs),) or not len(specs):
        raise InputError(f"there are {len(specs)} formats and weights of shape {list(p.shape)}; one each")
    w = shares(p)
    if how == "ste":
        out = w[0] * x
        for share, spec in zip(w[1:], specs, strict=True):
            out = out + share * fake_quant(x, spec)
        return out
    fixed, first = x.detach(), specs[0]
    variance: Tensor | float = 0.0
    for share, spec in zip(w[1:], specs, strict=True):
        if spec.grid != "int":
            raise InputError(f"noise stands for rounding to even steps, which {spec.name} has not got")
        if (spec.granularity, spec.group_size) != (first.granularity, first.group_size):
            raise InputError(f"{spec.name} and {first.name} cut rows into other groups; one cut is needed")
        variance = variance + (share * params_of(fixed, spec).scale.to(x)).square()
    assert isinstance(variance, Tensor)
    deviation = (noise * (variance + 1e-30).sqrt()).unsqueeze(-1)
    drawn = torch.randn(first.groups(fixed).shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + (drawn * deviation).reshape(x.shape)
