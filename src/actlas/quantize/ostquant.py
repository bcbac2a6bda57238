"""OSTQuant: learn rotations and scales that fold exactly, so that values fill the grid they are rounded to.

Transforms of one model (`transform_set`): R of the residual stream, R of value heads, scales at v-o, up-down,
norm and q-k slots. Only they are trained; weights follow from them at every step:

    W(T) = fold of the transforms T,      y = Q_w(W(T)) Q_a(x)      with straight-through rounding
    loss = KL( softmax(z_fp[top]) || softmax(z_q[top]) ),           top: the k largest logits of the model

with Riemannian Adam for rotations and Adam for the logarithms of scales. The loss looks at the model's own
likely tokens only: with few calibration tokens the tail of the vocabulary is noise. Rotations start at
V H (`womi`). Every few steps the loss is computed on the same calibration windows, and the best transforms
are kept. In the end everything is folded in float64 and rounded (to nearest, or by GPTQ).

Scales of q and k are one for each rotary pair; otherwise they would not cancel in the scores.

Source: "OstQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for
Better Distribution Fitting" (Hu et al. 2025, arXiv 2501.13987).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.hadamard import block_hadamard
from actlas.core.layout import find, join, plain_module
from actlas.core.methods import method
from actlas.core.progress import progress
from actlas.core.stiefel import StiefelAdam
from actlas.core.transforms import Folding
from actlas.quantize.layers import Target, split_text
from actlas.quantize.rounded_transforms import Formats, Solver, rounded, soft_round, token_windows
from actlas.quantize.transform_set import KINDS, Start, TransformSet

if TYPE_CHECKING:
    from actlas.core.model import Model

_LOOK = 4  # windows on which the loss is watched


@dataclass(frozen=True)
class Learning:
    """How transforms are trained.

    Attributes:
        steps, batch: steps, and windows in each.
        rotation_lr, scale_lr: of rotations (radians, roughly) and of logarithms of scales; both fall to 0
            along half a cosine.
        top_k: how many of the model's likely tokens the loss sees; at most the vocabulary.
        watch: steps between looks at the loss.
        seed: of the order of windows.
    """

    steps: int = 100
    batch: int = 4
    rotation_lr: float = 1e-2
    scale_lr: float = 3e-2
    top_k: int = 1000
    watch: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "top_k", "watch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (self.rotation_lr >= 0 and self.scale_lr >= 0):
            raise InputError(
                f"learning rates must not be negative: rotations {self.rotation_lr}, scales {self.scale_lr}"
            )


@method(
    "ostquant",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights and activations rounded after learned rotations and scales that fold exactly",
    example="actlas fit ostquant smollm2 prose --bits 4 --act-bits 4 --steps 60 -o ost4/",
    papers=("ostquant",),
)
def fit_ostquant(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 4,
    act_bits: int = 4,
    format: str = "",
    transforms: Collection[str] | str = KINDS,
    start: Start = "womi",
    steps: int = 100,
    batch: int = 4,
    rotation_lr: float = 1e-2,
    scale_lr: float = 3e-2,
    top_k: int = 1000,
    online: bool = True,
    solver: Solver = "rtn",
    skip: tuple[str, ...] = (),
    tokens: int = 2048,
    context: int = 128,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit of learned transforms and rounded layers.

    Args:
        model: a causal language model.
        data: calibration text; what follows it is used to measure. Default: the bundled prose.
        bits, act_bits: of weights and of the inputs of layers; `act_bits=0` rounds weights only.
        format: of the weights, by name; default: whole output channels at `bits`.
        transforms: which, of `transform_set.KINDS`; as a list or with commas between.
        start: of the rotations.
        steps, batch, rotation_lr, scale_lr, top_k: see `Learning`.
        online: rotate inputs that no fold reaches by Hadamard blocks while the model runs.
        solver: `"rtn"`, or `"gptq"` (which takes `online=False`).
        skip: layers that keep their numbers.
        tokens, context: calibration text, in windows.
        evaluate: tokens of held-out text on which the price is measured; 0: none.
        seed: of starts, order and text.

    Raises:
        ModelError: not a causal language model.
        InputError: formats, transforms or options that do not exist, or too little text.
        NonFiniteError: the loss became NaN or infinite.
    """
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is a model of kind {model.kind}; ostquant needs a causal-lm")
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)
    formats = Formats(format, bits, act_bits, skip=tuple(skip))
    learning = Learning(steps, batch, rotation_lr, scale_lr, top_k, seed=seed)
    kinds = transforms.split(",") if isinstance(transforms, str) else transforms
    made = TransformSet(model, kinds, start=start, seed=seed)
    windows = token_windows(model, texts.fit, texts.context)
    trained = learn(model, made, windows, formats, learning, online=online)
    return rounded(
        model,
        made,
        formats,
        method="ostquant",
        online=online,
        solver=solver,
        corpus=texts.fit,
        tokens=tokens,
        texts=texts,
        evaluate=evaluate,
        seed=seed,
        note=f"{steps} steps from {start}: loss {trained[0][1]:.3g} to {min(v for _, v in trained):.3g}",
    )


