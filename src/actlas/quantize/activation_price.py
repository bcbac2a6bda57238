"""Prices of edits that consist of quantised layers and rounded activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from actlas.core.edit import Edit
from actlas.core.measurement import Measurement
from actlas.core.quant_edit import QuantEdit
from actlas.measure.quant_price import fit_measurements

if TYPE_CHECKING:
    from actlas.core.model import Model


def priced(
    model: Model, texts: Iterable[Any], edit: Edit, *, tokens: int, context: int, seed: int = 0
) -> list[Measurement]:
    """Return the price of an edit on text, and the bits of a weight of the quantised layers among its parts.

    Args:
        model, texts, tokens, context, seed: as of `measure.quant_price.fit_measurements`.
        edit: what is measured as a whole.
    """
    texts = list(texts)
    found = fit_measurements(model, texts, edit, tokens=tokens, context=context, seed=seed)
    layers = [part for part in edit.parts() if isinstance(part, QuantEdit) and part.weights]
    if not found or len(layers) != 1 or any(m.name == "bits-per-weight" for m in found):
        return found
    bits = Measurement(
        "bits-per-weight", layers[0].bits_per_weight, "bits", 1, better="lower", note=layers[0].describe()
    )
    return [bits, *found]
