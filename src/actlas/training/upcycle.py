"""Upcycle: start a mixture of experts from a dense model, instead of from nothing.

    edit = upcycle(model, "moe-x", split="copy", noise=0.05)
    with model.edit(edit):
        ...                                   # train; `trainable(edit)` are the new parameters
    edit.save("moe/", model)

Every MLP is swapped for a mixture; the edit is reversible and saves the mixtures with what they learned.

* `split="copy"`: each expert is the whole MLP. The gates sum to 1, so without noise, and with the
  model's own activation, nothing changes. M times the parameters, k times the arithmetic.
* `split="partition"`: the neurons are dealt out at random, D / M to an expert. Only k / M of them run for
  a token; outputs are multiplied by k, because gates of about 1 / k would shrink what each neuron writes.

Plain MLPs (GPT-2) become plain experts. Gated MLPs (Llama) keep their gate: an expert is
W_dec (a(W_gate x) * (W_up x)), a feature is a(gate) * up, and the router looks at the gate's weights,
because the gate decides which neurons are active. With ReLU in the place of the model's SiLU or GELU the
layer computes something else until it is trained.

Equal experts stay equal: the sparsity router scores copies alike, always picks the same ones, and these get
the same gradient. `noise` is the standard deviation of what is added to the encoders, relative to the root
mean square of each encoder; a partition differs without it.

Sources: Komatsuzaki et al. 2023, "Sparse Upcycling"; "Mixture of Experts Made Intrinsically Interpretable"
(MoE-X, 2025), whose main models are upcycled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError, did_you_mean
from actlas.core.methods import import_rooms, method
from actlas.core.model import Model
from actlas.core.swap import MODULE_TYPES, SwapModule
from actlas.training.dense_mlp import DenseMLP, dense_mlp

Split = Literal["copy", "partition"]


class EqualExperts(UserWarning):
    """Experts that start equal behind a router that cannot tell them apart."""


@method(
    "upcycle",
    room="training",
    returns="Edit",
    data="none",
    summary="turn MLPs into mixtures of experts (MoE-X or Switch) that start from the dense weights",
    example="actlas fit upcycle smollm2 --option blocks=[14,15] --option split=partition -o moe/",
    papers=("moe-x",),
)
def upcycle(
    model: Model,
    kind: str = "moe-x",
    *,
    split: Split = "copy",
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.05,
    blocks: Sequence[int] | None = None,
    activation: str = "",
    seed: int = 0,
) -> Edit:
    """Return the edit that swaps a model's MLPs for mixtures of experts made from their weights.

    Args:
        model: a model with a layout whose MLPs are single modules (llama-, GPT-2-like and others).
        kind: `"moe-x"` or `"switch"`.
        split: see the module docstring.
        experts, top_k: M and k.
        noise: see the module docstring.
        blocks: which blocks (negative ones count from the end); default all.
        activation: of the experts; default what the kind stands for (ReLU for MoE-X), `"same"` for the
            model's own.
        seed: of noise, partition and a learned router's start.

    Raises:
        InputError: an unknown kind, split or activation, sizes that do not fit, or no such block.
        ModelError: the model's MLPs cannot be swapped.
    """
    cls = _kind(kind)
    if split not in ("copy", "partition"):
        raise InputError(f"split is {split!r}; it must be 'copy' or 'partition'")
    if not 0 <= noise < float("inf"):
        raise InputError(f"noise is {noise:g}; it is a relative standard deviation, 0 or more")
    numbers = range(model.n_blocks or 0) if blocks is None else blocks
    found = [
        dense_mlp(model, b) for b in dict.fromkeys(b % (model.n_blocks or 1) if b < 0 else b for b in numbers)
    ]
    if not found:
        raise InputError("no block was given; leave blocks out to upcycle all of them")
    if noise == 0 and split == "copy" and kind == "moe-x" and experts > 1:
        warnings.warn(
            "with noise=0 all copies score alike and stay equal in training", EqualExperts, stacklevel=2
        )
    if activation == "same" and not found[0].activation:
        raise InputError(f"the configuration of {model.name} names no activation; give one, e.g. 'gelu'")
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for mlp in found:
        act = mlp.activation if activation == "same" else activation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            new = _mixture(cls, mlp, split, experts, top_k, noise, act, generator)
        edits.append(SwapModule(mlp.path, new))
    return compose(edits).bind(model.fingerprint)


def trainable(edit: Edit) -> Iterator[nn.Parameter]:
    """Yield the parameters of the modules that an edit swaps in, for an optimizer."""
    for part in edit.parts():
        if isinstance(part, SwapModule):
            yield from part.module.parameters()


def _mixture(
    cls: Any,
    mlp: DenseMLP,
    split: Split,
    experts: int,
    top_k: int,
    noise: float,
    activation: str,
    generator: torch.Generator,
) -> nn.Module:
    width, d = mlp.w_in.shape
    if split == "partition" and (experts < 1 or width % experts):
        raise InputError(f"{width} neurons cannot be dealt out to {experts} experts evenly; take a divisor")
    hidden = width if split == "copy" else width // experts
    new: nn.Module = cls(
        d, hidden, experts, top_k, activation=activation, bias=mlp.bias, gated=mlp.gated, dtype=mlp.w_in.dtype
    ).to(mlp.w_in.device)
    order = torch.randperm(width, generator=generator) if split == "partition" else torch.arange(width)

    def rows(w: Tensor, *, noisy: bool = False) -> Tensor:
        """Deal the rows (one a neuron) out to the experts: `[M, D, ...]`."""
        if split == "copy":
            dealt = w.expand(experts, *w.shape).clone()
        else:
            dealt = w[order.to(w.device)].unflatten(0, (experts, hidden))
        if noisy and noise:
            size = noise * float(w.float().square().mean().sqrt())
            drawn = torch.randn(dealt.shape, generator=generator) * size
            dealt = dealt + drawn.to(dealt)
        return dealt

    scale = 1.0 if split == "copy" else float(top_k)
    state: dict[str, Tensor | None] = {
        "w_enc": rows(mlp.w_in, noisy=True),
        "w_up": None if mlp.w_up is None else rows(mlp.w_up, noisy=True),
        "w_dec": rows(mlp.w_out.T).transpose(1, 2) * scale,
        "b_enc": None if mlp.b_in is None else rows(mlp.b_in),
        "b_up": None if mlp.b_up is None else rows(mlp.b_up),
        "b_dec": mlp.b_out,
    }
    with torch.no_grad():
        for name, value in state.items():
            if value is not None:
                getattr(new, name).copy_(value)
    return new


def _kind(name: str) -> Any:
    import_rooms()
    known = {cls.kind: cls for cls in MODULE_TYPES.values() if getattr(cls, "kind", "")}
    if name not in known:
        raise InputError(
            f"no kind of mixture is called {name!r}{did_you_mean(name, known)} (there are {', '.join(known)})"
        )
    return known[name]
