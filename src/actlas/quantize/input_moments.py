"""Root mean square of the inputs of linear layers, over calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from actlas.core.two_stream import BlockView, two_stream
from actlas.quantize.block_inputs import shared_inputs
from actlas.quantize.layers import Texts

if TYPE_CHECKING:
    from actlas.core.model import Model


def input_moments(model: Model, texts: Texts, *, cap: float | None = 10.0) -> dict[str, Tensor]:
    """Return path -> root mean square of each input channel `[in]`, float64, for the layers of all blocks.

    Args:
        model: the model, under whatever edits are installed.
        texts: calibration text.
        cap: a token counts at most as so many median ones (`block_inputs.shared_inputs`).
    """
    out: dict[str, Tensor] = {}

    def visit(block: BlockView) -> None:
        for x in shared_inputs(block, cap=cap):
            for name in x.names:
                out[block.paths[name]] = (x.gram.diagonal() / x.tokens).sqrt()

    two_stream(model, texts.fit, visit, context=texts.context, max_tokens=texts.tokens)
    return out
