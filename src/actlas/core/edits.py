"""The kinds of edits: add, scale, ablate, replace, project out, clamp, substitute, heads, attention.

Each is a small dataclass whose `value` is the activation under the full edit:

    Add            x + v (norm kept if asked)  Replace     the given value
    Scale          c x                         ProjectOut  x - Q Q^T x  (Q spans the directions)
    Zero           0                           Clamp       min(max(x, low), high), or along a direction
    MeanAblate     the given mean              Substitute  lens.decode(lens.encode(x))
    Resample       an activation from another prompt
    HeadScale      c_h x_h for the named heads AttentionEdit  a change of pre-softmax scores
    Rotate         x turned towards v by an angle

Module edits (a submodule swapped for another) are in `actlas.core.swap`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.edit import ActivationEdit, Edit, Here, check_tensor, register_edit
from actlas.core.errors import InputError, ShapeError
from actlas.core.layout import ATTENTION_KINDS
from actlas.core.scope import Scope
from actlas.core.swap import SwapModule

if TYPE_CHECKING:
    from actlas.core.lens import Lens
    from actlas.core.sites import Site
    from actlas.core.trace import Trace


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Add(ActivationEdit):
    """Add a vector: `x + strength * vector` (a steering vector).

    Attributes:
        vector: broadcasts against the site's features, e.g. `[d_model]` or `[heads, head_dim]`.
        keep_norm: rescale the sum to the length of `x` (per token, over all of its features), so that
            only the direction of the activation changes.
    """

    vector: Tensor
    keep_norm: bool = False
    feature_fields: ClassVar[tuple[str, ...]] = ("vector",)

    def change(self, x: Tensor, here: Here) -> Tensor:
        moved = x + self.strength * self.vector.to(x)
        return with_length_of(x, moved, here.site) if self.keep_norm else moved


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Rotate(ActivationEdit):
    """Turn the activation towards a direction, in the plane of the two, keeping its length.

        theta' = max(theta - strength * degrees, 0)         theta: the angle between x and the direction

    A negative strength turns away from it (at most to the opposite direction). An activation that is
    zero, or parallel to the direction, spans no plane with it and stays as it is.

    Attributes:
        vector: `[d]` (or the site's features), of any length.
        degrees: the angle at strength 1.
    """

    vector: Tensor
    degrees: float = 0.0
    feature_fields: ClassVar[tuple[str, ...]] = ("vector",)

    def change(self, x: Tensor, here: Here) -> Tensor:
        count = 1 if here.site.features is None else len(here.site.features)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(-count)
        unit = self.vector.to(wide).flatten()
        unit = unit / unit.norm().clamp_min(1e-30)
        length = wide.norm(dim=-1, keepdim=True)
        along = (wide * unit).sum(-1, keepdim=True)
        across = wide - along * unit
        side = across.norm(dim=-1, keepdim=True)
        angle = torch.atan2(side, along)
        turned = (angle - self.strength * math.radians(self.degrees)).clamp(0.0, math.pi)
        new = length * (turned.cos() * unit + turned.sin() * across / side.clamp_min(1e-30))
        flat = side <= 1e-6 * length
        return torch.where(flat, wide, new).to(x.dtype).reshape(x.shape)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Scale(ActivationEdit):
    """Multiply by a factor: a number, or a tensor that broadcasts against the site's features."""

    factor: float | Tensor
    feature_fields: ClassVar[tuple[str, ...]] = ("factor",)

    def value(self, x: Tensor, here: Here) -> Tensor:
        factor = self.factor.to(x) if isinstance(self.factor, Tensor) else self.factor
        return x * factor


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Zero(ActivationEdit):
    """Zero ablation: set the activation to 0."""

    overwrites: ClassVar[bool] = True

    def value(self, x: Tensor, here: Here) -> Tensor:
        return torch.zeros_like(x)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class MeanAblate(ActivationEdit):
    """Mean ablation: set the activation to a mean, e.g. `calibration[site].mean`."""

    mean: Tensor
    feature_fields: ClassVar[tuple[str, ...]] = ("mean",)

    overwrites: ClassVar[bool] = True

    def value(self, x: Tensor, here: Here) -> Tensor:
        mean = self.mean.to(x)
        if here.site.features is not None and mean.ndim == 1 and len(here.site.features) > 1:
            mean = mean.reshape(here.site.features)
        return mean.expand_as(x).clone()

    def check(self, site: Site) -> None:
        check_tensor(self.mean, "MeanAblate.mean")
        if site.features is not None and self.mean.numel() != _numel(site.features):
            raise ShapeError(
                f"MeanAblate.mean has shape {list(self.mean.shape)}, but {site.name} is [{site.shape}]"
            )


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Resample(ActivationEdit):
    """Resample ablation: put in activations of other inputs.

    Attributes:
        values: `[n, ...features]`, a pool of activations.
        seed: which pool entry a token gets depends on (seed, position, token id) alone, so the edit is
            the same with and without a KV cache, in a batch and alone.
    """

    values: Tensor
    seed: int = 0
    feature_fields: ClassVar[tuple[str, ...]] = ("values",)

    overwrites: ClassVar[bool] = True

    def value(self, x: Tensor, here: Here) -> Tensor:
        run = here.run
        if run.length is not None and x.ndim > 2 and x.shape[1] == run.length:
            key = run.positions(x.device).clamp_min(0)
            if run.tokens is not None:
                key = key + 1_000_003 * run.tokens.to(x.device)
        else:
            key = run.rows(x.device).unsqueeze(1)
        mixed = (key + self.seed * 7_919) * 2_654_435_761 % (2**31)
        mixed = (mixed ^ (mixed >> 15)) * 2_246_822_519 % (2**31)
        chosen = self.values.to(x)[mixed % self.values.shape[0]]
        return chosen.expand_as(x).clone()


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Replace(ActivationEdit):
    """Activation patching: write a given value, usually from another trace.

    Attributes:
        with_value: `[...features]` for every token, or `[rows, pos, ...features]`, where `pos` counts
            real tokens (a single row serves all); padding and tokens beyond it are left alone.
    """

    with_value: Tensor

    overwrites: ClassVar[bool] = True

    @classmethod
    def from_trace(cls, trace: Trace, site: str) -> Replace:
        """Return the edit that writes what `trace` read at `site`; left padding is moved out of the way."""
        value, mask = trace[site], trace.mask
        if mask is not None and value.shape[:2] == mask.shape and not bool(mask[:, 0].all()):
            order = (~mask).to(torch.int8).argsort(dim=1, stable=True).to(value.device)
            rows = torch.arange(value.shape[0], device=value.device).unsqueeze(1)
            value = value[rows, order]
        return cls(site, value)

    def check(self, site: Site) -> None:
        check_tensor(self.with_value, "Replace.with_value")
        features = site.features
        if features is None or site.kind in ATTENTION_KINDS:
            return
        shape = tuple(self.with_value.shape)
        if shape[-len(features) :] != features and len(features) > 0:
            raise ShapeError(f"Replace.with_value has shape {list(shape)}, but {site.name} is [{site.shape}]")

    def value(self, x: Tensor, here: Here) -> Tensor:
        new = self.with_value.to(x)
        run = here.run
        unpadded = run.past == 0 and (run.full_mask is None or bool(run.full_mask.all()))
        if new.shape == x.shape and (unpadded or here.site.kind in ATTENTION_KINDS):
            return new
        if new.ndim < x.ndim:
            return new.expand_as(x).clone()
        if new.ndim != x.ndim or run.length is None or x.shape[1] != run.length:
            raise ShapeError(
                f"Replace.with_value has shape {list(new.shape)}, but {here.site.name} is {list(x.shape)}"
            )
        rows = run.rows(x.device)
        if new.shape[0] not in (1, int(rows[-1]) + 1):
            raise ShapeError(
                f"Replace.with_value has {new.shape[0]} rows, but the batch has {int(rows[-1]) + 1}"
            )
        positions = run.positions(x.device)
        covered = (positions >= 0) & (positions < new.shape[1])
        source = rows if new.shape[0] != 1 else torch.zeros_like(rows)
        aligned = new[source.unsqueeze(1), positions.clamp(0, new.shape[1] - 1)]
        return torch.where(covered.reshape(*covered.shape, *([1] * (x.ndim - 2))), aligned, x)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(ActivationEdit):
    """Directional ablation: remove the component in the span of some directions.

    Attributes:
        directions: `[d]` or `[k, d]`; they need not be orthogonal or of unit length.
    """

    directions: Tensor
    feature_fields: ClassVar[tuple[str, ...]] = ("directions",)

    def value(self, x: Tensor, here: Here) -> Tensor:
        basis = self.basis(x.device)
        wide = x.to(basis.dtype)
        return (wide - (wide @ basis) @ basis.T).to(x.dtype)

    def basis(self, device: torch.device | None = None) -> Tensor:
        """Return an orthonormal basis of the directions' span, `[d, k]`, float32 (float64 kept)."""
        rows = self.directions.reshape(-1, self.directions.shape[-1])
        rows = rows.to(device=device, dtype=torch.promote_types(rows.dtype, torch.float32))
        u, s, _ = torch.linalg.svd(rows.T, full_matrices=False)
        kept = (
            s > s.max() * 1e-6 if s.numel() and float(s.max()) > 0 else torch.zeros_like(s, dtype=torch.bool)
        )
        basis: Tensor = u[:, kept]
        return basis


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Clamp(ActivationEdit):
    """Keep the activation, or its component along a direction, within limits.

    Attributes:
        low, high: limits; `None` leaves that side open.
        direction: `[d]`; the component `x . direction / |direction|` is clamped instead of each entry.
    """

    low: float | None = None
    high: float | None = None
    direction: Tensor | None = None
    feature_fields: ClassVar[tuple[str, ...]] = ("direction",)

    def check(self, site: Site) -> None:
        super().check(site)
        if self.low is None and self.high is None:
            raise InputError("Clamp needs a limit: low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(f"Clamp has low={self.low} above high={self.high}")

    def value(self, x: Tensor, here: Here) -> Tensor:
        if self.direction is None:
            return x.clamp(self.low, self.high)
        unit = self.direction.to(x)
        unit = unit / unit.norm()
        along = (x * unit).sum(-1, keepdim=True)
        moved: Tensor = x + (along.clamp(self.low, self.high) - along) * unit
        return moved


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class HeadScale(ActivationEdit):
    """Scale single heads at `attn.z` (or `q`, `k`, `v`, `pattern`): a knob per head.

    Attributes:
        factors: factor by head number; heads that are not named keep 1.
    """

    factors: Mapping[int, float] = field(default_factory=dict)

    def check(self, site: Site) -> None:
        if site.features is None or "attn." not in site.kind:
            raise InputError(f"HeadScale needs a site with heads, e.g. 'blocks.5.attn.z', not {site.name}")
        wrong = [h for h in self.factors if not 0 <= int(h) < site.features[0]]
        if wrong:
            raise InputError(f"HeadScale names head {wrong[0]}, but {site.name} has {site.features[0]} heads")

    def value(self, x: Tensor, here: Here) -> Tensor:
        dim = 1 if here.site.kind in ATTENTION_KINDS else x.ndim - 2
        factor = torch.ones(x.shape[dim], dtype=x.dtype, device=x.device)
        for head, f in self.factors.items():
            factor[int(head)] = f
        return x * factor.reshape([-1 if i == dim else 1 for i in range(x.ndim)])

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record, tensors = super()._record()
        return record | {"factors": {str(h): float(f) for h, f in self.factors.items()}}, tensors

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        factors = {int(h): f for h, f in record["factors"].items()}
        return super()._rebuild({**record, "factors": factors}, tensors)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Substitute(ActivationEdit):
    """Put a lens's reconstruction in the activation's place: `lens.decode(lens.encode(x))`."""

    lens: Lens

    def value(self, x: Tensor, here: Here) -> Tensor:
        return self.lens.decode(self.lens.encode(x)).to(x.dtype).reshape(x.shape)

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        held = self.lens
        bare = Zero(self.site, strength=self.strength, scope=self.scope, condition=self.condition)
        record, tensors = bare._record()
        lens_record, lens_tensors = held._record()
        record["lens"] = {"type": type(held).__name__, **lens_record}
        return record, tensors | {f"own.{n}": t for n, t in lens_tensors.items()}

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        from actlas.core.lens import rebuild_lens

        own = {n.removeprefix("own."): t for n, t in tensors.items() if n.startswith("own.")}
        rest = {n: t for n, t in tensors.items() if not n.startswith("own.")}
        lens = rebuild_lens(record["lens"], own)
        bare = Zero._rebuild({k: v for k, v in record.items() if k != "lens"}, rest)
        assert isinstance(bare, ActivationEdit)
        return cls(bare.site, lens, strength=bare.strength, scope=bare.scope, condition=bare.condition)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class AttentionEdit(ActivationEdit):
    """Change pre-softmax attention scores: mask keys, add a bias, or set a temperature.

        scores' = scores / temperature + bias * [key in keys]        (heads: only those)

    The scope's positions, tokens and phase mean query tokens. With strength s the bias is s * bias and
    the temperature temperature ** s, so that 0 changes nothing.

    Attributes:
        keys: positions of key tokens (from 0; negative from the prompt's end) that get the bias;
            `None` means all keys.
        bias: what is added; `-inf` (the default) forbids attention to `keys` (knockout).
        temperature: above 1 flattens the pattern, below 1 sharpens it.
        heads: only these heads; `None` means all.
    """

    keys: tuple[int, ...] | None = None
    bias: float = 0.0
    temperature: float = 1.0
    heads: tuple[int, ...] | None = None

    @classmethod
    def knockout(
        cls, site: str, keys: tuple[int, ...], heads: tuple[int, ...] | None = None
    ) -> AttentionEdit:
        """Return the edit that forbids attention to the keys at these positions."""
        return cls(site, keys=tuple(keys), bias=-1e9, heads=heads)

    def check(self, site: Site) -> None:
        if not site.kind.endswith("scores"):
            raise InputError(
                f"AttentionEdit needs a site of scores, e.g. 'blocks.5.attn.scores', not {site.name}"
            )
        if self.temperature <= 0:
            raise InputError(f"temperature is {self.temperature}; it must be positive")

    def change(self, x: Tensor, here: Here) -> Tensor:
        new: Tensor = x / self.temperature**self.strength
        if self.bias:
            shift = self.bias * self.strength
            if self.keys is None:
                new = new + shift
            else:
                positions = here.run.positions(x.device, everything=True)[:, : x.shape[-1]]
                ends = here.run.prompt_mask(x.device).sum(1, keepdim=True)
                numbers = torch.tensor(self.keys, device=x.device)
                targets = torch.where(numbers < 0, ends + numbers, numbers.unsqueeze(0))
                chosen = (positions.unsqueeze(-1) == targets.unsqueeze(1)).any(-1)
                new = new + shift * chosen[:, None, None, :].to(x.dtype)
            new = new.clamp_min(torch.finfo(x.dtype).min)
        if self.heads is not None:
            wanted = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
            wanted[list(self.heads)] = True
            new = torch.where(wanted[None, :, None, None], new, x)
        return new

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        given = dict(record)
        for name in ("keys", "heads"):
            given[name] = tuple(given[name]) if given.get(name) is not None else None
        return super()._rebuild(given, tensors)


def with_length_of(x: Tensor, new: Tensor, site: Site) -> Tensor:
    """Return `new` with the length that `x` has over the site's feature axes; zero rows stay zero."""
    count = 1 if site.features is None else len(site.features)
    axes = tuple(range(-count, 0))
    wide = torch.promote_types(x.dtype, torch.float32)
    have = new.to(wide).norm(dim=axes, keepdim=True)
    want = x.to(wide).norm(dim=axes, keepdim=True)
    rescaled: Tensor = new.to(wide) * (want / have.clamp_min(1e-30))
    return rescaled.to(x.dtype)


def _numel(sizes: tuple[int, ...]) -> int:
    n = 1
    for s in sizes:
        n *= s
    return n


__all__ = [
    "Add",
    "AttentionEdit",
    "Clamp",
    "HeadScale",
    "MeanAblate",
    "ProjectOut",
    "Replace",
    "Resample",
    "Rotate",
    "Scale",
    "Scope",
    "Substitute",
    "SwapModule",
    "Zero",
]
