"""SkipInputs: a linear layer leaves out the inputs that matter least, token by token.

    y = W (m * x),     m_i = 1 where s_i is large,     s_i = |f(x_i)| * c_i

A skipped input is a column of W that need not be read, which is what makes sparse decoding fast. All methods
of activation sparsity differ only in the factor c and in what "large" means:

    threshold   s_i >= t (one for the layer), or s_i >= t_i (one for each channel)
    keep        the k largest of the token (k a share of the channels)
    frozen      a fixed set, whatever the token

`site` names where x is read: a canonical site, when all layers that read it skip the same inputs
(`blocks.3.mlp.act` is what the down projection reads), or the input of one layer
(`module:model.layers.3.mlp.up_proj.input`). Kernels and the decode loop read `mask`'s rule from the fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.edit import ActivationEdit, Here, register_edit
from actlas.core.errors import InputError
from actlas.kernels.selection import topk_mask

if TYPE_CHECKING:
    from actlas.core.sites import Site

_AT_ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class SkipInputs(ActivationEdit):
    """Zero the inputs whose score is small; see the module docstring.

    Attributes:
        factor: `[d]` or one number, c; not negative.
        threshold: `[d]` or one number: inputs whose score is below it are skipped. 0 skips nothing.
        keep: share of the inputs of a token that is kept, in (0, 1], rounded to whole inputs; `None`: a
            threshold decides. Ties are broken by the lower channel.
        frozen: bool `[d]`: these inputs are kept and no score is computed.
        activation: name of f, where the layer's input is decided by another value than itself; `""`: x.
    """

    factor: Tensor | float = 1.0
    threshold: Tensor | float = 0.0
    keep: float | None = None
    frozen: Tensor | None = None
    activation: str = ""
    feature_fields: ClassVar[tuple[str, ...]] = ("factor", "threshold")

    #: Sparse layers often have tokens on which nothing is below the threshold; that is not worth a warning.
    may_do_nothing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.activation not in _AT_ZERO:
            raise InputError(
                f"activation is {self.activation!r}; it must be one of {', '.join(filter(None, _AT_ZERO))}"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(
                f"keep is the share of inputs that is kept; it must lie in (0, 1], not {self.keep}"
            )
        for name in ("factor", "threshold"):
            value = getattr(self, name)
            least = float(value.min()) if isinstance(value, Tensor) else float(value)
            if not least >= 0:
                raise InputError(f"{name} must not be negative, and holds {least:g}")
        if self.frozen is not None and self.frozen.dtype != torch.bool:
            raise InputError(f"frozen is a set of channels as bool [d], not {self.frozen.dtype}")

    def check(self, site: Site) -> None:
        super().check(site)
        if self.frozen is not None and site.features is not None:
            want = 1
            for size in site.features:
                want *= size
            if self.frozen.numel() != want:
                raise InputError(
                    f"frozen has {self.frozen.numel()} channels, but {site.name} is [{site.shape}]"
                )

    def mask(self, x: Tensor) -> Tensor:
        """Return which inputs are kept, bool, of the shape of `x` `[..., d]`."""
        if self.frozen is not None:
            return self.frozen.to(x.device).expand(x.shape)
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = self.factor.to(x.device, wide) if isinstance(self.factor, Tensor) else self.factor
        score = _AT_ZERO[self.activation](x.to(wide)).abs() * factor
        if self.keep is None:
            threshold = self.threshold
            kept: Tensor = score >= (threshold.to(score) if isinstance(threshold, Tensor) else threshold)
            return kept
        k = max(1, round(self.keep * x.shape[-1]))
        if k == x.shape[-1]:
            return torch.ones_like(score, dtype=torch.bool)
        return topk_mask(score, k)

    def value(self, x: Tensor, here: Here) -> Tensor:
        return torch.where(self.mask(x), x, x.new_zeros(()))
