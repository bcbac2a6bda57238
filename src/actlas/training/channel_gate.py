"""Dynamic filter pruning (Fire Together Wire Together): which filters a convolution needs, predicted for each
image.

    gates = FilterGates(network, ["features.0", "features.1"], mass=0.92)
    with gates:
        for x, y in batches:
            loss = cross_entropy(network(x), y) + gates.loss()
            ...

A unit is a convolution with its normalisation and activation, output O `[batch, filters, H, W]`. Beside it
stands a linear predictor of the unit's mean-pooled input, trained against labels that the unit makes itself:

    heat h_c = max over H, W of |O_c|          label_c = 1 for the hottest filters, whose heat makes up the
    mass tau O <- O * [sigmoid(logit_c) > 0.5]          loss = sum over filters of the binary cross-entropy,
    mean over units

The strict rule of the paper drops the filter that crosses tau; the hottest one is always kept here, because a
unit without filters writes zeros. Labels need the dense output, so nothing is saved in training.
`mode="decoupled"` keeps the predictor's gradient out of the network, `"joint"` lets it in.

Source: Elkerdawy et al. 2022, "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised
    Mask
Prediction" (CVPR, arXiv 2110.08232), and its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.layout import find

Mode = Literal["decoupled", "joint"]
Rule = Literal["predict", "oracle", "dense", "fixed", "random"]


def filter_heat(x: Tensor) -> Tensor:
    """Return the heat of each filter, `[batch, filters]`, from a unit's output `[batch, filters, ...]`."""
    if x.ndim < 2:
        raise ShapeError(f"a unit's output is [batch, filters, ...], not {list(x.shape)}")
    return x.abs() if x.ndim == 2 else x.abs().flatten(2).amax(-1)


