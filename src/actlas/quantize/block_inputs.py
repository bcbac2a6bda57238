"""What the linear layers of a block receive, for methods that go through a model block by block.

    for group in shared_inputs(block):           # q, k and v; o; gate and up; down
        gram = group.gram                        # X^T X over all calibration tokens

Layers that are called with the same tensor share their inputs; this is seen in a pass, not read from names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import NonFiniteError
from actlas.core.layout import find
from actlas.core.two_stream import BlockView

_ROWS = 256  # rows multiplied at once in float32


@dataclass
class SharedInput:
    """Layers of a block that read the same tensor.

    Attributes:
        names: their relative names, e.g. `("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")`.
        gram: sum of `x x^T` over tokens (see `shared_inputs` for their weights), float64 `[in, in]`.
        absolute: sum of `|x|`, float64 `[in]`.
        largest: of `|x|`, `[in]`.
        tokens: how many.
    """

    names: tuple[str, ...]
    gram: Tensor
    absolute: Tensor
    largest: Tensor
    tokens: int = 0

    def add(self, rows: Tensor, cap: float | None = None) -> None:
        """Take in rows `[n, in]`."""
        counted = rows if cap is None else rows * capped(rows, cap).unsqueeze(1)
        for part in counted.split(_ROWS):
            self.gram += part.T @ part
        magnitude = rows.abs()
        self.absolute += magnitude.sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, magnitude.amax(0))
        self.tokens += len(rows)


def capped(rows: Tensor, cap: float) -> Tensor:
    """Return factors `[n]`, at most 1, that bring rows to at most `cap` times the median squared length."""
    length = rows.square().sum(1)
    return (cap * length.median() / length.clamp_min(1e-30)).clamp_max(1.0).sqrt()


def shared_inputs(
    block: BlockView, names: Sequence[str] | None = None, *, cap: float | None = None
) -> list[SharedInput]:
    """Run the block on all calibration tokens, in the model edited so far, and sum up its layers' inputs.

    Args:
        block: as a visitor of `two_stream` gets it.
        names: only these layers; default: all.
        cap: a token's squared length counts in `gram` as at most so many median ones of its batch. The first
            token of a text carries activations a thousand times larger than all others in most language
            models, and would otherwise be all that the Hessian knows.

    Returns:
        in the order in which the block calls them; layers of experts that no token reached are left out.

    Raises:
        NonFiniteError: NaN or infinities in an input.
    """
    found: dict[tuple[str, ...], SharedInput] = {}
    for batch in range(block.n_batches):
        for key, rows in batch_inputs(block, batch, names):
            if key not in found:
                d = rows.shape[1]
                zeros = torch.zeros(d, dtype=torch.float64, device=rows.device)
                gram = torch.zeros(d, d, dtype=torch.float64, device=rows.device)
                found[key] = SharedInput(key, gram, zeros, torch.zeros(d, device=rows.device))
            found[key].add(rows, cap)
    return list(found.values())


def batch_inputs(
    block: BlockView, batch: int, names: Sequence[str] | None = None
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield (names of layers that share an input, its rows `[n, in]` without padding) for one batch."""
    mask = block.mask(batch)
    inputs: dict[int, Tensor] = {}
    readers: dict[int, list[str]] = {}
    wanted = list(block.linears if names is None else names)
    with ExitStack() as stack, torch.no_grad():
        for name in wanted:
            module = find(block.module, name)
            assert module is not None
            handle = module.register_forward_pre_hook(_note(name, inputs, readers))
            stack.callback(handle.remove)
        block.forward(block.hidden(batch)[1], batch)
    for key, x in inputs.items():
        rows = real_rows(x, mask)
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError(f"{block.name}: the input of {readers[key][0]} holds NaN or infinities")
        if len(rows):
            yield tuple(readers[key]), rows


def real_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Return the rows `[n, d]` of real tokens; all of them where the axes are not those of the batch."""
    if x.shape[:-1] == mask.shape:
        return x[mask]
    flat = x.reshape(-1, x.shape[-1])
    return flat[mask.reshape(-1)] if len(flat) == mask.numel() else flat


def _note(name: str, inputs: dict[int, Tensor], readers: dict[int, list[str]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        key = args[0].data_ptr()
        if key in inputs and inputs[key].shape != x.shape:
            key = id(args[0])
        inputs[key] = x  # held until the pass is over, so that no other tensor gets its place
        readers.setdefault(key, []).append(name)

    return hook
