"""Edits that drop small activations: below a threshold, or outside the top k.

    MaskBelow(site, thresholds)                    x_i -> 0 where |x_i| < threshold_i
    KeepTop(site, weights, keep=0.3)               keep the entries with the largest |x_i| * weight_i
    count_active(model, sites) -> Active           how many entries are not zero, while a block runs

With `activation="silu"` an edit at the gate's pre-activation judges `|silu(x_i)|` and still writes zeros,
which drops the neuron just as well because `silu(0) = 0`. Comparison is strict (`<`), so a threshold of
0 changes nothing, bit for bit, and a dead neuron never counts as active.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.edit import ActivationEdit, Here, register_edit
from actlas.core.errors import InputError
from actlas.core.hooks import attach
from actlas.core.installation import PassWatcher

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

_ZERO_AT_ZERO = {
    "": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation_function(name: str, x: Tensor) -> Tensor:
    """Apply an activation function with f(0) = 0 by its transformers name; `""` is the identity.

    Raises:
        InputError: an unknown name, or a function that is not 0 at 0.
    """
    if name not in _ZERO_AT_ZERO:
        raise InputError(f"activation {name!r} is not one of {', '.join(n for n in _ZERO_AT_ZERO if n)}")
    return _ZERO_AT_ZERO[name](x)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class MaskBelow(ActivationEdit):
    """Set entries to 0 where `|f(x_i)| < threshold_i`; every token, whatever the phase, unless `at` says.

    Attributes:
        thresholds: not negative; broadcasts against the site's features.
        activation: name of f, `""` for the identity.
    """

    thresholds: Tensor
    activation: str = ""
    feature_fields: ClassVar[tuple[str, ...]] = ("thresholds",)

    def __post_init__(self) -> None:
        activation_function(self.activation, torch.zeros(1))
        if bool((self.thresholds < 0).any()):
            raise InputError(f"thresholds must not be negative, not {float(self.thresholds.min()):g}")

    def value(self, x: Tensor, here: Here) -> Tensor:
        size = activation_function(self.activation, x).abs()
        return torch.where(size < self.thresholds.to(x), x.new_zeros(()), x)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class KeepTop(ActivationEdit):
    """Keep the share `keep` of entries with the largest `|f(x_i)| * weight_i`; set the others to 0.

    Attributes:
        weights: factor of each entry, e.g. the norms of the down projection's columns; broadcasts.
        keep: share of entries to keep, in [0, 1]; rounded to whole entries.
        activation: name of f, `""` for the identity.
        joint: take the top over all tokens of a pass together, as the released code of Sparsing Law
            does; a token's result then depends on its batch. By default each token has its own.
    """

    weights: Tensor
    keep: float = 1.0
    activation: str = ""
    joint: bool = False
    feature_fields: ClassVar[tuple[str, ...]] = ("weights",)

    def __post_init__(self) -> None:
        activation_function(self.activation, torch.zeros(1))
        if not 0 <= self.keep <= 1:
            raise InputError(f"keep is the share of entries to keep and lies in [0, 1], not {self.keep}")

    def value(self, x: Tensor, here: Here) -> Tensor:
        score = activation_function(self.activation, x).abs() * self.weights.to(x)
        flat = score.flatten() if self.joint else score
        k = round(self.keep * flat.shape[-1])
        if k == flat.shape[-1]:
            return x
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept.scatter_(-1, flat.topk(k, dim=-1).indices, True)
        return torch.where(kept.reshape(x.shape), x, x.new_zeros(()))


@dataclass
class Active:
    """Entries that are not zero, counted over real tokens.

    Attributes:
        active, total: by site name.
    """

    active: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    @property
    def per_site(self) -> dict[str, float]:
        """Share of active entries by site."""
        return {site: self.active[site] / self.total[site] for site in self.total}

    @property
    def ratio(self) -> float:
        """The mean over sites of their shares (sites count alike, whatever their width)."""
        shares = list(self.per_site.values())
        return sum(shares) / len(shares) if shares else float("nan")


@contextmanager
def count_active(model: Model, sites: Iterable[Site], *, skip_first: int = 0) -> Iterator[Active]:
    """Count entries that are not zero in every pass of the block; padding does not count.

    Enter it inside `model.edit(...)`, so that it sees what the edits wrote.

    Args:
        model: the model.
        sites: resolved sites with one row of channels a token.
        skip_first: leave out so many first tokens of each row.
    """
    found = Active()
    watcher = PassWatcher(model)
    handles = []

    def counter(site: Site) -> None:
        def count(x: Tensor) -> Tensor:
            run = watcher.of(site)
            rows = x
            if run.length is not None and x.ndim > 2 and x.shape[1] == run.length:
                keep = run.real(x.device)
                if skip_first:
                    keep = keep & (run.positions(x.device) >= skip_first)
                rows = x[keep]
            found.active[site.name] = found.active.get(site.name, 0) + int(torch.count_nonzero(rows))
            found.total[site.name] = found.total.get(site.name, 0) + rows.numel()
            return x

        handles.append(attach(model.module, site, count, batch=lambda: watcher.of(site).batch))

    watcher.start()
    try:
        for site in sites:
            counter(site)
        yield found
    finally:
        for handle in handles:
            handle.remove()
        watcher.stop()
