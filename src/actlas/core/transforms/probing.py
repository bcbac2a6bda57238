"""Many what-ifs in one forward pass: each row of the batch has its own scales on linear maps and norms.

Row 0 is the model as it is. Row i multiplies the outputs and inputs that its `Trial` names, so a pass of 60
rows of 8 tokens tells for 60 pairs of layers whether a scale on the one passes through to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.layout import find, plain_module
from actlas.core.model import Model
from actlas.core.trace import StopForward
from actlas.core.transforms.dataflow import cache_off

_ROWS = 48


@dataclass
class Trial:
    """What one row does.

    Attributes:
        outputs: module path -> factors `[width]` on what it returns.
        inputs: module path -> factors on what it receives.
        watch: the module whose input is kept.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    watch: str | None = None


@dataclass
class Outcome:
    """What one row gave: the watched input (before any factor on it) without and with the trial, and how far
    the model's output moved, relative to its largest value (NaN where all trials of a pass watch inputs)."""

    before: Tensor | None
    after: Tensor | None
    moved: float


def run_trials(model: Model, inputs: Mapping[str, Any], trials: Sequence[Trial]) -> list[Outcome]:
    """Run trials, in as few passes as the batch size allows; the order is kept."""
    out: list[Outcome] = []
    for start in range(0, len(trials), _ROWS):
        out += _run(model, inputs, trials[start : start + _ROWS])
    return out


def _run(model: Model, inputs: Mapping[str, Any], trials: Sequence[Trial]) -> list[Outcome]:
    root, rows = plain_module(model.module), len(trials) + 1
    batch = {k: v.expand(rows, *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    handles: list[Any] = []
    kept: dict[str, dict[int, Tensor]] = {}
    waiting = {t.watch for t in trials if t.watch}
    only_watched = all(t.watch for t in trials)  # what comes after the last of them need not be computed

    def changed(x: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
        new = x.clone()
        by_row = new.view(rows, -1, x.shape[-1])
        for row, factor in factors.items():
            by_row[row] *= factor.to(by_row)
        return new

    def after(factors: Mapping[int, Tensor]) -> Any:
        return lambda module, args, output: changed(output, factors)

    def before(path: str, factors: Mapping[int, Tensor], watched: Sequence[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            x = args[0] if key is None else kwargs[key]
            if watched:
                split = x.reshape(rows, -1, x.shape[-1])
                kept[path] = {row: split[row].clone() for row in (0, *watched)}
                if only_watched and not waiting - kept.keys():
                    raise StopForward
            if not factors:
                return None
            new = changed(x, factors)
            return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

        return hook

    try:
        for path in sorted({p for t in trials for p in (*t.outputs, *t.inputs, t.watch or "") if p}):
            module = find(root, path)
            assert module is not None
            made = {i + 1: t.outputs[path] for i, t in enumerate(trials) if path in t.outputs}
            read = {i + 1: t.inputs[path] for i, t in enumerate(trials) if path in t.inputs}
            watched = [i + 1 for i, t in enumerate(trials) if t.watch == path]
            if made:
                handles.append(module.register_forward_hook(after(made)))
            if read or watched:
                handles.append(
                    module.register_forward_pre_hook(before(path, read, watched), with_kwargs=True)
                )
        moved = torch.full((len(trials),), torch.nan)
        with torch.no_grad(), suppress(StopForward):
            final = final_output(model._call(batch, **cache_off(root))).reshape(rows, -1).double()
            moved = (final[1:] - final[0]).abs().amax(1) / final[0].abs().max().clamp_min(1e-30)
    finally:
        for handle in handles:
            handle.remove()
    out = []
    for i, trial in enumerate(trials):
        seen = kept.get(trial.watch) if trial.watch else None
        out.append(Outcome(seen[0] if seen else None, seen[i + 1] if seen else None, float(moved[i])))
    return out


def final_output(output: Any) -> Tensor:
    """Return what a model is judged by: logits, its last hidden state, embeddings, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    held: Any = output if isinstance(output, dict) else vars(output) if hasattr(output, "__dict__") else {}
    for name in ("logits", "last_hidden_state"):
        if isinstance(held.get(name), Tensor):
            value: Tensor = held[name]
            return value
    both = [held[n] for n in ("text_embeds", "image_embeds") if isinstance(held.get(n), Tensor)]
    if both:
        return torch.cat(both, -1)
    values = output.values() if isinstance(output, dict) else output
    return next(v for v in values if isinstance(v, Tensor))
