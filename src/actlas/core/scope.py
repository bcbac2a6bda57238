"""Where and when an edit applies: its scope (`edit.at`) and its condition (`edit.when`).

Both are answered for the tokens of the running pass, and in the same way with and without a KV cache,
under padding, in batches and in beams; see `passes.py` for what a pass knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.errors import InputError, ShapeError

if TYPE_CHECKING:
    from actlas.core.lens import Lens
    from actlas.core.passes import Pass

Phase = Literal["prompt", "generated"]


@dataclass(frozen=True)
class Scope:
    """Where an edit applies; every given limit must hold.

    Attributes:
        tokens: token ids, or strings that are one token each.
        positions: positions among the real tokens of a row, counted from 0; negative ones count back
            from the end of the prompt (-1 is its last token). `"last"` is the last prompt token and
            every generated one, which is the newest token at each step of `generate`.
        phase: only prompt tokens, or only generated ones.
        rows: requests of the batch (beams belong to the request they came from).
    """

    tokens: tuple[int | str, ...] | None = None
    positions: tuple[int, ...] | Literal["last"] | None = None
    phase: Phase | None = None
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.phase not in (None, "prompt", "generated"):
            raise InputError(f"phase is {self.phase!r}; it must be 'prompt' or 'generated'")
        if isinstance(self.positions, str) and self.positions != "last":
            raise InputError(f"positions is {self.positions!r}; give numbers, a range or 'last'")
        counted = isinstance(self.positions, tuple) and bool(self.positions)
        if self.phase == "generated" and counted and all(int(p) < 0 for p in self.positions or ()):
            raise InputError(
                f"positions={list(self.positions or ())} count back from the end of the prompt, and "
                "phase='generated' leaves the prompt out; give positions='last', or another phase"
            )

    def describe(self) -> str:
        """Return e.g. `"positions=[-1], phase=prompt"`."""
        said = []
        for name in ("tokens", "positions", "phase", "rows"):
            value = getattr(self, name)
            if value is not None:
                said.append(f"{name}={value if isinstance(value, str) else list(value)}")
        return ", ".join(said)

    def mask(self, here: Pass, ids: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
        """Return where the scope holds in this pass.

        Returns:
            Bool `[batch, length]` or `[batch, 1]`; `None` means everywhere.
        """
        parts: list[Tensor] = []
        if self.rows is not None:
            rows = here.rows(device)
            wanted = torch.tensor(self.rows, device=device)
            parts.append(torch.isin(rows, wanted).unsqueeze(1))
        if ids is not None:
            if here.tokens is None:
                raise InputError("this edit is limited to tokens, but the model's input has no token ids")
            parts.append(torch.isin(here.tokens.to(device), torch.tensor(ids, device=device)))
        if self.phase is not None:
            generated = here.generated(device)
            parts.append((generated if self.phase == "generated" else ~generated).unsqueeze(0))
        if self.positions is not None:
            positions = here.positions(device)
            ends = here.prompt_mask(device).sum(1, keepdim=True)
            if self.positions == "last":
                parts.append((positions == ends - 1) | (positions >= ends))
            else:
                numbers = torch.tensor(self.positions, device=device)
                targets = torch.where(numbers < 0, ends + numbers, numbers.unsqueeze(0))
                parts.append((positions.unsqueeze(-1) == targets.unsqueeze(1)).any(-1))
        if not parts:
            return None
        whole = parts[0]
        for part in parts[1:]:
            whole = whole & part
        return whole.expand(here.batch, whole.shape[1])


@dataclass(frozen=True, eq=False)
class Condition:
    """When an edit applies: a lens reads an activation and opens or closes a gate.

    Attributes:
        lens: anything with `.site` and `.score(x)`; it must read at or before the edited site.
        threshold: the gate is open where the score is above it.
        above: `False` opens the gate where the score is below the threshold instead.
        per: decide for every token, or once for a whole sequence from its prompt.
        reduce: how token scores become a sequence's: the last prompt token's, the mean or the maximum.
        soft: weight `sigmoid((score - threshold) / softness)` instead of 0 or 1.
        softness: the width of the soft gate, in units of the score.
        feature: which output of the lens, if it scores several.
    """

    lens: Lens
    threshold: float = 0.0
    above: bool = True
    per: Literal["token", "sequence"] = "token"
    reduce: Literal["last", "mean", "max"] = "last"
    soft: bool = False
    softness: float = 1.0
    feature: int | None = None

    def __post_init__(self) -> None:
        if self.per not in ("token", "sequence"):
            raise InputError(f"per is {self.per!r}; it must be 'token' or 'sequence'")
        if self.reduce not in ("last", "mean", "max"):
            raise InputError(f"reduce is {self.reduce!r}; it must be 'last', 'mean' or 'max'")

    def describe(self) -> str:
        """Return e.g. `"when Probe at blocks.5.resid_post > 0 per token"`."""
        sign = ">" if self.above else "<"
        return f"when {type(self.lens).__name__} at {self.lens.site} {sign} {self.threshold:g} per {self.per}"

    def weight(self, activation: Tensor, here: Pass, key: Any) -> Tensor:
        """Return the gate for this pass: bool or float `[batch, length]` (or `[batch, 1]`)."""
        with torch.no_grad():
            score = self.lens.score(activation)
        if self.feature is not None:
            score = score[..., self.feature]
        if score.ndim == 1:
            score = score.unsqueeze(1)
        if score.ndim != 2:
            raise ShapeError(
                f"a condition's lens must give one score per token, not {list(score.shape)}: name a feature"
            )
        if self.per == "sequence":
            score = self._sequence(score, here, key)
        if not self.above:
            score, threshold = -score, -self.threshold
        else:
            threshold = self.threshold
        if self.soft:
            return torch.sigmoid((score - threshold) / self.softness)
        return score > threshold

    def _sequence(self, score: Tensor, here: Pass, key: Any) -> Tensor:
        state = here.generation
        if state is not None and key in state.memory:
            return state.memory[key].repeat_interleave(here.repeats, dim=0)
        if here.past:
            raise InputError(
                "a per-sequence gate must see the prompt; start from the prompt, not from a cache"
            )
        real = here.prompt_mask(score.device)
        score = score[:, : real.shape[1]]
        if self.reduce == "last":
            last = (torch.arange(real.shape[1], device=score.device) * real).argmax(1)
            value = score.gather(1, last.unsqueeze(1))
        elif self.reduce == "mean":
            value = (score * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
        else:
            value = score.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
        if state is not None:
            state.memory[key] = value[:: here.repeats]
        return value


def as_positions(
    given: int | range | slice | Sequence[int] | Literal["last"],
) -> tuple[int, ...] | Literal["last"]:
    """Return positions in the form that `Scope` keeps."""
    if isinstance(given, str):
        return given
    if isinstance(given, int):
        return (given,)
    if isinstance(given, slice):
        if given.stop is None:
            raise InputError("a slice of positions needs an end, e.g. slice(0, 8)")
        return tuple(range(given.start or 0, given.stop, given.step or 1))
    return tuple(int(p) for p in given)
