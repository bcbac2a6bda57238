"""Round activations to a number format, at any site: an Edit.

    QuantizeActivations("blocks.*.mlp.act", "int8-token")              # dynamic: one scale a token
    QuantizeActivations("blocks.3.attn_norm", "int6-channel-sym", scale)   # static: one scale a channel
    QuantizeActivations("blocks.*.attn_norm", "int6-channel-sym", scales)  # the same for [blocks, channels]
    QuantizeActivations("blocks.*.attn.pattern", "log2-4")             # powers of two for probabilities

Without `scale` the range is that of what comes in: of each token's features (`token`, `channel`), or of
groups of them. A range over the whole tensor would make a token depend on the other texts of its batch, so
that one scale for everything must be given, from calibration. At `attn.pattern` a "token" is one row of
attention.

Where gradients are wanted they go straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import ActivationEdit, Here, check_tensor, register_edit
from actlas.core.errors import InputError, ShapeError
from actlas.core.layout import ATTENTION_KINDS
from actlas.core.numbers import QuantParams, QuantSpec, params_of, quantize
from actlas.core.quant_linear import ActQuant

if TYPE_CHECKING:
    from actlas.core.sites import Site


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class QuantizeActivations(ActivationEdit):
    """Round the activation to the nearest number of a format.

    Attributes:
        spec: the format, by name or as a `QuantSpec`.
        scale: static scales: one `[1]`, or one for each feature `[features]` (heads flattened); for a pattern
            over blocks one row a block, `[blocks, 1 or features]`. `None`: dynamic.
        zero: static zero points of the same shape, of asymmetric integers.
        clip: share of a dynamic range that is kept.
    """

    spec: str | QuantSpec
    scale: Tensor | None = None
    zero: Tensor | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        spec = QuantSpec.parse(self.spec)
        object.__setattr__(self, "spec", spec.name)
        if not 0 < self.clip <= 1:
            raise InputError(f"clip is {self.clip:g}; it must lie in (0, 1], 1 keeps the whole range")
        if self.scale is None:
            if self.zero is not None:
                raise InputError("zero points need the scales that they belong to; give scale too")
            if spec.granularity == "tensor" and spec.grid != "log2":
                raise InputError(
                    f"{spec.name} at {self.site}: one scale for everything must be static, since a dynamic "
                    "one would depend on the rest of the batch; give scale, or take a format per token"
                )
            if spec.grid == "nvfp4":
                raise InputError(
                    "nvfp4 has one scale for the whole tensor, which would depend on the rest of the batch; "
                    "take mxfp4 or fp4-e2m1-g16"
                )
            return
        for name, value in (("scale", self.scale), ("zero", self.zero)):
            if value is not None:
                check_tensor(value, f"QuantizeActivations.{name}")
        if not bool((self.scale > 0).all()):
            raise InputError(
                f"a scale at {self.site} is {float(self.scale.min()):g}; scales must be positive"
            )
        if spec.grid in ("mx", "nvfp4", "binary", "log2"):
            raise InputError(f"{spec.name} takes no static scales; it has its own")
        asymmetric = spec.grid == "int" and not (spec.symmetric or spec.centred)
        if asymmetric != (self.zero is not None):
            need = "needs zero points" if asymmetric else "has no zero points"
            raise InputError(f"{spec.name} {need}, and zero was {'not ' if asymmetric else ''}given")
        if self.scale.ndim not in (1, 2):
            raise ShapeError(
                f"scale is {list(self.scale.shape)}; it must be [features] or [blocks, features]"
            )
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ShapeError(
                f"zero is {list(self.zero.shape)}; it must be {list(self.scale.shape)}, as the scale"
            )

    @property
    def format(self) -> QuantSpec:
        """The number format."""
        return QuantSpec.parse(self.spec)

    @property
    def static(self) -> bool:
        """Whether the range is fixed."""
        return self.scale is not None

    def describe(self) -> str:
        kind = "static" if self.static else "dynamic"
        return f"{super().describe()} ({self.spec}, {kind})"

    def check(self, site: Site) -> None:
        if self.format.grid == "log2" and not site.kind.endswith("pattern"):
            raise InputError(
                f"{self.spec} holds probabilities; it belongs to attn.pattern, not to {site.name}"
            )
        width = 0
        if self.scale is not None:
            width = self.scale.shape[-1]
            if self.scale.ndim == 2 and (site.block is None or site.block >= len(self.scale)):
                raise ShapeError(
                    f"scale has rows for {len(self.scale)} blocks; {site.name} is not one of them"
                )
        if site.kind in ATTENTION_KINDS:
            if width > 1:
                raise ShapeError(f"{site.name} has as many columns as tokens; it takes one static scale")
            return
        if site.features is None:
            return
        columns = _numel(site.features)
        if width not in (0, 1, columns):
            raise ShapeError(f"{width} static scales do not fit {site.name}, which has {columns} features")
        if self.scale is None:
            self.format.check(columns, site.name)

    def value(self, x: Tensor, here: Here) -> Tensor:
        attention = here.site.kind in ATTENTION_KINDS
        count = 1 if attention or here.site.features is None else len(here.site.features)
        flat = x.flatten(-count) if count > 1 else x
        rounded = self._round(flat.detach(), here.site)
        if torch.is_grad_enabled() and x.requires_grad:
            rounded = flat + (rounded - flat).detach()
        return rounded.reshape(x.shape)

    def params(self, site: Site) -> QuantParams | None:
        """Return the static scales at a site, `[1, 1 or features]`, or `None`."""
        if self.scale is None:
            return None
        row = slice(None) if self.scale.ndim == 1 else site.block
        zero = None if self.zero is None else self.zero[row].reshape(1, -1)
        return QuantParams(self.scale[row].reshape(1, -1), zero)

    def _round(self, x: Tensor, site: Site) -> Tensor:
        spec, params = self.format, self.params(site)
        if params is not None:
            return ActQuant(spec, params.to(x.device))(x)
        if self.clip != 1.0:
            return ActQuant(spec, None, self.clip)(x)
        return quantize(x, spec, where=self.site)


def per_block(kind: str, parts: Sequence[QuantizeActivations]) -> QuantizeActivations:
    """Return one edit for the static ones of all blocks, in order, at sites of one kind.

    Raises:
        InputError: none, other formats, or dynamic ones.
    """
    if not parts or len({p.spec for p in parts}) != 1 or any(p.scale is None for p in parts):
        raise InputError(f"blocks.*.{kind}: static quantisers of one format are needed, one a block")
    scale = torch.stack([p.scale for p in parts if p.scale is not None])
    zeros = [p.zero for p in parts if p.zero is not None]
    return QuantizeActivations(
        f"blocks.*.{kind}", parts[0].spec, scale, torch.stack(zeros) if zeros else None
    )


def static_quantizer(
    site: str, spec: str | QuantSpec, low: Tensor, high: Tensor, *, floor: float = 1e-5, **options: Any
) -> QuantizeActivations:
    """Return the edit with a static range.

    Args:
        site: where.
        spec: the format; `"tensor"` takes one scale, `"channel"` one for each feature.
        low, high: ends of the range of each feature, `[features]`, from calibration.
        floor: channels that were silent get at least this part of the median range, so that they do not
            explode when they speak.
        **options: further fields of `QuantizeActivations`.

    Raises:
        InputError: a granularity that static ranges have not got.
    """
    spec = QuantSpec.parse(spec)
    scale, zero = static_params(spec, low, high, floor, site)
    return QuantizeActivations(site, spec, scale, zero, **options)


def static_params(
    spec: QuantSpec, low: Tensor, high: Tensor, floor: float = 1e-5, where: str = "this site"
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero, flat, for ranges of features; see `static_quantizer`."""
    if spec.granularity == "group":
        raise InputError(
            f"{where}: a static range has one scale (tensor) or one a channel, not groups ({spec})"
        )
    low, high = low.detach().float().flatten(), high.detach().float().flatten()
    if low.shape != high.shape or not len(low):
        raise ShapeError(f"{where}: {len(low)} lower ends do not fit {len(high)} upper ones")
    if spec.granularity == "tensor":
        low, high = low.min().reshape(1), high.max().reshape(1)
    elif len(low) > 1:
        reach = torch.maximum(low.abs(), high.abs())
        least = float(reach.median()) * floor
        silent = reach < least
        high = torch.where(silent, torch.full_like(high, least), high)
        low = torch.where(silent, torch.full_like(low, -least), low)
    rows = QuantSpec(**{**spec.__dict__, "granularity": "channel", "group_size": None, "scale_rule": "max"})
    params = params_of(low.reshape(-1, 1), rows, low.reshape(-1, 1), high.reshape(-1, 1), where=where)
    return params.scale.flatten(), None if params.zero is None else params.zero.flatten()


def _numel(sizes: tuple[int, ...]) -> int:
    n = 1
    for s in sizes:
        n *= s
    return n
