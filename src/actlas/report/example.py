"""An input for any module: the user's, the model's own, or a guess from the module's first layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.core.model import Model

_SIDES = (32, 64, 28, 96, 128, 224, 299)
_TOKENS = 16


@dataclass(frozen=True)
class Example:
    """Inputs of one forward pass.

    Attributes:
        inputs: a tensor, tuple or dictionary; `None` where the model makes its own.
        note: what a reader must know about them.
    """

    inputs: Any
    note: str = ""


def example_for(model: Model, given: Any = None, seed: int = 0) -> Example:
    """Return an input that the model accepts.

    Args:
        model: any model.
        given: the user's input; used as it is.
        seed: of random inputs.

    Raises:
        InputError: nothing was given and no guess went through the module.
    """
    if given is not None:
        return Example(given)
    if model.kind in ("causal-lm", "encoder", "image-classifier") and _own(model):
        return Example(None)
    module = model.module
    for guess in _guesses(module, torch.Generator().manual_seed(seed)):
        moved = guess.to(model.device)
        try:
            with torch.no_grad():
                module(moved)
        except Exception:
            continue
        shape = "x".join(map(str, guess.shape))
        return Example(
            moved, f"Measured on a random input of shape {shape}, guessed from the module's first layer."
        )
    raise InputError(
        f"{model.name} needs an example input: pass example= (a tensor, a tuple, or a dictionary of "
        "arguments)"
    )


def image_side(model: Model) -> int:
    """Return the side of the square images that a model without a processor takes, in pixels."""
    size = getattr(model.config, "image_size", None)
    if isinstance(size, (list, tuple)) and size:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else 224


def _own(model: Model) -> bool:
    """Whether the measure room can make an input: a config for text, a processor or config for images."""
    from actlas.measure.complexity import forward_arguments

    try:
        module, args, kwargs = forward_arguments(model, None, 8, 0)
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception:
        return False
    return True


def _guesses(module: nn.Module, generator: torch.Generator) -> list[Tensor]:
    first = next(
        (
            m
            for m in module.modules()
            if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.RNNBase))
        ),
        None,
    )

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    if isinstance(first, nn.Conv2d):
        return [random(1, first.in_channels, side, side) for side in _SIDES]
    if isinstance(first, nn.Conv1d):
        return [random(1, first.in_channels, length) for length in (128, 1024, 16_000)]
    if isinstance(first, nn.Conv3d):
        return [random(1, first.in_channels, side, side, side) for side in (16, 32, 64)]
    if isinstance(first, nn.Embedding):
        ids = torch.randint(first.num_embeddings, (1, _TOKENS), generator=generator)
        return [ids, ids[0]]
    if isinstance(first, nn.RNNBase):
        return [random(1, _TOKENS, first.input_size), random(_TOKENS, first.input_size)]
    if isinstance(first, nn.Linear):
        side = round(first.in_features**0.5)
        square = [random(1, 1, side, side)] if side * side == first.in_features else []
        return [random(1, first.in_features), random(1, _TOKENS, first.in_features), *square]
    return []
