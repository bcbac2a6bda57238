"""A small super-resolution network, searched or fixed.

    net = SuperResolution(super_edges(channels=24), channels=24)              # a super-net: every edge a
    MixedOp net.choice                                                                # [("3x3", 8), ("1x1",
    4), ...] fixed = net.fixed()                                                       # one quantised
    operation an edge

    y = upsample(x) + shuffle(tail(h_n)),    h_0 = head(x),    h_i = h_{i-1} + phi(std h) op_i(relu(norm h))

Head and tail are 3 x 3 convolutions in full precision. `AdaptiveSkipNorm` says what norm and phi are.

Source: Shvetsov et al. 2024, "QuantNAS for super resolution", whose bodies are larger (information
distillation, attention); the search is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from actlas.core.bit_mixture import Imitation
from actlas.core.errors import InputError
from actlas.nn.adaptive_skip_norm import AdaptiveSkipNorm, Norm
from actlas.nn.mixed_op import MixedOp, QuantizedOp, conv_op


def super_edges(
    channels: int = 24, edges: int = 3, bits: Sequence[int] = (4, 8), how: Imitation = "noise"
) -> list[MixedOp]:
    """Return edges that choose among 1 x 1, 3 x 3 and grouped 5 x 5 convolutions at each width."""

    def edge() -> MixedOp:
        ops = {
            "1x1": conv_op(channels, channels, 1),
            "3x3": conv_op(channels, channels, 3),
            "5x5/4": conv_op(channels, channels, 5, groups=4),
        }
        return MixedOp(ops, bits, how=how)

    return [edge() for _ in range(edges)]


class SuperResolution(nn.Module):
    """See the module's text.

    Args:
        edges: what stands between head and tail, each keeping `[n, channels, height, width]`.
        channels: inside.
        scale: of height and width.
        norm: of every edge.
        image_channels: of the images.

    Raises:
        InputError: no edges, or a scale below 2.
    """

    def __init__(
        self,
        edges: Sequence[nn.Module],
        channels: int = 24,
        scale: int = 2,
        norm: Norm = "adaptive",
        image_channels: int = 1,
    ) -> None:
        super().__init__()
        if not edges or scale < 2:
            raise InputError(f"{len(edges)} edges, scale {scale}: one edge and a scale of 2 at least")
        self.scale, self.channels, self.norm, self.image_channels = scale, channels, norm, image_channels
        self.head = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.body = nn.ModuleList(AdaptiveSkipNorm(_Positive(e), channels, norm) for e in edges)
        self.tail = nn.Conv2d(channels, image_channels * scale**2, 3, padding=1)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.tail.weight.mul_(0.1)

    @property
    def edges(self) -> list[nn.Module]:
        """The edges."""
        return [block.branch.inner for block in self.body]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        for block in self.body:
            h = block(h)
        enlarged = functional.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)
        y: Tensor = enlarged + functional.pixel_shuffle(self.tail(h), self.scale)
        return y

    @property
    def choice(self) -> list[tuple[str, int]]:
        """What every edge would be."""
        return [e.choice for e in self.edges if isinstance(e, MixedOp)]

    def fixed(
        self, choice: Sequence[tuple[str, int]] | None = None, *, fresh: bool = False
    ) -> SuperResolution:
        """Return the network with one quantised operation an edge.

        Args:
            choice: operation and bits of each edge; default the search's.
            fresh: new weights everywhere; default those of the super-net.

        Raises:
            InputError: another number of choices than edges, or the edges are fixed already.
        """
        mixed = [e for e in self.edges if isinstance(e, MixedOp)]
        chosen = self.choice if choice is None else list(choice)
        if len(mixed) != len(self.edges) or len(chosen) != len(mixed):
            raise InputError(f"{len(chosen)} choices do not fit {len(mixed)} edges that can still choose")
        ops: list[QuantizedOp] = [e.fixed(name, bits) for e, (name, bits) in zip(mixed, chosen, strict=True)]
        net = SuperResolution(ops, self.channels, self.scale, self.norm, self.image_channels)
        if fresh:
            for op in ops:
                op.op.reset_parameters()
            return net
        own = {k: v for k, v in self.state_dict().items() if ".branch." not in k}
        net.load_state_dict(own, strict=False)
        return net


class _Positive(nn.Module):
    """ReLU, then the edge."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(functional.relu(x))
        return y
