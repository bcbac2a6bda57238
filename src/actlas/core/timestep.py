"""At which timestep a diffusion model is being run, for quantisers that differ from step to step.

    with at_timestep(t):          # what runs inside may ask `current_timestep()`
        noise = model(x, t)

A sampler or a model's own forward pass says it; an activation quantiser with one range a timestep reads it.
The value is local to the thread (a context variable), blocks nest, and outside there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from actlas.core.errors import InputError

_CURRENT: ContextVar[Tensor | None] = ContextVar("timestep", default=None)


@contextmanager
def at_timestep(t: Tensor | int) -> Iterator[None]:
    """Say that what runs inside runs at timestep `t`.

    Args:
        t: one number, or one for each row of the batch, `[batch]`.
    """
    token = _CURRENT.set(torch.as_tensor(t).detach().reshape(-1))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_timestep(rows: int, where: str = "a quantiser") -> Tensor:
    """Return the timestep of every row of the running batch, `[rows]`.

    Args:
        rows: how many rows the asker's batch has; a single timestep stands for all of them.
        where: who asks, for the message.

    Raises:
        InputError: outside `at_timestep`, or timesteps of another number of rows.
    """
    t = _CURRENT.get()
    if t is None:
        raise InputError(
            f"{where} has one range a timestep and none is set; run the model inside at_timestep(t)"
        )
    if t.numel() not in (1, rows):
        raise InputError(
            f"{where} sees {rows} rows, but {t.numel()} timesteps are set; give one for each row"
        )
    return t.expand(rows)
