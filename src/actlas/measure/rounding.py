"""Round-to-nearest fake quantization, installed on a module and always taken back bit for bit.

    Scheme(name, weight_bits=8, activation_bits=None, group=None, symmetric=False)
    SCHEMES["w8a8"], ["w4-channel"], ["w4-g64"], ["w3-g64"], ["a4"], ...
    fake_quant(x, bits, *, group=None, symmetric=False) -> Tensor of the same shape and dtype
    with rounded(module, scheme, skip=()) as names: ...

A tensor is put on a grid of `2^b` levels along its last axis, by row or by groups of a row:

    asymmetric   s = (max - min) / (2^b - 1),  z = round(-min / s),  q = clip(round(x / s) + z, 0, 2^b - 1)
    symmetric    s = max|x| / (2^(b-1) - 1),   q = clip(round(x / s), -2^(b-1), 2^(b-1) - 1)

and read back as `s (q - z)` or `s q`. The range always holds 0. A row is an output channel of a weight
(`[out, in]`, convolution kernels flattened to it) and a token of an activation.

The weight of a layer is exchanged when the layer runs and given back when it is done: one layer's copy is
held at a time, the parameter object stays the same, and its old storage returns untouched, also after an
exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Scheme:
    """A number format for the linear and convolutional layers of a model.

    Attributes:
        name: what it is called.
        weight_bits, activation_bits: `None` leaves them alone.
        group: input channels that share a scale in the weights; `None`: a whole output channel.
        symmetric: grid of weights and activations.
    """

    name: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    group: int | None = None
    symmetric: bool = False

    def weight(self, weight: Tensor) -> Tensor:
        """Return the weight `[out, in]` on its grid."""
        if self.weight_bits is None:
            return weight
        return fake_quant(weight, self.weight_bits, group=self.group, symmetric=self.symmetric)

    def activation(self, x: Tensor) -> Tensor:
        """Return activations on their grid, one range a token (or image, for convolutions)."""
        if self.activation_bits is None:
            return x
        return fake_quant(x, self.activation_bits, symmetric=self.symmetric)

    def describe(self) -> str:
        """Return e.g. `"4-bit weights (groups of 64)"`."""
        parts = []
        if self.weight_bits is not None:
            where = f"groups of {self.group}" if self.group else "per channel"
            parts.append(f"{self.weight_bits}-bit weights ({where})")
        if self.activation_bits is not None:
            parts.append(f"{self.activation_bits}-bit activations (per token)")
        kind = "symmetric" if self.symmetric else "asymmetric"
        return " and ".join(parts) + f", {kind} round-to-nearest"


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("w8a8", 8, 8, symmetric=True),
        Scheme("w8", 8, symmetric=True),
        Scheme("a8", None, 8, symmetric=True),
        Scheme("w4-channel", 4),
        Scheme("w4-g64", 4, group=64),
        Scheme("w3-g64", 3, group=64),
        Scheme("a4", None, 4),
        Scheme("w4a4", 4, 4),
    )
}


def scheme(name: str | Scheme) -> Scheme:
    """Return a scheme by name.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(name, Scheme):
        return name
    if name not in SCHEMES:
        raise InputError(f"unknown number format {name!r}: one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def fake_quant(x: Tensor, bits: int, *, group: int | None = None, symmetric: bool = False) -> Tensor:
    """Round to the nearest of `2^bits` levels along the last axis; see the module's text.

    Args:
        x: floating point `[..., n]`.
        bits: 2 to 16.
        group: entries of a row that share a range; the last group may be shorter.
        symmetric: levels around 0, with no zero point.

    Returns:
        the values on the grid, same shape and dtype; computed in float32 or better.

    Raises:
        InputError: bits out of range, or a group that is not positive.
    """
    if not 2 <= bits <= 16:
        raise InputError(f"bits must lie between 2 and 16, not {bits}")
    if group is not None and group < 1:
        raise InputError(f"a group must hold at least one channel, not {group}")
    n = x.shape[-1]
    if group is not None and group >= n:
        group = None
    if group is not None and n % group:
        whole = n - n % group
        head = fake_quant(x[..., :whole], bits, group=group, symmetric=symmetric)
        return torch.cat([head, fake_quant(x[..., whole:], bits, symmetric=symmetric)], -1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide if group is None else wide.unflatten(-1, (n // group, group))
    if symmetric:
        top = 2 ** (bits - 1) - 1
        step = rows.abs().amax(-1, keepdim=True) / top
        step = torch.where(step == 0, 1.0, step)
        out = (rows / step).round_().clamp_(-top - 1, top).mul_(step)
    else:
        levels = 2**bits - 1
        low, high = rows.amin(-1, keepdim=True).clamp_max(0), rows.amax(-1, keepdim=True).clamp_min(0)
        step = (high - low) / levels
        step = torch.where(step == 0, 1.0, step)
        zero = (-low / step).round_().clamp_(0, levels)
        out = (rows / step).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(step)
    return out.reshape(x.shape).to(x.dtype)


def weighted_modules(module: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return the linear and convolutional layers by name, without those named in `skip`.

    A layer whose weight is tied to an embedding is left out: formats here are for the layers between the
    embedding and the output head.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return {
        name: part
        for name, part in module.named_modules()
        if _has_weight(part) and name not in skip and id(part.weight) not in embeddings
    }


def _has_weight(part: nn.Module) -> bool:
    """Linear maps and convolutions, their subclasses, and GPT-2's `Conv1D`."""
    return isinstance(part, (nn.Linear, *CONVOLUTIONS)) or type(part).__name__ == "Conv1D"


def as_rows(part: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as `[out, in]`; kernels are flattened, GPT-2's `Conv1D` is transposed."""
    return weight.T if type(part).__name__ == "Conv1D" else weight.flatten(1)


def from_rows(part: nn.Module, rows: Tensor) -> Tensor:
    """Undo `as_rows`."""
    weight = part.weight
    assert isinstance(weight, Tensor)
    return rows.T.contiguous() if type(part).__name__ == "Conv1D" else rows.reshape(weight.shape)


def quantize_input(part: nn.Module, x: Tensor, chosen: Scheme) -> Tensor:
    """Return a layer's input on its grid: a range for each token, or for each image of a convolution."""
    if isinstance(part, CONVOLUTIONS):
        return chosen.activation(x.flatten(1)).reshape(x.shape)
    return chosen.activation(x)


@contextmanager
def rounded(module: nn.Module, chosen: str | Scheme, skip: Sequence[str] = ()) -> Iterator[list[str]]:
    """Run the block with every linear and convolutional layer in a number format.

    Args:
        module: the model's module.
        chosen: a scheme or its name.
        skip: names of layers to leave alone.

    Yields:
        the names of the layers that are changed.
    """
    chosen = scheme(chosen)
    parts = weighted_modules(module, skip)
    held: dict[str, Tensor] = {}
    handles = []

    def give_back(name: str) -> None:
        if name in held:
            parts[name].weight.data = held.pop(name)

    def before(name: str) -> Callable[..., Any]:
        def hook(part: nn.Module, args: tuple[Any, ...]) -> Any:
            weight = part.weight
            assert isinstance(weight, Tensor)
            if chosen.weight_bits is not None and name not in held:
                held[name] = weight.data
                weight.data = from_rows(part, chosen.weight(as_rows(part, weight.data)))
            if chosen.activation_bits is not None and args and isinstance(args[0], Tensor):
                return (quantize_input(part, args[0], chosen), *args[1:])
            return None

        return hook

    try:
        for name, part in parts.items():
            handles.append(part.register_forward_pre_hook(before(name)))
            handles.append(
                part.register_forward_hook(lambda *_, name=name: give_back(name), always_call=True)
            )
        with torch.no_grad():
            yield list(parts)
    finally:
        for handle in handles:
            handle.remove()
        for name in list(held):
            give_back(name)
