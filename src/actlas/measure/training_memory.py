"""How many bytes a step of training holds: weights, gradients, optimiser state, and what backward waits for.

    training_memory(module, lambda: module(input_ids=ids, labels=ids).loss) -> [Measurement]

Counted, not sampled: bytes of parameters and buffers; a gradient and two numbers of Adam's for each trained
parameter; and the tensors that autograd keeps between the forward and the backward pass, each storage once
and those of parameters and buffers left out. Allocators, workspaces and fragmentation are not in it; for
those see `measure.memory.PeakMemory`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement

ADAM_STATES = 2


def training_memory(
    module: nn.Module, loss: Callable[[], Tensor], *, group: dict[str, str] | None = None
) -> list[Measurement]:
    """Count the bytes of one training step.

    Args:
        module: what is trained: parameters with `requires_grad`.
        loss: runs the forward pass and returns the loss.
        group: labels of the measurements.

    Returns:
        `training-memory` in bytes, by `part`: weights, gradients, optimiser, saved, all.

    Raises:
        InputError: nothing is trained.
    """
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise InputError("no parameter of the module is trained; set requires_grad")
    fixed = {t.untyped_storage().data_ptr(): t for t in (*parameters, *module.buffers())}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    saved = sum(s.nbytes() for s in kept.values())
    del value
    kept.clear()
    gradients = sum(p.numel() * p.element_size() for p in trained)
    parts = {
        "weights": sum(t.untyped_storage().nbytes() for t in fixed.values()),
        "gradients": gradients,
        "optimiser": ADAM_STATES * gradients,
        "saved": saved,
    }
    parts["all"] = sum(parts.values())
    return [
        Measurement(
            "training-memory", float(value), "bytes", 1, group={"part": part, **(group or {})}, better="lower"
        )
        for part, value in parts.items()
    ]
