"""Steering: change what a model does, and know what it costs.

    edit = fit_steer(model, pairs, budget=0.1)      # direction, layer and strength from a few pairs
    with model.edit(edit * 1.5):
        model.generate("The film was")

A direction is fitted from aligned texts (`core.contrast`), is a lens (`core.direction`), and becomes an
edit whose strength 1 is the largest that keeps within a budget of KL divergence to the plain model.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "fit_steer": "fit",
    "fit_direction": "fit",
    "auto": "auto",
    "kl_budget": "strength",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"actlas.steering.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'actlas.steering' has no attribute {name!r}")
