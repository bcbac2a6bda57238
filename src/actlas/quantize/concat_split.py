"""Which layers read a concatenation of channels, found by watching one forward pass.

    concat_readers(network, ((x, t), {}))        # {"up2.conv1": (64, 64), "up2.shortcut": (64, 64), ...}

In a U-Net, decoder features and encoder skips meet in a `cat` along the channels, and their ranges differ; a
quantiser with one range wastes its levels on the wider half (Q-Diffusion, section 3.3). Here every
`torch.cat` along axis 1 is noted, its boundary travels through operations that keep each channel in its place
(norms, activation functions, arithmetic with numbers, dropout, pooling and enlarging), and the convolution or
linear map that then reads it is the answer. No names of layers are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actlas.core.network_blocks import Call, is_layer

_KEEP = {
    "group_norm", "batch_norm", "instance_norm", "silu", "silu_", "relu", "relu_", "relu6", "gelu",
    "leaky_relu", "hardtanh", "hardswish", "elu", "tanh", "sigmoid", "dropout", "dropout2d", "contiguous",
    "clone", "to", "float", "half", "detach", "interpolate", "avg_pool2d", "max_pool2d",
    "adaptive_avg_pool2d", "mul", "div", "pad", "upsample_nearest2d",
}  # fmt: skip


class _Watch(TorchFunctionMode):
    """Keeps the boundaries of concatenated tensors while a network runs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, tuple[int, ...]] = {}
        self._alive: list[Tensor] = []  # ids stay unique while their tensors live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        name = getattr(func, "__name__", "")
        if name in ("cat", "concat", "concatenate"):
            tensors = args[0] if args else kwargs.get("tensors", ())
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim in (1, 1 - out.ndim) and out.ndim >= 3 and len(tensors) > 1:
                sizes: list[int] = []
                for x in tensors:
                    sizes += self.parts.get(id(x), (x.shape[1],))
                self._note(out, tuple(sizes))
        elif name in _KEEP:
            source = next((a for a in args if isinstance(a, Tensor)), None)
            others = [a for a in args[1:] if isinstance(a, Tensor) and a.ndim > 1]
            same = source is not None and not others and out.ndim == source.ndim
            if source is not None and same and id(source) in self.parts and out.shape[1] == source.shape[1]:
                self._note(out, self.parts[id(source)])
        return out

    def _note(self, x: Tensor, sizes: tuple[int, ...]) -> None:
        self.parts[id(x)] = sizes
        self._alive.append(x)


def concat_readers(network: nn.Module, call: Call) -> dict[str, tuple[int, ...]]:
    """Return the layers that read concatenated channels, with the sizes of the parts.

    Args:
        network: any module.
        call: arguments of one forward pass; a batch of one or two is enough.
    """
    watch = _Watch()
    found: dict[str, tuple[int, ...]] = {}
    handles = []
    for path, module in network.named_modules():
        if not is_layer(module):
            continue

        def look(m: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            sizes = watch.parts.get(id(args[0]))
            if sizes is not None and isinstance(m, nn.Conv2d) and m.groups == 1:
                found[path] = sizes

        handles.append(module.register_forward_pre_hook(look))
    try:
        with torch.no_grad(), watch:
            network(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return found