def kl_top(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    """Return the mean divergence of the student from the teacher on the teacher's k likeliest tokens.

    Args:
        teacher, student: logits `[..., vocab]`; both are gathered before their softmax, so that the result
            is a divergence (never below 0).
        k: how many; the whole vocabulary if it is smaller.
    """
    values, index = teacher.float().topk(min(k, teacher.shape[-1]), dim=-1)
    p, q = values.log_softmax(-1), student.float().gather(-1, index).log_softmax(-1)
    loss: Tensor = (p.exp() * (p - q)).sum(-1).mean()
    return loss


def learn(
    model: Model,
    transforms: TransformSet,
    windows: Tensor,
    formats: Formats,
    learning: Learning,
    *,
    online: bool = True,
) -> list[tuple[int, float]]:
    """Train transforms in place; they end as the best that was seen.

    Args:
        model: it is not changed.
        transforms: what is trained.
        windows: tokens `[n, context]`.
        formats: what is rounded while training.
        learning: rates and steps.
        online: as in `fit_ostquant`.

    Returns:
        (step, loss on the watched windows), from step 0 on.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    chosen = formats.targets(model)
    turned = transforms.online([t.path for t in chosen]) if online else {}
    windows = windows.to(model.device)
    generator = torch.Generator().manual_seed(learning.seed)
    optimisers: list[torch.optim.Optimizer] = []
    rates: list[float] = []
    if transforms.rotations() and learning.rotation_lr:
        optimisers.append(StiefelAdam(transforms.rotations(), lr=learning.rotation_lr))
        rates.append(learning.rotation_lr)
    if len(transforms.logs) and learning.scale_lr:
        optimisers.append(torch.optim.Adam(list(transforms.logs), lr=learning.scale_lr))
        rates.append(learning.scale_lr)
    looked: list[tuple[int, float]] = []
    best = copy.deepcopy(transforms.state_dict())

    def look(step: int) -> None:
        nonlocal best
        with torch.no_grad():
            loss = float(_loss(model, transforms, windows[:_LOOK], chosen, turned, formats, learning.top_k))
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss} at step {step}; use smaller learning rates")
        if looked and loss < min(v for _, v in looked):
            best = copy.deepcopy(transforms.state_dict())
        looked.append((step, loss))

    look(0)
    with progress("learning rotations and scales", learning.steps, "steps") as advance, torch.enable_grad():
        for step in range(1, learning.steps + 1):
            rows = torch.randint(len(windows), (learning.batch,), generator=generator)
            for optimiser, rate in zip(optimisers, rates, strict=True):
                fall = (1 + math.cos(math.pi * (step - 1) / learning.steps)) / 2
                optimiser.param_groups[0]["lr"] = max(rate * fall, 1e-12)
                optimiser.zero_grad()
            loss = _loss(model, transforms, windows[rows], chosen, turned, formats, learning.top_k)
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            if step % learning.watch == 0 or step == learning.steps:
                look(step)
            advance(note=f"loss {float(loss.detach()):.3g}")
    transforms.load_state_dict(best)
    return looked


def _loss(
    model: Model,
    transforms: TransformSet,
    ids: Tensor,
    chosen: list[Target],
    turned: Mapping[str, int],
    formats: Formats,
    top_k: int,
) -> Tensor:
    with torch.no_grad():
        teacher = model.module(input_ids=ids, use_cache=False).logits
    folding = Folding(model, transforms.slots, untie=True, dtype=torch.float32)
    transforms.put(folding)
    values = dict(folding.values)
    root = plain_module(model.module)
    for target in chosen:
        name = join(target.path, "weight")
        weight = folding._matrix(target.path)
        if block := turned.get(target.path):
            weight = block_hadamard(weight, block)
        weight = soft_round(weight, target.spec)
        values[name] = weight.T if folding._flipped(target.path) else weight
    with _rounding(root, [t.path for t in chosen], turned, formats), _plain_norms(folding):
        values = {name: value.to(model.dtype) for name, value in values.items()}
        student = torch.func.functional_call(
            root, values, (), {"input_ids": ids, "use_cache": False}, tie_weights=False
        ).logits
    return kl_top(teacher, student, top_k)


@contextmanager
def _rounding(
    root: nn.Module, paths: Collection[str], turned: Mapping[str, int], formats: Formats
) -> Iterator[None]:
    """Rotate and round the inputs of layers while the context is open."""
    act = formats.act
    handles = []

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            if block := turned.get(path):
                x = block_hadamard(x, block)
            return (soft_round(x, act.spec) if act is not None else x, *args[1:])

        return hook

    try:
        for path in paths:
            module = find(root, path)
            assert module is not None
            handles.append(module.register_forward_pre_hook(before(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain_norms(folding: Folding) -> Iterator[None]:
    """Let norms that a rotation turns into `PlainNorm`s compute as these do while the context is open."""
    root = plain_module(folding.model.module)
    handles = []

    def plain(eps: float) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * module.weight
            return out if module.bias is None else out + module.bias

        return hook

    try:
        for path, eps in folding._plain.items():
            module = find(root, path)
            assert module is not None
            handles.append(module.register_forward_hook(plain(eps)))
        yield
    finally:
        for handle in handles:
            handle.remove()
