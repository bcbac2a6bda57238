"""Scales of input channels, folded into what produces the channels where a slot allows it.

    y = W x = (W diag(s)) (x / s)

The columns of W are multiplied by s before they are rounded. The division moves into the producer of x (a
norm's weight, the rows of another linear map: `core.transforms` finds and folds it); where nothing can take
it, the quantised layer divides its input at run time. Either way the function is the same before rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from actlas.core.layout import weight_matrix
from actlas.core.numbers import QuantParams
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.transforms import Fold, Folding, Slot, Slots, slots
from actlas.quantize.layers import Target

if TYPE_CHECKING:
    from actlas.core.model import Model


_known: WeakKeyDictionary[nn.Module, Slots] = WeakKeyDictionary()


def known_slots(model: Model) -> Slots:
    """Return the model's slots; they are traced once for each module object."""
    if model.module not in _known:
        _known[model.module] = slots(model)
    return _known[model.module]


class Place:
    """Layers that share an input, and where the division of that input can go.

    Args:
        paths: of the layers.
        columns: their inputs.
        known: the model's slots; `None`: nothing is folded.

    Attributes:
        slot: where it folds; `None`: nowhere, so it is done at run time.
        channels: which of the free scales each input channel takes, `[in]`.
        width: how many free scales there are.
    """

    def __init__(self, paths: Sequence[str], columns: int, known: Slots | None) -> None:
        self.paths = tuple(paths)
        self.slot: Slot | None = None if known is None else known.reading(paths[0])
        if self.slot is not None and set(self.slot.readers) != set(paths):
            self.slot = None
        self.channels = torch.arange(columns) if self.slot is None else self.slot.index.cpu()
        self.width = columns if self.slot is None else self.slot.width

    def mean(self, statistic: Tensor) -> Tensor:
        """Return the mean of a statistic `[in]` over the channels that share a scale, float64 `[width]`."""
        zero = torch.zeros(self.width, dtype=torch.float64)
        total = zero.index_add(0, self.channels, statistic.double().cpu())
        return total / torch.bincount(self.channels, minlength=self.width).clamp_min(1)

    def largest(self, statistic: Tensor) -> Tensor:
        """Return the largest value of a statistic `[in]` over the channels that share a scale, `[width]`."""
        zero = torch.zeros(self.width, dtype=torch.float64)
        return zero.scatter_reduce(0, self.channels, statistic.double().cpu(), "amax")

    def columns(self, scale: Tensor) -> Tensor:
        """Return the scale of each input channel, `[in]`."""
        return scale.cpu()[self.channels]


class BlockScales:
    """The scales of one block (or of a whole small model).

    Args:
        model: the model; it is not changed.
        known: its slots, if anything is to be folded.
    """

    def __init__(self, model: Model, known: Slots | None) -> None:
        self._model = model
        self._folding = None if known is None else Folding(model, known)
        self._fold: Fold | None = None
        #: path -> scale of its inputs `[in]`, float64.
        self.columns: dict[str, Tensor] = {}
        #: layers that divide their inputs themselves.
        self.runtime: set[str] = set()

    def add(self, place: Place, scale: Tensor) -> None:
        """Put a scale `[width]` at a place."""
        s = scale.double().cpu()
        self._fold = None
        for path in place.paths:
            self.columns[path] = place.columns(s)
        if place.slot is None or self._folding is None:
            self.runtime |= set(place.paths)
        else:
            self._folding.scale(place.slot, s)

    @property
    def fold(self) -> Fold:
        """What was folded so far."""
        if self._fold is None:
            some = self._folding is not None and bool(self._folding.values)
            # Each slot was tried when it was found, so the fold is not run again for every block.
            self._fold = self._folding.fold(verify=False) if some and self._folding else Fold({})
        return self._fold

    def linear(self, target: Target) -> nn.Module:
        """Return a layer as it is before rounding: folded, and with its columns multiplied."""
        held = (
            f"{target.path}.weight" in self.fold.parameters or f"{target.path}.bias" in self.fold.parameters
        )
        made = self.fold.linear(self._model, target.path) if held else target.module
        if target.path not in self.runtime:
            return made
        weight = weight_matrix(made).detach()
        scaled = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        product = (weight.double() * self.columns[target.path].to(weight.device)).to(weight.dtype)
        scaled.weight = nn.Parameter(product, requires_grad=False)
        bias = getattr(made, "bias", None)
        if isinstance(bias, Tensor):
            scaled.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return scaled

    def weight(self, target: Target) -> Tensor:
        """Return that layer's weight `[out, in]`, detached."""
        return weight_matrix(self.linear(target)).detach()

    def layer(
        self,
        target: Target,
        params: QuantParams | None = None,
        act: ActQuant | None = None,
        codes: Tensor | None = None,
    ) -> QuantLinear:
        """Return the quantised layer of the scaled model."""
        own = self.columns[target.path].float() if target.path in self.runtime else None
        return QuantLinear.of(
            self.linear(target),
            target.spec,
            params=params,
            codes=codes,
            act=act,
            input_scale=None if own is None else own.to(target.weight.device),
            where=target.path,
        )

    def parameters(self, quantised: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Return the new values of what is folded into and not quantised itself: norms, skipped layers."""
        return dict(self.fold.without(quantised.keys()).parameters)
