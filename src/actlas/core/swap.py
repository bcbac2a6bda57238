"""The module surgeon: swap a submodule for another, reversibly, and save the result as data.

A module that should be saveable registers a builder from plain data, so that loading an artifact
builds a known class from numbers and never runs foreign code:

    @register_module
    class LowRankLinear(nn.Module):
        def config(self) -> dict: ...
        @classmethod
        def from_config(cls, config) -> "LowRankLinear": ...

    edit = SwapModule("model.layers.5.mlp.down_proj", LowRankLinear.of(linear, rank=64))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit, WholeEdit, register_edit
from actlas.core.errors import ArtifactError, InputError
from actlas.core.layout import find, weight_matrix

if TYPE_CHECKING:
    from actlas.core.installation import Installation

MODULE_TYPES: dict[str, Any] = {}
M = TypeVar("M", bound=type[nn.Module])


def register_module(cls: M) -> M:
    """Make a module class saveable inside edits; it needs `config()` and `from_config(config)`."""
    MODULE_TYPES[cls.__name__] = cls
    return cls


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class SwapModule(WholeEdit):
    """Put `module` in the place of the submodule at `path` while the edit is installed.

    Attributes:
        path: a dotted path (`"model.layers.5.mlp"`), or a `module:` site.
        module: the replacement; it is called exactly as the original was.
    """

    whole: ClassVar[str] = "a module edit is in or out, for every token"

    path: str
    module: nn.Module

    def describe(self) -> str:
        return f"SwapModule at {self.path} by {type(self.module).__name__}"

    def _attach(self, installation: Installation) -> None:
        installation.swap(self)

    def swap_in(self, root: nn.Module) -> nn.Module:
        """Put the replacement in; return the original.

        Raises:
            InputError: there is no such submodule, or it has hooks (of an edit or a reader) on it.
        """
        original = self._original(root)
        self._put(root, self.module)
        return original

    def swap_out(self, root: nn.Module, original: nn.Module) -> None:
        """Put the original back."""
        self._put(root, original)

    def _original(self, root: nn.Module) -> nn.Module:
        path = self.path.removeprefix("module:")
        original = find(root, path) if path else None
        if original is None:
            raise InputError(f"no submodule {path!r} in {type(root).__name__}; see its named_modules()")
        return original

    def _put(self, root: nn.Module, module: nn.Module) -> None:
        parent_path, _, name = self.path.removeprefix("module:").rpartition(".")
        parent = find(root, parent_path)
        assert parent is not None
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            parent[int(name)] = module
        else:
            setattr(parent, name, module)

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        name = type(self.module).__name__
        if name not in MODULE_TYPES:
            raise InputError(f"{name} cannot be saved: register it with actlas.core.swap.register_module")
        record = {"path": self.path, "module": {"type": name, "config": self.module.config()}}  # type: ignore[operator]
        return record, dict(self.module.state_dict())

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        name = record["module"]["type"]
        if name not in MODULE_TYPES:
            from actlas.core.methods import import_rooms

            import_rooms()
        if name not in MODULE_TYPES:
            raise ArtifactError(f"the edit holds a module of unknown type {name!r}; upgrade Actlas")
        module = MODULE_TYPES[name].from_config(record["module"]["config"])
        try:
            module.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ArtifactError(f"the tensors of {name} do not fit its configuration") from error
        return cls(record["path"], module.eval())


@register_module
class LowRankLinear(nn.Module):
    """A linear map of rank r: `y = up (down x) + bias`, the truncated SVD of another one.

    Args:
        in_features, out_features: sizes.
        rank: r.
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def of(cls, linear: nn.Module, rank: int) -> LowRankLinear:
        """Return the best rank-`rank` approximation of a linear map (Eckart and Young).

        Raises:
            InputError: the rank is not between 1 and the smaller size.
        """
        weight = weight_matrix(linear).detach()
        limit = min(weight.shape)
        if not 1 <= rank <= limit:
            raise InputError(
                f"rank is {rank}; this {weight.shape[0]} x {weight.shape[1]} map allows 1 to {limit}"
            )
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        bias = getattr(linear, "bias", None)
        new = cls(weight.shape[1], weight.shape[0], rank, bias is not None)
        with torch.no_grad():
            new.up.weight.copy_(u[:, :rank] * s[:rank])
            new.down.weight.copy_(v[:rank])
            if bias is not None:
                new.up.bias.copy_(bias)
        return new.to(weight).eval()

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            "in_features": self.down.in_features,
            "out_features": self.up.out_features,
            "rank": self.down.out_features,
            "bias": self.up.bias is not None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LowRankLinear:
        """Build an empty one of these sizes."""
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out
