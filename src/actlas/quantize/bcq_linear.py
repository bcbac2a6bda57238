"""BCQLinear: a linear layer whose weight is a sum of scaled signs.

    y = sum_i alpha_i (s_i x) + offset sum(x) + b

A few tokens at a time go through the look-up kernel (`kernels.binary_coded`); more are multiplied with the
weight that the signs stand for, which is faster from a handful of tokens on, because a look-up's time grows
with the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.swap import register_module
from actlas.kernels.binary_coded import BinaryCoded, lookup_product

#: Up to as many tokens are looked up.
MOST_TOKENS = 4


@register_module
class BCQLinear(nn.Module):
    """See the module's text.

    Args:
        coded: the weight.
        bias: `[rows]` or `None`.
    """

    signs: Tensor
    alpha: Tensor
    offset: Tensor | None
    bias: Tensor | None

    def __init__(self, coded: BinaryCoded, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = coded.rows, coded.columns
        self.register_buffer("signs", coded.signs)
        self.register_buffer("alpha", coded.alpha)
        self.register_buffer("offset", coded.offset)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._coded: BinaryCoded | None = None

    @property
    def coded(self) -> BinaryCoded:
        """The weight, with its layout for the kernel, made once for the tensors that are here now."""
        found = self._coded
        if found is None or found.signs is not self.signs or found.alpha is not self.alpha:
            found = self._coded = BinaryCoded(self.signs, self.alpha, self.offset)
        return found

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with, float32 `[out, in]`."""
        return self.coded.dequantised()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, without the bias."""
        return self.coded.bits_per_weight

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` for inputs `[..., in]`."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= MOST_TOKENS and not (torch.is_grad_enabled() and x.requires_grad):
            y = lookup_product(self.coded, rows).to(x.dtype).view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def config(self) -> Mapping[str, Any]:
        """Return what `from_config` needs."""
        kind = str(self.alpha.dtype).removeprefix("torch.")
        return {
            "bits": self.signs.shape[0], "out_features": self.out_features, "in_features": self.in_features,
            "groups": self.alpha.shape[2], "dtype": kind, "offset": self.offset is not None,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BCQLinear:
        """Return an empty layer of these sizes."""
        bits, rows, columns = config["bits"], config["out_features"], config["in_features"]
        dtype = {"float16": torch.float16, "float32": torch.float32}[config["dtype"]]
        coded = BinaryCoded(
            torch.zeros(bits, rows, columns // 8, dtype=torch.uint8),
            torch.zeros(bits, rows, config["groups"], dtype=dtype),
            torch.zeros(rows, config["groups"], dtype=dtype) if config["offset"] else None,
        )
        return cls(coded, torch.zeros(rows) if config["bias"] else None)
