"""Rounding a transformed model: weights by channel or group, inputs by token, after all folds.

    edit = rounded(model, transforms, formats)       # folds, then a QuantLinear for each layer of the blocks

`Formats` also holds how the same rounding looks during training, where scales depend on what they scale:

    x_hat = s (round(x / s) + z clipped - z),  s = (max x - min x) / (2^b - 1),  d round(u) / du := 1

so a transform that makes the range smaller is seen by the gradient (a constant scale would hide it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.numbers import QuantSpec, fake_quant
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.transforms import Fold
from actlas.quantize.layers import Target, Texts, WeightFormat, finish, targets
from actlas.quantize.transform_set import TransformSet

if TYPE_CHECKING:
    from actlas.core.model import Model

Solver = Literal["rtn", "gptq"]


@dataclass(frozen=True)
class Formats:
    """What is rounded, and how.

    Attributes:
        weight: format of the weights, by name; `""`: a whole output channel at `bits`.
        bits: of the weights, where no format is named.
        act_bits: of the inputs, with one scale a token; 0: inputs are not rounded.
        act_symmetric: no zero point in the inputs.
        skip: layers that keep their numbers; see `layers.targets`.
    """

    weight: str = ""
    bits: int = 4
    act_bits: int = 4
    act_symmetric: bool = False
    skip: tuple[str, ...] = ()

    def targets(self, model: Model) -> list[Target]:
        """Return the layers with their formats."""
        return targets(model, WeightFormat(self.bits, 0, False, self.weight), self.skip)

    @property
    def act(self) -> ActQuant | None:
        """The format of the inputs."""
        if not self.act_bits:
            return None
        return ActQuant(QuantSpec(self.act_bits, symmetric=self.act_symmetric, granularity="channel"))


def rounded(
    model: Model,
    transforms: TransformSet,
    formats: Formats,
    *,
    method: str,
    online: bool = True,
    solver: Solver = "rtn",
    corpus: Iterable[Any] | None = None,
    tokens: int = 2048,
    texts: Texts | None = None,
    evaluate: int = 0,
    seed: int = 0,
    note: str = "",
) -> Edit:
    """Fold the transforms, round every layer of the blocks, and return the edit.

    Args:
        model: the model.
        transforms: folded in float64.
        formats: of weights and inputs.
        method: name of the edit.
        online: rotate inputs that no fold reaches while the model runs.
        solver: `"rtn"`, or `"gptq"` on the transformed model (without online rotations).
        corpus, tokens: calibration text of GPTQ.
        texts, evaluate, seed: see `layers.finish`.
        note: for people.

    Raises:
        InputError: a solver that does not exist, or GPTQ with online rotations.
    """
    if solver not in get_args(Solver):
        raise InputError(f"solver is {solver!r}; it must be one of {', '.join(get_args(Solver))}")
    if solver == "gptq" and online:
        raise InputError("GPTQ calibrates on inputs as they are; take online=False with solver='gptq'")
    chosen = formats.targets(model)
    fold = transforms.fold()
    modules: dict[str, nn.Module] = {}
    turned = transforms.online([t.path for t in chosen]) if online else {}
    if solver == "gptq":
        modules = _gptq(model, fold, formats, corpus, tokens, seed)
    else:
        for target in chosen:
            layer = fold.linear(model, target.path)
            modules[target.path] = QuantLinear.of(
                layer, target.spec, act=formats.act, rotate=turned.get(target.path), where=target.path
            )
    rest = fold.without(modules)
    act = formats.act
    said = [
        note,
        f"inputs in {act.spec.name}" if act else "",
        f"{len(turned)} online rotations" if turned else "",
    ]
    return finish(
        model,
        chosen,
        {**rest.modules, **modules},
        method=method,
        texts=texts,
        parameters=rest.parameters,
        note="; ".join(s for s in said if s),
        evaluate=evaluate,
        seed=seed,
    )


def _gptq(
    model: Model, fold: Fold, formats: Formats, corpus: Iterable[Any] | None, tokens: int, seed: int
) -> dict[str, nn.Module]:
    from actlas.quantize.gptq import fit_gptq

    name = formats.act.spec.name if formats.act else ""
    with model.edit(fold.edit()):
        edit: Any = fit_gptq(
            model,
            corpus,
            bits=formats.bits,
            group_size=0,
            format=formats.weight,
            skip=formats.skip,
            act_format=name,
            tokens=tokens,
            evaluate=0,
            seed=seed,
        )
    return dict(edit.modules)


# The same rounding with gradients through its scales ------------------------------------------------


def soft_round(x: Tensor, spec: QuantSpec) -> Tensor:
    """Return x on the grid, with gradients through scales and the straight-through round.

    Even steps only; other grids take their scale as a constant (`fake_quant`). The values are those of
    `core.numbers.quantize`.
    """
    if spec.grid != "int" or spec.zero_point != "int" or spec.centred or spec.granularity == "tensor":
        return fake_quant(x, spec)
    groups = spec.groups(x)
    if spec.symmetric:
        most = 2 ** (spec.bits - 1) - 1
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / most
        return (scale * _nearest(groups / scale).clamp(-most, most)).reshape(x.shape)
    most = 2**spec.bits - 1
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    high = groups.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(1e-12) / most
    zero = _nearest(-low / scale)
    return (scale * ((_nearest(groups / scale) + zero).clamp(0, most) - zero)).reshape(x.shape)


def _nearest(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def token_windows(model: Model, texts: Sequence[str], context: int) -> Tensor:
    """Return windows of tokens `[n, context]` of the calibration texts, joined.

    Raises:
        InputError: fewer tokens than one window.
    """
    ids: list[int] = []
    for text in texts:
        ids += model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    n = len(ids) // context
    if not n:
        raise InputError(f"the calibration text has {len(ids)} tokens, fewer than a window of {context}")
    return torch.tensor(ids[: n * context]).view(n, context)
