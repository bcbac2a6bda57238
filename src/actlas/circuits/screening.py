"""Screening: estimate every part by attribution, then patch the largest exactly.

A model of 30 blocks has 46,000 neurons, and a dictionary thousands of features: too many to patch one at a
time. Attribution patching ranks them all at the price of three forward passes; the first `top` are patched
exactly. What is large only together with others, or where attention saturates, can be missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actlas.circuits.attribution_patching import attribute
from actlas.circuits.effects import Effects, Part
from actlas.circuits.patching import patch
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model


def screen(
    model: Model,
    pairs: PromptPairs,
    over: str | Sequence[Part],
    *,
    top: int = 50,
    steps: int = 0,
    **options: Any,
) -> tuple[Effects, Effects]:
    """Estimate all parts, and patch those with the largest estimates.

    Args:
        model, pairs, over, options: as for `patch`.
        top: how many are patched.
        steps: of integrated gradients for the estimate; see `attribute`.

    Returns:
        Exact effects of the chosen parts and the estimates of the same parts, largest estimate first.

    Raises:
        InputError: `top` is below 1.
    """
    if top < 1:
        raise InputError(f"top={top} leaves nothing to patch; give at least 1")
    lens = options.get("lens")
    kept = {k: v for k, v in options.items() if k != "batch_tokens"}
    estimated = attribute(model, pairs, over, steps=steps, **kept)
    chosen = estimated.only(estimated.values.abs().argsort(descending=True, stable=True)[:top].tolist())
    exact = {k: v for k, v in options.items() if k not in ("layers", "positions", "lens")}
    return patch(model, pairs, list(chosen.parts), lens=lens, **exact), chosen
