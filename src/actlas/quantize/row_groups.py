"""Row groups and quantization-aware training (Q-BERT): neighbouring output rows share a range, weights are
trained.

A matrix `[out, in]` is cut into `groups` runs of neighbouring output rows, each a quantiser of its own:

    s = (max - min) / (2^b - 1),   z = round(-min / s),   w_hat = s (clip(round(w / s) + z, 0, 2^b - 1) - z)

Ranges follow the weights with an exponential moving average (0.99), codes are always clipped to b bits, and
the gradient passes straight through. Inputs may be rounded to 8 bits, one scale a token.

    with row_group_training(module, {"layer.0.query": 2, ...}, groups=12) as layers:
        ...steps of an optimiser over module.parameters()...
    edit = row_group_edit(model, layers)

Source: Shen et al. 2020, "Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT" (arXiv 1909.05840),
sections 3.1 and 3.3. The released linear layer takes ranges over transposed weights, so that its groups are
input columns; here they are output rows, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.layout import find
from actlas.core.numbers import QuantParams, QuantSpec, fake_quant, params_of, quantize
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.swap import SwapModule

if TYPE_CHECKING:
    from actlas.core.model import Model

DECAY = 0.99


def group_params(weight: Tensor, groups: int, bits: int, where: str = "the layer") -> QuantParams:
    """Return the scales of runs of rows, `[out, 1]`: equal within a run.

    Args:
        weight: `[out, in]`.
        groups: how many runs; it must divide the rows.
        bits: of a code.
        where: name of the layer, for messages.

    Raises:
        InputError: a number of groups that does not divide the rows.
    """
    runs = _runs(weight, groups, where)
    return _repeated(params_of(runs, QuantSpec(bits, granularity="channel")), len(weight) // groups)


def _runs(weight: Tensor, groups: int, where: str) -> Tensor:
    rows = len(weight)
    if groups < 1 or rows % groups:
        legal = ", ".join(str(g) for g in range(1, min(rows, 256) + 1) if rows % g == 0)
        raise InputError(f"{where} has {rows} rows, which {groups} groups do not divide; legal are {legal}")
    return weight.reshape(groups, -1)


def _repeated(params: QuantParams, rows: int) -> QuantParams:
    zero = None if params.zero is None else params.zero.repeat_interleave(rows, 0)
    return QuantParams(params.scale.repeat_interleave(rows, 0), zero)


class RowGroupLinear(nn.Module):
    """A linear layer whose float weight is rounded in every pass, with a gradient for it.

    Args:
        linear: the layer; its parameters are shared, so that an optimiser that has them keeps working.
        bits: of the weight. groups: runs of rows. act: how inputs are rounded.
        where: its name, for messages.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, linear: nn.Linear, bits: int, groups: int, act: ActQuant | None = None, where: str = "the layer"
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.groups, self.act = groups, act
        self.spec = QuantSpec(bits, granularity="channel")
        low, high = _runs(linear.weight.detach(), groups, where).aminmax(dim=1, keepdim=True)
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

    def params(self) -> QuantParams:
        """Return the scales of the runs `[groups, 1]` for the ranges as they are."""
        return params_of(self.low, self.spec, self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        runs = self.weight.reshape(self.groups, -1)
        if self.training:
            low, high = runs.detach().aminmax(dim=1, keepdim=True)
            self.low.lerp_(low, 1 - DECAY)
            self.high.lerp_(high, 1 - DECAY)
        weight = fake_quant(runs, self.spec, self.params()).reshape(self.weight.shape)
        if self.act is not None:
            x = x + (self.act(x) - x).detach()
        return F.linear(x, weight, self.bias)

    def stored(self) -> QuantLinear:
        """Return the layer as codes; the ranges are stored once a row."""
        rows = self.out_features // self.groups
        params = _repeated(self.params(), rows)
        return QuantLinear.of(
            self, QuantSpec(self.spec.bits, granularity="channel"), params=params, act=self.act
        )


@contextmanager
def row_group_training(
    module: nn.Module, bits: Mapping[str, int], groups: int, act_bits: int | None = 8
) -> Iterator[dict[str, RowGroupLinear]]:
    """Put rounding layers in the place of linear layers for a while; the parameters stay the module's own.

    Args:
        module: the model; a copy if its weights are to stay.
        bits: path of each linear layer -> bits.
        groups: runs of rows in each.
        act_bits: of the layers' inputs; `None`: not rounded.

    Yields:
        path -> layer.
    """
    act = None if act_bits is None else ActQuant(QuantSpec(act_bits, granularity="channel"))
    layers: dict[str, RowGroupLinear] = {}
    for path, b in bits.items():
        linear = find(module, path)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{path} is no linear layer of this model")
        layers[path] = RowGroupLinear(linear, b, groups, act, where=path)
    held: list[tuple[SwapModule, nn.Module]] = []
    try:
        for path, layer in layers.items():
            swap = SwapModule(path, layer.train(module.training))
            held.append((swap, swap.swap_in(module)))
        yield layers
    finally:
        for swap, original in reversed(held):
            swap.swap_out(module, original)


def row_group_edit(model: Model, layers: Mapping[str, RowGroupLinear]) -> Edit:
    """Return trained layers as an edit of the model that they were trained in (or of one like it)."""
    edit = QuantEdit({path: layer.stored() for path, layer in layers.items()}, method="q-bert")
    return edit.bind(model.fingerprint)


def round_rows(weight: Tensor, groups: int, bits: int) -> Tensor:
    """Return a weight rounded in runs of rows, without training."""
    runs = _runs(weight.detach(), groups, "the layer")
    return quantize(runs, QuantSpec(bits, granularity="channel")).reshape(weight.shape)
