"""Circuits: find the parts of a model that cause a behaviour, and test that they do.

    pairs = PromptPairs.from_task(model, "ioi", n=32)       # clean and corrupted prompts, token by token
    effects = patch(model, pairs, "components", mode="noise")
    effects.top(5)                                          # the heads and MLPs that matter, with intervals

Everything here starts from a `PromptPairs`: prompts that differ in one thing, with one-token answers.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "PromptPairs": "batch",
    "Node": "nodes",
    "head": "nodes",
    "mlp": "nodes",
    "patch": "patching",
    "attribute": "attribution_patching",
    "screen": "screening",
    "Effects": "effects",
    "agreement": "effects",
    "heat_map": "views",
    "attention_view": "views",
    "knob_curve": "views",
    "path_patch": "path_patching",
    "attribute_edges": "edge_attribution",
    "EdgeRuns": "faithfulness",
    "Circuit": "circuit",
    "find_circuit": "circuit_search",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"actlas.circuits.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'actlas.circuits' has no attribute {name!r}")
