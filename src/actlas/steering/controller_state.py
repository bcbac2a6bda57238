"""What a controller has read and decided while a model runs.

Decisions live as long as the pass (`Pass.values`) or, under `generate`, as long as the generation
(`Generation.memory`), keyed by the `Readings` of one installed edit. With and without a KV cache, padded
and alone, a token gets the same pushes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.core.passes import Pass


@dataclass(frozen=True, eq=False)
class Readings:
    """The read sites of one installed controller.

    Attributes:
        decide: activations `[..., R]` -> pushes `[..., L]`.
        sites: how many sites are read.
        steered: how many sites are steered, L.
        in_pass: whether all read sites come before the first steered one.
        stepwise: whether every token decides for the next one, instead of the prompt for all.
    """

    decide: Callable[[Tensor], Tensor]
    sites: int
    steered: int
    in_pass: bool
    stepwise: bool

    def read(self, x: Tensor, index: int, run: Pass) -> Tensor:
        """Keep what read site `index` holds, where it will be needed; return it unchanged."""
        state = run.generation
        if self.stepwise:
            self._settle(run)
            run.values[(self, index)] = x.detach()
            if state is not None:
                state.memory[(self, index)] = _newest(x.detach().flatten(2), run)
        elif state is None or self not in state.memory:
            run.values[(self, index)] = x.detach()
        return x

    def pushes(self, run: Pass) -> Tensor:
        """Return the pushes in this pass, `[batch, 1 or length, L]`."""
        held = run.values.get(self)
        if held is None:
            held = self._stepwise(run) if self.stepwise else self._of_prompt(run)
            run.values[self] = held
        return held

    def _of_prompt(self, run: Pass) -> Tensor:
        state = run.generation
        if state is not None and self in state.memory:
            return state.memory[self].repeat_interleave(run.repeats, dim=0).unsqueeze(1)
        if run.past:
            raise InputError("a controller must see the prompt; start from the prompt, not from a cache")
        with torch.no_grad():
            decided = self.decide(_last_of_prompt(self._joined(run), run))
        if state is not None:
            state.memory[self] = decided[:: run.repeats]
        return decided.unsqueeze(1)

    def _stepwise(self, run: Pass) -> Tensor:
        """Each token's pushes were decided on the token before it; prompt tokens get none."""
        state, length = run.generation, run.length or 0
        device = run.tokens.device if run.tokens is not None else None
        pushes = torch.zeros(run.batch, length, self.steered, device=device)
        if state is None:
            return pushes
        if run.repeats > 1:
            raise InputError("read='previous_step' cannot follow beams or several samples; use read='prompt'")
        self._settle(run)
        start = run.prompt_columns()
        wanted = run.past + length - start
        if wanted <= 0:
            return pushes
        history = state.memory.get(self)
        if history is None or history.shape[1] < wanted:
            history = self._of_whole_text(run, start, wanted)
        first = max(start - run.past, 0)
        pushes[:, first:] = history[:, run.past + first - start : wanted]
        return pushes

    def _settle(self, run: Pass) -> None:
        """Decide on what the step before this one read, once in a pass and before it is overwritten."""
        state = run.generation
        if state is None or (self, "settled") in run.values:
            return
        run.values[(self, "settled")] = torch.ones(())
        read = [state.memory.pop((self, i), None) for i in range(self.sites)]
        if any(r is None for r in read):
            return
        with torch.no_grad():
            decided = self.decide(torch.cat([r for r in read if r is not None], -1)).unsqueeze(1)
        before = state.memory.get(self)
        state.memory[self] = decided if before is None else torch.cat([before, decided], 1)

    def _of_whole_text(self, run: Pass, start: int, wanted: int) -> Tensor:
        """Return the decisions of a pass over prompt and answer at once, `[batch, wanted, L]`."""
        if run.past or not self.in_pass:
            raise InputError(
                "read='previous_step' steers before it reads, so a given answer cannot be run in one pass; "
                "generate it, or read at or before the first steered site"
            )
        x = self._joined(run)
        first = _last_of_prompt(x, run).unsqueeze(1)
        with torch.no_grad():
            return self.decide(torch.cat([first, x[:, start : start + wanted - 1]], 1))

    def _joined(self, run: Pass) -> Tensor:
        parts = [run.values.get((self, i)) for i in range(self.sites)]
        if any(p is None for p in parts):
            raise InputError("a controller has read nothing; its sites come later in the pass, or never ran")
        return torch.cat([p.flatten(2) for p in parts if p is not None], -1)


def _newest(x: Tensor, run: Pass) -> Tensor:
    """Return the newest token's row: the prompt's last real one, or the last column's, `[batch, d]`."""
    if run.past + (run.length or 0) <= run.prompt_columns():
        return _last_of_prompt(x, run)
    return x[:, -1]


def _last_of_prompt(x: Tensor, run: Pass) -> Tensor:
    real = run.prompt_mask(x.device)
    last = (torch.arange(real.shape[1], device=x.device) * real).argmax(1)
    return x[torch.arange(len(x), device=x.device), last]
