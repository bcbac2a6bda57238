"""Quantization-aware training: linear layers that round at every step, and what they become afterwards.

    with quantizing(model, make) as layers:                  # every linear layer of the blocks, exchanged
        parameters = tune_quantized(model, corpus, layers, steps=200, lr=1e-3)
    edit = QuantEdit({path: layer.frozen() for path, layer in layers.items()}, parameters)

    y = Q_a(x R) Q_w(W R)^T + b             R: identity, or a block Hadamard rotation, which cancels

`TrainedQuantLinear` keeps W in full precision (the master weight) and trains it through the rounding, with
the gradient estimators of `core.numbers.fake_quant`: `ste`, `clip`, `trust` (QuEST) or `lsq` (the steps are
trained too). The model has its own layers and values back when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, ModelError
from actlas.core.hadamard import block_hadamard
from actlas.core.layout import plain_module, weight_matrix
from actlas.core.model import Model
from actlas.core.numbers import FakeQuant, QuantParams, QuantSpec, encode, fake_quant, params_of
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.swap import SwapModule
from actlas.measure.linear_layers import LinearLayer, linear_layers
from actlas.training.language_loop import corpus_tokens, train_language, windows

Estimator = Literal["ste", "clip", "trust", "lsq"]
Trained = Literal["linear", "all"]


class TrainedQuantLinear(nn.Module):
    """A linear layer that is rounded at every call and trained through the rounding.

    Args:
        linear: where it starts.
        spec: format of the weight.
        grad: estimator for the weight.
        act: format of the inputs; `None`: left as they are.
        act_grad: estimator for the inputs; `"lsq"` gives them one learned step (and zero point).
        rotate: block size of the Hadamard rotation of both operands.
        where: the layer's name, for messages.

    Raises:
        InputError: an estimator or format that does not fit.
    """

    def __init__(
        self,
        linear: nn.Module,
        spec: QuantSpec,
        *,
        grad: Estimator = "ste",
        act: QuantSpec | None = None,
        act_grad: Estimator = "ste",
        rotate: int | None = None,
        where: str = "the layer",
    ) -> None:
        super().__init__()
        for name, value in (("grad", grad), ("act_grad", act_grad)):
            if value not in get_args(Estimator):
                raise InputError(f"{name} is {value!r}; it must be {', '.join(get_args(Estimator))}")
        weight = weight_matrix(linear).detach().float()
        spec.check(weight.shape[1], where)
        self.spec, self.act_spec, self.grad, self.act_grad = spec, act, grad, act_grad
        self.rotate, self.where = rotate, where
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.clone())
        bias = getattr(linear, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        groups = spec.groups(torch.empty(weight.shape, device="meta")).shape[:2]
        self.weight_quant = FakeQuant(spec, "lsq", shape=tuple(groups)) if grad == "lsq" else None  # type: ignore[arg-type]
        self.act_quant = FakeQuant(act, "lsq") if act is not None and act_grad == "lsq" else None
        self.to(weight.device)

    def rotated(self) -> Tensor:
        """Return the weight as it is rounded, `[out, in]`."""
        return rotated(self.weight, self.rotate)

    def forward(self, x: Tensor) -> Tensor:
        w = self.rotated()
        if self.weight_quant is not None:
            w = self.weight_quant(w)
        else:
            w = fake_quant(w, self.spec, self.weight_params(w.detach()), grad=self.grad)  # type: ignore[arg-type]
        h = rotated(x, self.rotate)
        if self.act_quant is not None:
            h = learned_rounding(self.act_quant, h)
        elif self.act_spec is not None:
            h = fake_quant(h, self.act_spec, grad=self.act_grad)  # type: ignore[arg-type]
        return F.linear(h, w, self.bias)

    def weight_params(self, rotated: Tensor) -> QuantParams:
        """Return the scales, as they are stored."""
        if self.weight_quant is not None:
            params = self.weight_quant.params
            assert params is not None
        else:
            params = params_of(rotated, self.spec, where=self.where)
        return params.stored(self.spec)

    @torch.no_grad()
    def frozen(self) -> QuantLinear:
        """Return the layer that computes the same, stored as codes."""
        w = self.rotated().detach()
        if self.weight_quant is not None and not bool(self.weight_quant.ready):
            self.weight_quant(w)
        params = self.weight_params(w)
        act = None
        if self.act_spec is not None:
            learned = None if self.act_quant is None else self.act_quant.params
            if self.act_quant is not None and not bool(self.act_quant.ready):
                raise InputError(
                    f"{self.where} has seen no inputs, so their step is not known; train it first"
                )
            act = ActQuant(self.act_spec, learned)
        return QuantLinear.of(
            self,
            self.spec,
            params=params,
            codes=encode(w, self.spec, params),
            act=act,
            rotate=self.rotate,
            bias=self.bias,
            where=self.where,
        )


class _Rotation(torch.autograd.Function):
    """A block Hadamard rotation, which is its own transpose: backward is the same rotation, and nothing is
    kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return block_hadamard(x, size)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return block_hadamard(dy, ctx.size), None


def rotated(x: Tensor, size: int | None) -> Tensor:
    """Return x with blocks of its last axis rotated; x itself without a size."""
    if not size:
        return x
    y: Tensor = _Rotation.apply(x, size)
    return y


