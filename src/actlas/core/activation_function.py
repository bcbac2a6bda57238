"""The activation function of a model's MLPs, by its transformers name and as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from actlas.core.model import Model

_FIELDS = ("hidden_activation", "hidden_act", "activation_function", "dense_act_fn", "activation")


def activation_name(model: Model) -> str:
    """Return its transformers name, e.g. `"silu"`; empty if the model's configuration does not say."""
    config: Any = getattr(model.config, "text_config", None) or model.config
    return next((str(v) for n in _FIELDS if (v := getattr(config, n, None))), "")


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function of a transformers name; an empty name is the identity.

    Raises:
        InputError: no such function.
    """
    from transformers.activations import ACT2FN

    if not name:
        return lambda x: x
    if name not in ACT2FN:
        raise InputError(f"there is no activation function {name!r}{did_you_mean(name, ACT2FN)}")
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found
