"""What the reproduction of QuantNAS runs: photographs, searches, trained networks and their scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from actlas.core.intervals import bootstrap_mean
from actlas.core.measurement import Measurement

HELD_OUT = ("flower", "chelsea")
LOGIT_RATE = 0.05  # the paper's 3e-4 is for tens of thousands of steps


class Data:
    """Patches of photographs: low and high resolution luma."""

    def __init__(self, patches: int, batch: int, seed: int) -> None:
        from actlas.data.pictures import images
        from actlas.measure.psnr import luma

        photos = images("photos", size=256)
        y = luma(photos.pixels).clamp(0, 1)
        held = [i for i, n in enumerate(photos.names) if n in HELD_OUT]
        learn = [i for i in range(len(photos.names)) if i not in held and photos.names[i] != "camera"]
        self.names = [photos.names[i] for i in learn]
        generator = torch.Generator().manual_seed(seed)
        self.high = _cut(y[learn], patches, generator)
        self.low = _halve(self.high)
        self.test_high = y[held].unfold(2, 64, 64).unfold(3, 64, 64).reshape(-1, 1, 64, 64)
        self.test_low = _halve(self.test_high)
        self.batch, self.seed = batch, seed

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (low, high) without end, the same for every network."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        while True:
            rows = torch.randint(len(self.high), (self.batch,), generator=generator)
            yield self.low[rows], self.high[rows]

    def bicubic(self) -> np.ndarray:
        """Return the PSNR of each held-out patch without a network."""
        from actlas.measure.psnr import psnr

        enlarged = functional.interpolate(self.test_low, scale_factor=2, mode="bicubic", align_corners=False)
        return psnr(enlarged, self.test_high, crop_border=2).clamp_max(60).numpy()


def _cut(photos: Tensor, n: int, generator: torch.Generator, size: int = 32) -> Tensor:
    which = torch.randint(len(photos), (n,), generator=generator).tolist()
    tops, lefts = (
        torch.randint(photos.shape[i] - size + 1, (n,), generator=generator).tolist() for i in (-2, -1)
    )
    return torch.stack(
        [photos[i, :, t : t + size, c : c + size] for i, t, c in zip(which, tops, lefts, strict=True)]
    )


def _halve(x: Tensor) -> Tensor:
    return functional.interpolate(
        x, scale_factor=0.5, mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)


class Lab:
    """Searches, trains and scores networks of one size on one set of patches."""

    def __init__(self, data: Data, channels: int, search: int, train: int, seed: int) -> None:
        self.data, self.channels, self.steps, self.train, self.seed = data, channels, search, train, seed

    def searched(self, how: Any, penalty: float, entropy: float) -> tuple[Any, Any]:
        from actlas.nn.super_resolution import SuperResolution, super_edges
        from actlas.training.quant_nas import search

        torch.manual_seed(self.seed)
        net = SuperResolution(super_edges(self.channels, how=how), self.channels)
        trace = search(
            net, self.data.batches(), steps=self.steps, lr_logits=LOGIT_RATE, entropy=entropy, penalty=penalty
        )
        return net, trace

    def fresh(self, choice: Any, norm: Any) -> Any:
        from actlas.nn.super_resolution import SuperResolution, super_edges

        torch.manual_seed(self.seed)
        return SuperResolution(super_edges(self.channels), self.channels, norm=norm).fixed(choice, fresh=True)

    def trained(self, net: Any) -> tuple[np.ndarray, float]:
        """Return the PSNR of each held-out patch, and the bit operations of the edges for a 16 x 16 input."""
        from actlas.measure.bit_operations import bit_operations
        from actlas.measure.psnr import psnr
        from actlas.training.quant_nas import train_images

        torch.manual_seed(self.seed)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.reset_parameters()
        with torch.no_grad():
            net.tail.weight.mul_(0.1)
            net.tail.bias.zero_()
        train_images(net, self.data.batches(), steps=self.train)
        with torch.no_grad():
            values = psnr(net(self.data.test_low), self.data.test_high, crop_border=2).clamp_max(60).numpy()
        macs = bit_operations(net, self.data.low[:1]).details["macs"]
        cost = sum(n * int(w.split("x")[0]) ** 2 for w, n in macs.items() if w != "32x32")
        return values, float(cost)

    def psnr(self, values: np.ndarray, **group: str) -> Measurement:
        low, high = bootstrap_mean(values, seed=self.seed)
        return Measurement(
            "PSNR", float(values.mean()), "dB", len(values), low, high, "bootstrap over patches", self.seed,
                group=group,
            better="higher",
        )  # fmt: skip

    def gap(self, name: str, values: np.ndarray, other: np.ndarray, **group: str) -> Measurement:
        low, high = bootstrap_mean(values - other, seed=self.seed)
        return Measurement(
            name, float((values - other).mean()), "dB", len(values), low, high,
                "paired bootstrap over patches",
            self.seed, group=group,
        )  # fmt: skip
