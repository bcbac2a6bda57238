"""How many inputs of layers with static ranges lie beyond what calibration saw."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.layout import find
from actlas.core.measurement import Measurement
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import ActQuant

if TYPE_CHECKING:
    from actlas.core.model import Model

MANY_CLIPPED = 1e-3


@torch.no_grad()
def clipped_inputs(
    model: Model,
    edit: Edit,
    layers: QuantEdit,
    texts: Iterable[Any],
    *,
    tokens: int = 1024,
    context: int | None = None,
) -> Measurement:
    """Return the share of static layers' inputs on text that lie beyond what their codes hold; warn over
    0.1%.

    Args:
        model: the model, without the edit.
        edit: what is installed.
        layers: the part of it whose static layers count.
        texts: text that was not calibrated on.
        tokens, context: how much is read.
    """
    counts: dict[str, list[float]] = {}

    def reader(path: str, act: ActQuant) -> Any:
        assert act.params is not None
        step, half = act.params.scale, 2 ** (act.spec.bits - 1)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            code = args[0] / step.flatten().to(args[0])
            outside = (code < -half - 0.5) | (code > half - 0.5)
            held = counts.setdefault(path, [0.0, 0.0])
            held[0] += float(outside.sum())
            held[1] += outside.numel()

        return hook

    handles = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.edit(edit):
            for path in layers.modules:
                module = find(model.module, path)
                act = getattr(module, "act", None)
                if module is not None and isinstance(act, ActQuant) and act.params is not None:
                    handles.append(module.register_forward_pre_hook(reader(path, act)))
            try:
                for _ in model.stream(
                    texts,
                    f"blocks.{(model.n_blocks or 1) - 1}.resid_post",
                    max_tokens=tokens,
                    context=context,
                ):
                    pass
            finally:
                for handle in handles:
                    handle.remove()
    total = sum(c[1] for c in counts.values())
    share = sum(c[0] for c in counts.values()) / total if total else 0.0
    worst = max(counts, key=lambda p: counts[p][0] / max(counts[p][1], 1), default="")
    if share > MANY_CLIPPED:
        warnings.warn(
            f"{share:.2%} of the inputs lie beyond what calibration saw, most at {worst}; calibrate on more "
            f"text",
            stacklevel=2,
        )
    return Measurement(
        "clipped-inputs",
        share,
        "fraction",
        int(total),
        better="lower",
        note=f"most at {worst}" if worst else "",
    )
