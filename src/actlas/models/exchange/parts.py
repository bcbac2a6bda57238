"""What an export starts from: the edit as one set of quantised layers and replaced parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.core.weight_edit import WeightEdit

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass
class Parts:
    """What is written.

    Attributes:
        layers: quantised layers by path.
        state: all other tensors by name, as the edited model has them.
        untied: whether the head has a weight of its own although the model ties it.
    """

    layers: dict[str, QuantLinear] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    untied: bool = False


def parts_of(model: Model, edit: Edit) -> Parts:
    """Return what an edited model consists of.

    Raises:
        InputError: an edit that is not about weights, or a module that no format knows.
    """
    found = Parts()
    for part in edit.parts():
        if isinstance(part, QuantEdit):
            found.layers |= _layers(part)
        elif not isinstance(part, WeightEdit):
            raise InputError(
                f"{part.describe()} is not about weights, and no exchange format holds it; "
                "export the quantised layers alone and keep the other edit beside them"
            )
    with model.edit(edit):
        module: Any = model.module
        names = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
        own = tuple(f"{path}." for path in found.layers)
        for name in module.state_dict():
            if not name.startswith(own):
                found.state[name] = names[name].detach().clone()
        head, table = (_weight(m()) for m in (module.get_output_embeddings, module.get_input_embeddings))
        found.untied = head is not None and head is not table
    if not found.untied:
        found.state.pop("lm_head.weight", None)
    return found


def _weight(module: nn.Module | None) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _layers(edit: QuantEdit) -> dict[str, QuantLinear]:
    for path, module in edit.modules.items():
        if not isinstance(module, QuantLinear):
            raise InputError(
                f"{path} is a {type(module).__name__}; "
                "the exchange formats hold linear layers of codes and scales"
            )
    return {path: module for path, module in edit.modules.items() if isinstance(module, QuantLinear)}


def extras(layer: QuantLinear) -> list[str]:
    """Return the parts of a layer that are more than codes, scales and activations on a grid."""
    held = {
        "a low-rank branch": layer.up,
        "weights kept in 16 bits": layer.outlier_index,
        "a scale of its inputs": layer.input_scale,
        "a shift of its inputs": layer.input_shift,
        "an online rotation": layer.rotate,
    }
    return [name for name, value in held.items() if value is not None]


def one_dtype(state: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype of the floating point tensors (the first one's)."""
    return next((t.dtype for t in state if t.is_floating_point()), torch.float32)
