"""Skipped inputs at any level, from one calibration and one backward pass.

The rule is the sparsity room's own (`sparsity/priced_inputs.py`): one price per weight sets the share of
every layer, by what the loss minds; within a layer an input's size times its column norm decides. Layers
whose inputs are not a multiple of 32 stay dense, since the lean loop reads columns in groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.calibration import Calibration
from actlas.core.edit import Edit
from actlas.kernels.packed import GROUP
from actlas.measure.linear_layers import linear_layers
from actlas.sparsity.allocate import by_price
from actlas.sparsity.input_sparsity import calibrate_inputs, factors, skip_inputs, uniform
from actlas.sparsity.sensitivity import input_gradients

if TYPE_CHECKING:
    from actlas.core.model import Model


class Skipping:
    """Makes the edit of any level.

    Args:
        model: a causal language model.
        documents: text to calibrate on.
        tokens, gradient_tokens: how much of it is read forward, and backward.
        seed: of the sample and of the drawn labels.
    """

    def __init__(
        self,
        model: Model,
        documents: Sequence[Any],
        *,
        tokens: int = 4096,
        gradient_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        self.model, self.documents, self.seed = model, documents, seed
        self.tokens, self.gradient_tokens = tokens, gradient_tokens
        self.layers = [layer for layer in linear_layers(model) if layer.columns % GROUP == 0]
        self._calibration: Calibration | None = None
        self._scores: dict[str, Tensor] = {}

    def probe(self, level: float) -> Edit:
        """Return a rough edit in which every layer skips the same share, for timing only."""
        found = calibrate_inputs(
            self.model, self.documents, tokens=256, context=128, rows=128, seed=self.seed
        )
        return skip_inputs(
            self.model, found, uniform(self.layers, level), factors(self.model, self.layers, "magnitude")
        )

    def prepare(self) -> None:
        """Read the text: forward for the inputs, backward for what the loss minds."""
        if self._calibration is not None:
            return
        minds = input_gradients(
            self.model, self.documents, self.layers, tokens=self.gradient_tokens, context=128, seed=self.seed
        )
        found = calibrate_inputs(self.model, self.documents, tokens=self.tokens, seed=self.seed)
        self._scores = {p.path: found[p.reads].rows.abs() * minds[p.path].cpu() for p in self.layers}
        self._calibration = found

    def edit(self, level: float) -> Edit:
        """Return the edit that skips this share of the blocks' weights.

        Raises:
            InputError: a level outside [0, 1), or 0.
        """
        self.prepare()
        assert self._calibration is not None
        shares = by_price(self.layers, self._scores, level)
        norms = factors(self.model, self.layers, "wina")
        with torch.no_grad():
            return skip_inputs(self.model, self._calibration, shares, norms)
