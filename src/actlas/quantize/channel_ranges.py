"""Ranges of channels over calibration text, window by window.

    found = channel_ranges(model, texts, ["module:model.layers.0.input_layernorm.output"], max_tokens=2048)
    found[site].absmax                  # [channels]

Static quantization needs the ends of each channel's range, and OutlierTune's symmetrisation the middle of it:

    windows    z_j = mean over windows w of (max_{t in w} x_tj + min_{t in w} x_tj) / 2     (the paper's)
    union      z_j = (max_t x_tj + min_t x_tj) / 2

Padding never counts. A calibration (`core.calibration`) keeps sums and absolute maxima, from which neither
end nor middle can be had; this pass keeps these two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from actlas.core.model import Model

Middle = Literal["windows", "union"]


@dataclass
class ChannelRange:
    """What was seen at one site.

    Attributes:
        low, high: ends of each channel's range, float64 `[channels]`.
        middles: sum over windows of the middle of the window's range, float64 `[channels]`.
        windows, tokens: how many were read.
    """

    low: Tensor
    high: Tensor
    middles: Tensor
    windows: int = 0
    tokens: int = 0

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each channel."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def middle(self, kind: Middle = "windows") -> Tensor:
        """Return the middle of each channel's range; see the module's text."""
        if kind not in ("windows", "union"):
            raise InputError(f"middle is {kind!r}; it must be 'windows' or 'union'")
        return self.middles / self.windows if kind == "windows" else (self.low + self.high) / 2

    def shifted(self, z: Tensor) -> ChannelRange:
        """Return the ranges of `x - z`."""
        return ChannelRange(
            self.low - z, self.high - z, self.middles - self.windows * z, self.windows, self.tokens
        )

    @property
    def lopsidedness(self) -> Tensor:
        """Distance of each range's middle from 0 over half the range's length; 0 is symmetric."""
        half = (self.high - self.low) / 2
        return ((self.low + self.high) / 2).abs() / half.clamp_min(1e-30)


def channel_ranges(
    model: Model,
    corpus: Iterable[Any],
    sites: Iterable[str],
    *,
    max_tokens: int | None = None,
    context: int | None = None,
    batch_tokens: int = 1024,
) -> dict[str, ChannelRange]:
    """Read text and return the range of every channel at some sites. Installed edits apply.

    Args:
        model: the model.
        corpus: strings or documents.
        sites: names or patterns; heads are flattened into channels.
        max_tokens, context, batch_tokens: see `Model.stream`.

    Returns:
        By the name that each site resolves to.

    Raises:
        InputError: no text. NonFiniteError: NaN or infinity, with the site.
    """
    names = [site.name for site in model.resolve(list(sites))]
    found: dict[str, ChannelRange] = {}
    for trace in model.stream(
        corpus, names, max_tokens=max_tokens, context=context, batch_tokens=batch_tokens
    ):
        mask = trace.mask
        for name in names:
            x = trace[name].detach().double()
            x = x.flatten(2) if x.ndim > 3 else x
            real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.to(x.device)
            if not bool(torch.isfinite(x[real]).all()):
                raise NonFiniteError(f"{name} holds NaN or infinity on the calibration text")
            wide = real.unsqueeze(-1)
            low = torch.where(wide, x, torch.inf).amin(1)
            high = torch.where(wide, x, -torch.inf).amax(1)
            middles = ((low + high) / 2).sum(0)
            old = found.get(name)
            if old is None:
                found[name] = ChannelRange(low.amin(0), high.amax(0), middles, len(x), int(real.sum()))
                continue
            old.low, old.high = torch.minimum(old.low, low.amin(0)), torch.maximum(old.high, high.amax(0))
            old.middles = old.middles + middles
            old.windows, old.tokens = old.windows + len(x), old.tokens + int(real.sum())
    if not found:
        raise InputError("the calibration text is empty, so no range is known")
    return found
