"""QuantizedInput: a saveable layer behind an activation quantiser, e.g. with ranges by timestep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.errors import InputError
from actlas.core.swap import MODULE_TYPES, register_module


@register_module
class QuantizedInput(nn.Module):
    """A layer whose input goes through an `ActQuantizer` first.

    Args:
        act: the quantiser.
        layer: a registered module, e.g. a `QuantLinear`.
    """

    def __init__(self, act: ActQuantizer, layer: nn.Module) -> None:
        super().__init__()
        self.act, self.layer = act, layer

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def in_features(self) -> Any:
        """The layer's."""
        return getattr(self.layer, "in_features", None)

    @property
    def out_features(self) -> Any:
        """The layer's."""
        return getattr(self.layer, "out_features", None)

    @property
    def keep_dense(self) -> bool:
        """Whether the layer keeps its dequantised weight between calls."""
        return bool(getattr(self.layer, "keep_dense", False))

    @keep_dense.setter
    def keep_dense(self, keep: bool) -> None:
        self.layer.keep_dense = keep  # type: ignore[assignment]

    def drop(self) -> None:
        """Forget the dequantised weight."""
        if hasattr(self.layer, "drop"):
            self.layer.drop()  # type: ignore[operator]

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        layer = {"type": type(self.layer).__name__, "config": self.layer.config()}  # type: ignore[operator]
        return {"act": self.act.config(), "layer": layer}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantizedInput:
        """Build an empty one."""
        kind = config["layer"]["type"]
        if kind not in MODULE_TYPES:
            raise InputError(f"a layer of unknown type {kind!r}; upgrade Actlas")
        return cls(
            ActQuantizer.from_config(config["act"]), MODULE_TYPES[kind].from_config(config["layer"]["config"])
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.act(x))
        return out