def learned_rounding(quantizer: FakeQuant, x: Tensor) -> Tensor:
    """Round by learned steps, which start from the range of the first input."""
    if not bool(quantizer.ready):
        start = params_of(x.detach(), quantizer.spec)
        with torch.no_grad():
            quantizer.scale.copy_(start.scale)  # type: ignore[union-attr]
            if quantizer.zero is not None and start.zero is not None:
                quantizer.zero.copy_(start.zero)
            quantizer.ready.fill_(True)
    y: Tensor = quantizer(x)
    return y


def step_groups(
    layers: Mapping[str, nn.Module], lr: float, lr_steps: float, extra: Iterable[FakeQuant] = ()
) -> list[dict[str, Any]]:
    """Return AdamW's groups: weights and biases at `lr`, learned steps and zero points at `lr_steps`.

    Adam moves every number by about its rate, and steps are of the order of a hundredth.
    """
    learned = [m for layer in layers.values() for m in layer.modules() if isinstance(m, FakeQuant)]
    steps = [p for m in (*learned, *extra) for p in m.parameters()]
    known = {id(p) for p in steps}
    rest = [p for layer in layers.values() for p in layer.parameters() if id(p) not in known]
    return [{"params": rest, "lr": lr}, *([{"params": steps, "lr": lr_steps}] if steps else [])]


@contextmanager
def quantizing(
    model: Model,
    make: Callable[[LinearLayer, nn.Module], nn.Module],
    names: tuple[str, ...] | None = None,
) -> Iterator[dict[str, Any]]:
    """Exchange the linear layers of the blocks while the block runs; yields them by path.

    Args:
        model: a model with a layout.
        make: called with each layer and its module.
        names: only layers of these names; default all.

    Raises:
        ModelError: no layout, or no linear layers. InputError: whatever `make` says.
    """
    layers = {layer.path: make(layer, layer.module(model)) for layer in linear_layers(model, names)}
    with model.edit(*(SwapModule(path, module) for path, module in layers.items())):
        yield layers


def tune_quantized(
    model: Model,
    documents: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    steps: int,
    lr: float,
    batch: int = 8,
    context: int = 128,
    train: Trained = "linear",
    groups: Sequence[Mapping[str, Any]] | None = None,
    extra: Sequence[Tensor] = (),
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """Train exchanged layers on text, and give the model its other values back.

    Args:
        model, layers: inside `quantizing`.
        documents: text.
        steps, lr, batch, context, seed: of training.
        train: the exchanged layers alone, or `"all"` parameters of the model.
        groups: AdamW's groups instead of the layers' parameters.
        extra: further tensors to train.
        **options: of `train_language`.

    Returns:
        With `train="all"` the new values of the other parameters, by name (tied ones under each name).

    Raises:
        ModelError: not a causal language model with a tokenizer.
        InputError: sizes that make no sense, too short a text.
        NonFiniteError: the loss became NaN or infinite.
    """
    check_language_model(model)
    if train not in get_args(Trained):
        raise InputError(f"train is {train!r}; it must be {' or '.join(get_args(Trained))}")
    if batch < 1 or context < 2:
        raise InputError(f"batch={batch}, context={context}: windows need 1 row and 2 tokens at least")
    tokens = corpus_tokens(model, documents, context)
    drawn = windows(tokens, steps=steps, batch=batch, context=context, seed=seed)
    root = plain_module(model.module)
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    others = {
        n: p
        for n, p in root.named_parameters(remove_duplicate=False)
        if id(p) not in own and p.is_floating_point()
    }
    before = {n: p.detach().clone() for n, p in others.items()}
    with ExitStack() as stack:
        for p in {id(p): p for p in others.values()}.values():
            stack.callback(setattr, p, "grad", None)
            stack.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(train == "all")
        chosen: list[Any] = (
            [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
            if groups is None
            else [dict(g) for g in groups]
        )
        more = [*extra, *({id(p): p for p in others.values()}.values() if train == "all" else ())]
        if more:
            chosen += more if groups is None else [{"params": more}]
        try:
            train_language(model, drawn, chosen, steps=steps, lr=lr, **options)
            changed = {
                n: p.detach().clone() for n, p in others.items() if train == "all" and not p.equal(before[n])
            }
        finally:
            with torch.no_grad():
                for n, p in others.items():
                    p.copy_(before[n])
    return changed


def check_language_model(model: Model) -> None:
    """Raise unless a model is a causal language model with a tokenizer."""
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is of kind {model.kind}; a causal-lm is needed")
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it cannot be trained on text")


def split_documents(data: Iterable[Any], held_out: float) -> tuple[list[Any], list[Any]]:
    """Return the first documents to learn from and the last ones to judge on.

    Raises:
        InputError: a share that leaves nothing on a side.
    """
    documents = list(data)
    if not 0 < held_out < 1 or len(documents) < 2:
        raise InputError(
            f"held_out={held_out:g} of {len(documents)} documents: some must be left on either side"
        )
    cut = min(len(documents) - 1, max(1, round(len(documents) * (1 - held_out))))
    return documents[:cut], documents[cut:]
