"""Equivalent transforms: scales, shifts and rotations that move between weights and change no output.

    found = slots(model)                                        # traced, not looked up in a table
    fold = fold_scale(model, found.reading("model.layers.0.mlp.down_proj"), s)
    with model.edit(fold.edit()): ...                           # the same logits

`slots.py` finds where; `folding.py` says what.
"""

from actlas.core.transforms.folding import (
    Fold,
    Folding,
    fold_norms,
    fold_scale,
    fold_shift,
    rotate_residual,
    rotate_v_o,
)
from actlas.core.transforms.norms import NormUse, PlainNorm
from actlas.core.transforms.slots import Refused, Slot, Slots, slots

__all__ = [
    "Fold",
    "Folding",
    "NormUse",
    "PlainNorm",
    "Refused",
    "Slot",
    "Slots",
    "fold_norms",
    "fold_scale",
    "fold_shift",
    "rotate_residual",
    "rotate_v_o",
    "slots",
]