def mass_mask(heat: Tensor, mass: float) -> Tensor:
    """Return which filters make up a share of the heat, bool `[batch, filters]`.

    Args:
        heat: `[batch, filters]`, not negative. Ties go to the lower filter.
        mass: tau, in (0, 1]; at 1 all filters but dead ones (under 1e-5 of the heat) are kept.

    Raises:
        InputError: a mass outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise InputError(f"mass is {mass:g}; it is a share of the heat, in (0, 1]")
    share = heat / heat.sum(-1, keepdim=True).clamp_min(1e-30)
    if mass == 1:
        kept = share > 1e-5
    else:
        values, order = share.sort(dim=-1, descending=True, stable=True)
        below = (values.cumsum(-1) - mass <= 1e-5) & (values > 0)
        kept = torch.zeros_like(below).scatter(-1, order, below)
    return kept.scatter(-1, heat.argmax(-1, keepdim=True), True)


class FilterGates(nn.Module):
    """Predictors and gates of some units of a network; a context manager that installs them.

    Args:
        network: with convolutions.
        units: paths of the units, in the order in which they run; each holds one convolution.
        mass: tau.
        mode: see the module docstring.
        softmax: normalise the pooled input over channels, as in the released code.
        seed: of the predictors' start and of random masks.

    Attributes:
        rule: what decides: `"predict"`, `"oracle"` (the labels themselves), `"dense"`, `"fixed"` (the filters
            in `fixed`, by unit) or `"random"` (as many as predicted, at random).

    Raises:
        InputError: no units, an unknown mode, a mass outside (0, 1].
        ModelError: no such unit, or not exactly one ordinary convolution in it.
    """

    def __init__(
        self,
        network: nn.Module,
        units: Sequence[str],
        *,
        mass: float = 0.92,
        mode: Mode = "decoupled",
        softmax: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not units:
            raise InputError("no units were named; give paths of convolutions with their activation")
        if mode not in get_args(Mode):
            raise InputError(f"mode is {mode!r}; it must be 'decoupled' or 'joint'")
        mass_mask(torch.ones(1, 1), mass)
        self.units, self.mass, self.mode, self.softmax = tuple(units), mass, mode, softmax
        self.rule: Rule = "predict"
        self.fixed: dict[str, Tensor] = {}
        self._network = [network]  # in a list, so that its parameters are not this module's
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        self.convs = {}
        self.predictors = nn.ModuleList()
        for path in self.units:
            conv = _convolution(network, path)
            self.convs[path] = (
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size[0] * conv.kernel_size[1],
            )
            predictor = nn.Linear(conv.in_channels, conv.out_channels)
            with torch.no_grad():
                bound = conv.in_channels**-0.5
                predictor.weight.uniform_(-bound, bound, generator=self._generator)
                predictor.bias.fill_(0.1)
            self.predictors.append(predictor)
        self._input: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        #: Of the last forward pass, by unit: masks and labels `[batch, filters]`, heats, positions of the
        # output.
        self.masks: dict[str, Tensor] = {}
        self.labels: dict[str, Tensor] = {}
        self.heats: dict[str, Tensor] = {}
        self.positions: dict[str, int] = {}

    def __enter__(self) -> FilterGates:
        for i, path in enumerate(self.units):
            unit = find(self._network[0], path)
            assert unit is not None
            self._handles.append(unit.register_forward_pre_hook(self._reader(path)))
            self._handles.append(unit.register_forward_hook(self._gate(i, path)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._losses.clear()

    def _reader(self, path: str) -> Any:
        def read(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
            if path == self.units[0]:
                self._losses.clear()
            self._input[path] = args[0]

        return read

    def _gate(self, index: int, path: str) -> Any:
        def gate(_m: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            logits = self.logits(index, self._input.pop(path))
            heat = filter_heat(y.detach())
            label = mass_mask(heat, self.mass)
            mask = self._mask(path, logits.detach(), label)
            self.masks[path], self.labels[path], self.heats[path] = mask, label, heat
            self.positions[path] = y[0, 0].numel()
            if torch.is_grad_enabled():
                each = F.binary_cross_entropy_with_logits(logits, label.to(logits), reduction="none")
                self._losses.append(each.mean(0).sum())
            return y * mask.to(y).reshape(*mask.shape, *(1,) * (y.ndim - 2))

        return gate

    def logits(self, index: int, x: Tensor) -> Tensor:
        """Return the predictor's logits `[batch, filters]` for a unit's input `[batch, channels, H, W]`."""
        pooled = (x.detach() if self.mode == "decoupled" else x).flatten(2).mean(-1)
        out: Tensor = self.predictors[index](pooled.softmax(-1) if self.softmax else pooled)
        return out

    def _mask(self, path: str, logits: Tensor, label: Tensor) -> Tensor:
        if self.rule == "oracle":
            return label
        if self.rule == "dense":
            return torch.ones_like(label)
        if self.rule == "fixed":
            return self.fixed[path].to(label.device).expand_as(label)
        chosen = (logits > 0).scatter(-1, logits.argmax(-1, keepdim=True), True)
        if self.rule == "random":
            rank = (
                torch.rand(chosen.shape, generator=self._generator).to(logits.device).argsort(-1).argsort(-1)
            )
            chosen = rank < chosen.sum(-1, keepdim=True)
        return chosen

    def loss(self) -> Tensor:
        """Return the predictors' loss at the last forward pass: sum over filters, mean over units.

        Raises:
            InputError: the network has not run with gradients inside the block.
        """
        if not self._losses:
            raise InputError("no unit has run with gradients; call the network inside 'with gates:' first")
        return torch.stack(self._losses).mean()

    def agreement(self) -> float:
        """Return the share of filters at which mask and label agree in the last pass, mean over units."""
        pairs = zip(self.masks.values(), self.labels.values(), strict=True)
        return sum(float((m == y).float().mean()) for m, y in pairs) / len(self.units)

    def flops(self) -> tuple[Tensor, float]:
        """Return multiplications of the gated units for each row of the last pass, and those of the dense
        units.

        A unit costs active filters * positions * active inputs * kernel, where its active inputs are the
        filters of the unit before it (if it has as many); predictors are counted in.
        """
        spent, dense = torch.zeros(len(next(iter(self.masks.values()))), dtype=torch.float64), 0.0
        before: tuple[Tensor, int] | None = None
        for path in self.units:
            inputs, filters, kernel = self.convs[path]
            active = self.masks[path].sum(1).double().cpu()
            given = before if before is not None and before[1] == inputs else None
            read = torch.full_like(active, inputs) if given is None else given[0]
            spent = spent + active * read * kernel * self.positions[path]
            spent = spent + (inputs * filters if self.rule == "predict" else 0)
            dense += inputs * filters * kernel * self.positions[path]
            before = (active, filters)
        return spent, dense


def _convolution(network: nn.Module, path: str) -> nn.Conv2d:
    unit = find(network, path)
    if unit is None:
        raise ModelError(f"{type(network).__name__} has no unit {path!r}; see its named_modules()")
    found = [m for m in unit.modules() if isinstance(m, nn.Conv2d)]
    if len(found) != 1 or found[0].groups != 1:
        raise ModelError(f"unit {path!r} holds {len(found)} convolutions; one without groups is needed")
    return found[0]
