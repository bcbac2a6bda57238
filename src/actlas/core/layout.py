"""A Layout says where each canonical site of an architecture family is.

A layout is data: for every tower of a model (most have one; T5, Whisper and CLIP have two) the path
of its blocks, and for every canonical kind of site a `Tap`: which submodule, its input or its output,
and how the tensor there is cut into the canonical shape. The files in `core/layouts/` hold one family
each. Nothing here runs a model.

    llama: "attn.z" -> Tap("self_attn.o_proj", "input", (Heads(9, 64),))
    gpt2:  "attn.q" -> Tap("attn.c_attn", "output", (Columns(0, 768), Heads(12, 64)))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

End = Literal["input", "output", "scores", "pattern", "linear"]

#: Canonical kinds inside a block, in the order in which a forward pass reaches them.
BLOCK_KINDS: tuple[str, ...] = (
    "resid_pre",
    "attn_norm",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.scores",
    "attn.pattern",
    "attn.z",
    "attn.out",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.scores",
    "cross_attn.pattern",
    "cross_attn.z",
    "cross_attn.out",
    "resid_mid",
    "mlp_norm",
    "mlp.gate",
    "mlp.up",
    "mlp.act",
    "moe.router",
    "moe.experts",
    "mlp.out",
    "resid_post",
)
RESIDUAL_KINDS = frozenset({"embed", "resid_pre", "resid_mid", "resid_post"})
HEAD_KINDS = frozenset(f"{a}.{k}" for a in ("attn", "cross_attn") for k in ("q", "k", "v", "z"))
ATTENTION_KINDS = frozenset(f"{a}.{k}" for a in ("attn", "cross_attn") for k in ("scores", "pattern"))


class View(Protocol):
    """A cut of a raw tensor into the canonical shape, and the way back."""

    def read(self, x: Tensor) -> Tensor:
        """Return the canonical part of the raw tensor (a view where possible)."""
        ...

    def write(self, x: Tensor, part: Tensor) -> Tensor:
        """Return a raw tensor like `x` with its canonical part replaced; `x` is left alone."""
        ...


@dataclass(frozen=True)
class Heads:
    """`[..., heads * head_dim] <-> [..., heads, head_dim]`."""

    heads: int
    head_dim: int

    def read(self, x: Tensor) -> Tensor:
        cut: Tensor = x.unflatten(-1, (self.heads, self.head_dim))
        return cut

    def write(self, x: Tensor, part: Tensor) -> Tensor:
        return part.reshape(x.shape)


@dataclass(frozen=True)
class Columns:
    """A range of the last dimension (fused projections such as GPT-2's `c_attn`)."""

    start: int
    stop: int

    def read(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.stop]

    def write(self, x: Tensor, part: Tensor) -> Tensor:
        whole = x.clone()
        whole[..., self.start : self.stop] = part
        return whole


@dataclass(frozen=True)
class Interleaved:
    """Per-head interleaved q, k, v: `[..., groups * per_group * head_dim] -> [..., heads, head_dim]`.

    Each of `groups` groups holds `per_group` vectors of `head_dim`; this view takes the vectors
    `start:stop` of every group (GPT-NeoX, BLOOM and Falcon order their fused projection so).
    """

    groups: int
    per_group: int
    head_dim: int
    start: int
    stop: int

    def read(self, x: Tensor) -> Tensor:
        whole = x.unflatten(-1, (self.groups, self.per_group, self.head_dim))
        part: Tensor = whole[..., self.start : self.stop, :].flatten(-3, -2)
        return part

    def write(self, x: Tensor, part: Tensor) -> Tensor:
        whole = x.unflatten(-1, (self.groups, self.per_group, self.head_dim)).clone()
        whole[..., self.start : self.stop, :] = part.unflatten(-2, (self.groups, self.stop - self.start))
        raw: Tensor = whole.reshape(x.shape)
        return raw


@dataclass(frozen=True)
class Transposed:
    """`[batch, channels, length] <-> [batch, length, channels]`, or two other axes."""

    a: int = 1
    b: int = 2

    def read(self, x: Tensor) -> Tensor:
        return x.transpose(self.a, self.b)

    def write(self, x: Tensor, part: Tensor) -> Tensor:
        return part.transpose(self.a, self.b)


@dataclass(frozen=True)
class Tap:
    """Where a site's tensor can be read and written.

    Attributes:
        module: path of the submodule, relative to the block (or to the model for global sites).
        end: the module's input, its output, the attention scores or pattern inside it, or the result of
            the first linear map inside it (`"linear"`: routers that return only what follows from it).
        views: cuts applied in order to reach the canonical shape.
        pick: which element of a tuple or which field of an output object; `None`: the tensor itself
            or the first element.
        in_place: writing must change the tensor itself, because the residual stream holds an alias
            of it (`residual = x; x = norm(x)`).
        flat: the tensor is `[batch * pos, ...]` and must be unflattened with the batch of the pass.
        copy: the model changes this tensor in place later, so reading must copy it.
    """

    module: str
    end: End = "output"
    views: tuple[View, ...] = ()
    pick: int | str | None = None
    in_place: bool = False
    flat: bool = False
    copy: bool = False

    def read(self, x: Tensor) -> Tensor:
        for view in self.views:
            x = view.read(x)
        return x

    def write(self, x: Tensor, part: Tensor) -> Tensor:
        stages = [x]
        for view in self.views:
            stages.append(view.read(stages[-1]))
        for view, stage in zip(reversed(self.views), reversed(stages[:-1]), strict=True):
            part = view.write(stage, part)
        return part


Taps = Tap | tuple[Tap, ...]


@dataclass(frozen=True)
class Tower:
    """One stack of blocks with its embedding and final norm.

    Attributes:
        name: `""` for a model with one tower, else `"encoder"`, `"decoder"`, `"text"`, `"vision"`.
        root: path of the module whose forward sees the tower's inputs and attention mask.
        blocks: path of the `ModuleList`.
        sites: kind -> Tap, or several alternatives of which the first existing one counts.
        absent: kind -> why this family has not got it.
        embed, final_norm: taps of the global sites (`None`: absent).
        attention, cross_attention: path of the attention module inside a block.
        out_proj, down_proj: paths, inside a block, of the linear maps after `attn.z` and `mlp.act`.
        attn_out_norm, mlp_out_norm: paths of a norm between projection and residual stream (Gemma 2/3).
        norm, unembed: paths of the final norm and of the output head, for the logit lens.
        softcap: final logit soft-capping, or `None`.
        logit_scale: factor on the final hidden state before the head (tied T5), default 1.
        parallel: attention and MLP both read `resid_pre`.
        post_norm: the norm follows the addition (BERT), so `resid_mid` is what enters the norm.
    """

    name: str
    root: str
    blocks: str
    n_blocks: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_mlp: int
    sites: Mapping[str, Taps]
    absent: Mapping[str, str] = field(default_factory=dict)
    embed: Tap | None = None
    final_norm: Tap | None = None
    attention: str = ""
    cross_attention: str = ""
    out_proj: str = ""
    down_proj: str = ""
    attn_out_norm: str = ""
    mlp_out_norm: str = ""
    norm: str = ""
    unembed: str = ""
    softcap: float | None = None
    logit_scale: float = 1.0
    parallel: bool = False
    post_norm: bool = False


@dataclass(frozen=True)
class Layout:
    """All towers of a model and where its logits are."""

    family: str
    towers: tuple[Tower, ...]
    logits: Tap | None = None
    logits_absent: str = ""

    def tower(self, name: str) -> Tower | None:
        """Return the tower of that name, or `None`."""
        return next((t for t in self.towers if t.name == name), None)


LayoutBuilder = Callable[[nn.Module], Layout]


def find(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a dotted path (`""`: the module itself), or `None`."""
    current: object = module
    for part in path.split(".") if path else ():
        if isinstance(current, (nn.ModuleList, nn.Sequential)) and part.lstrip("-").isdigit():
            index = int(part)
            if not -len(current) <= index < len(current):
                return None
            current = current[index]
        else:
            current = getattr(current, part, None)
        if not isinstance(current, nn.Module):
            return None
    return current if isinstance(current, nn.Module) else None


def plain_module(module: nn.Module) -> nn.Module:
    """Return the module behind `torch.compile`, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def forward_parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a module's forward method by name (without `self`)."""
    forward = vars(type(plain_module(module))).get("forward") or type(plain_module(module)).forward
    found = dict(inspect.signature(forward).parameters)
    found.pop("self", None)
    return found


def join(*parts: str) -> str:
    """Join path parts with dots, leaving out empty ones."""
    return ".".join(p for p in parts if p)


def first_path(module: nn.Module, *paths: str) -> str:
    """Return the first of the paths that exists in the module; the last one if none does."""
    return next((p for p in paths if find(module, p) is not None), paths[-1])


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a linear map's weight as `[out, in]`, for `nn.Linear` and GPT-2's `Conv1D` alike."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(f"{type(module).__name__} has no two-dimensional weight")
    return weight.T if type(module).__name__ == "Conv1D" else weight


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear map to the last dimension without running its hooks."""
    bias = getattr(module, "bias", None)
    return torch.nn.functional.linear(x, weight_matrix(module), bias)
