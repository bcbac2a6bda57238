"""Depth search: between which layers is a choice made, and which of them make it?

    found = depth_search(model, pairs)              # clean and corrupted prompts that differ in the choice
    found.layers, found.first, found.last

At the last token, the attention outputs of layers [a, b) are taken from the other prompt of the pair, all
others stay. p(a, b) is the mean probability of the other prompt's answer.

1. b: the smallest with p(0, b) above the threshold, by bisection.
2. a: the largest with p(a, b) above the threshold, by bisection.
3. Inside [a, b): the layers without which p falls by more than `drop`, most important first, until their
   patch alone puts the other answer ahead by `margin`.

`decode_layers` says which answer each layer's residual stream holds already, read by the output head or by
an identity prompt ("cat -> cat\\n1135 -> 1135\\nhello -> hello\\n?") into whose last token it is written.

Source: "Controllable Context Sensitivity and the Knob Behind It" (Minder et al. 2024), section 4; identity
prompt after Ghandeharioun et al. 2024 (Patchscopes).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.interchange import as_pairs
from actlas.circuits.last_token import LastToken
from actlas.core.errors import InputError
from actlas.core.hooks import attach
from actlas.core.intervals import bootstrap_mean
from actlas.core.measurement import Measurement
from actlas.core.splitting import split_at

if TYPE_CHECKING:
    from actlas.core.model import Model

Component = Literal["attn.out", "mlp.out"]
IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"


@dataclass(frozen=True)
class DepthRange:
    """Where in depth a choice is made.

    Attributes:
        component: what was patched.
        first, last: the range [first, last) of layers.
        layers: the layers inside it that matter, in order of depth.
        reached: probability of the other answer when all layers are patched; the search needs it to lie
            above the threshold.
        evaluations: how many patched runs the search took.
        measurements: probabilities of both answers for the clean run, the range and the chosen layers.
    """

    component: str
    first: int
    last: int
    layers: tuple[int, ...]
    reached: float
    evaluations: int
    measurements: tuple[Measurement, ...]


def depth_search(
    model: Model,
    data: Any,
    *,
    component: Component = "attn.out",
    threshold: float = 0.85,
    drop: float = 0.05,
    margin: float = 0.3,
    n: int = 32,
    seed: int = 0,
) -> DepthRange:
    """Search for the layers that make a choice.

    Args:
        model: a causal language model with a layout.
        data: prompts that differ in the choice: see `das`.
        component: what is patched at the last token.
        threshold: share of the probability that patching all layers gives; it counts as the full effect.
        drop, margin: see the module docstring; in probability.
        n: at most so many pairs.
        seed: of the task and intervals.

    Raises:
        InputError: thresholds outside (0, 1), or a component whose patch in all layers does nothing.
    """
    for name, value in (("threshold", threshold), ("drop", drop), ("margin", margin)):
        if not 0 < value < 1:
            raise InputError(f"{name} is {value}; it must lie between 0 and 1")
    pairs = as_pairs(model, data, n=n, force=True, seed=seed)
    patched = _Patched(model, pairs, component)
    depth = model.n_blocks or 0
    clean, reached = patched.mean(()), patched.mean(tuple(range(depth)))
    if reached - clean < margin:
        raise InputError(
            f"patching {component} of every layer raises the other answer only from {clean:.2f} to "
            f"{reached:.2f}; the choice does not travel through it"
        )
    enough = threshold * reached
    last = _smallest(lambda b: patched.mean(tuple(range(b))) > enough, 1, depth)
    first = last - _smallest(lambda k: patched.mean(tuple(range(last - k, last))) > enough, 1, last)
    whole = patched.mean(tuple(range(first, last)))
    falls = {
        skip: whole - patched.mean(tuple(i for i in range(first, last) if i != skip))
        for skip in range(first, last)
    }
    order = sorted((i for i in falls if falls[i] > drop), key=lambda i: -falls[i]) or list(falls)
    chosen: list[int] = []
    for layer in order:
        chosen.append(layer)
        other, own = patched(tuple(sorted(chosen)))
        if float((other - own).mean()) > margin:
            break
    layers = tuple(sorted(chosen))
    rows = [("no patch", ()), ("range", tuple(range(first, last))), ("chosen layers", layers)]
    found = [m for name, which in rows for m in patched.measure(name, which, seed)]
    return DepthRange(component, first, last, layers, reached, patched.count, tuple(found))


class _Patched:
    """Probabilities of both answers with some layers' outputs at the last token taken from the other run."""

    def __init__(self, model: Model, pairs: PromptPairs, component: str) -> None:
        names = [f"blocks.{i}.{component}" for i in range(model.n_blocks or 0)]
        self.sites = model.resolve(names)
        self.model, self.pairs = model, pairs
        other = LastToken(model, dict(pairs.corrupt), names[0])
        read = other.trace(names)
        self.values = [read[s.name] for s in self.sites]
        self.runs = LastToken(model, dict(pairs.clean), names[0])
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def count(self) -> int:
        return len(self.known)

    def __call__(self, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the probabilities of the other prompt's answer and of the own one, `[n]` each."""
        if layers not in self.known:
            with ExitStack() as stack:
                for i in layers:
                    value = self.values[i]
                    handle = attach(self.model.module, self.sites[i], lambda x, v=value: v.to(x))  # type: ignore[misc]
                    stack.callback(handle.remove)
                logits = self.runs.full()
            p = logits.float().softmax(1)
            ids = (self.pairs.wrong_ids, self.pairs.answer_ids)
            other, own = (p.gather(1, i.unsqueeze(1))[:, 0].cpu() for i in ids)
            self.known[layers] = (other, own)
        return self.known[layers]

    def mean(self, layers: tuple[int, ...]) -> float:
        return float(self(layers)[0].mean())

    def measure(self, name: str, layers: tuple[int, ...], seed: int) -> list[Measurement]:
        out = []
        for which, p in zip(("other", "own"), self(layers), strict=True):
            low, high = bootstrap_mean(p.double().numpy(), seed=seed)
            group = {"patch": name, "answer": which}
            out.append(
                Measurement(
                    "probability",
                    float(p.mean()),
                    "probability",
                    len(p),
                    low,
                    high,
                    "bootstrap over prompts",
                    seed,
                    group=group,
                    details={"layers": list(layers)},
                )
            )
        return out


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the smallest value in [low, high] for which a monotone condition holds (high if none)."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def decode_layers(
    model: Model, data: Any, *, decode: Literal["unembed", "identity"] = "unembed", n: int = 32, seed: int = 0
) -> list[Measurement]:
    """Return, for each layer, the share of clean prompts whose residual stream already holds each answer.

    Args:
        model: a causal language model with a layout.
        data: see `das`.
        decode: how the last token's `resid_post` is read: by final norm and output head, or by writing it
            into the last token of an identity prompt at the same layer.
        n, seed: see `das`.
    """
    if decode not in ("unembed", "identity"):
        raise InputError(f"decode is {decode!r}; it must be 'unembed' or 'identity'")
    from actlas.measure.samples import rate_measurement

    pairs = as_pairs(model, data, n=n, force=True, seed=seed)
    names = [f"blocks.{i}.resid_post" for i in range(model.n_blocks or 0)]
    trace = model.trace(dict(pairs.clean), names)
    found = []
    for layer, name in enumerate(names):
        x = trace.last(name)
        with torch.no_grad():
            said = (model.unembed(x) if decode == "unembed" else _identity(model, x, name)).argmax(1)
        for answer, ids in (("own", pairs.answer_ids), ("other", pairs.wrong_ids)):
            group = {"layer": str(layer), "answer": answer, "read by": decode}
            found.append(rate_measurement("decoded", (said == ids).cpu().numpy(), group=group))
    return found


def _identity(model: Model, x: Tensor, site: str) -> Tensor:
    """Return the logits after the identity prompt with each vector of `[n, d]` at its last token."""
    head, tail = split_at(model, site)
    state = head(IDENTITY)
    values = state.activation.repeat(len(x), 1, 1)
    values[:, -1] = x
    logits: Tensor = tail(state, values).logits
    return logits[:, -1]
