"""Schedules: a number for every step of training, as small values that can be printed, compared and stored.

    SineStages(peaks=(5e-3, 5e-2, 5e-2), ends=(6000, 10000, 12000), start=5000)(step)
    WSDC(warmup=100, stable=600, decay=200, final=0.1)(step)
    Constant(1e-3)(step)

`SineStages` is ProSparse's weight of the sparsity penalty: 0 before `start`, the first peak in the first
stage, and then from peak to peak along half a sine, so that neither value nor slope jumps,

    eta = (1 + sin(-pi/2 + pi (t - T_{i-1}) / (T_i - T_{i-1}))) / 2,     w = w_{i-1} + eta (w_i - w_{i-1}),

and the last peak for ever after. `WSDC` is PLM's learning rate as a factor of its peak: linear warm-up, a
stable part, a decay, and then *constant* at the low value (where the best data is used). A schedule is a
function of the step, counted from 0, so a `WSDC` can be handed to `torch.optim.lr_scheduler.LambdaLR` as it
is.

Sources: Song et al. 2024, "ProSparse", section 3.2 and its table of stages; PLM 2025, arXiv 2503.12167.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from actlas.core.errors import InputError

Schedule = Callable[[int], float]


def _check(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"{name} is {value}; a weight must be finite and not negative")


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __post_init__(self) -> None:
        _check("value", self.value)

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class SineStages:
    """ProSparse's stages; see the module docstring.

    Attributes:
        peaks: value at the end of each stage, 0 or more, not falling unless `falling` allows it.
        ends: step at which each stage ends, rising.
        start: first step of the first stage; 0 is returned before it.
        falling: allow a later peak below an earlier one.
    """

    peaks: tuple[float, ...]
    ends: tuple[int, ...]
    start: int = 0
    falling: bool = False

    def __post_init__(self) -> None:
        if not self.peaks or len(self.peaks) != len(self.ends):
            raise InputError(f"{len(self.peaks)} peaks and {len(self.ends)} ends: one end a peak is needed")
        for peak in self.peaks:
            _check("a peak", peak)
        if not self.falling and any(b < a for a, b in pairwise(self.peaks)):
            raise InputError(f"the peaks {self.peaks} fall; give falling=True if that is meant")
        steps = (self.start, *self.ends)
        if self.start < 0 or any(b <= a for a, b in pairwise(steps)):
            raise InputError(f"the stages end at {self.ends} from {self.start} on; they must rise")

    def __call__(self, step: int) -> float:
        if step < self.start:
            return 0.0
        if step <= self.ends[0]:
            return self.peaks[0]
        for i in range(1, len(self.ends)):
            if step <= self.ends[i]:
                part = (step - self.ends[i - 1]) / (self.ends[i] - self.ends[i - 1])
                eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * part) + 1)
                return self.peaks[i - 1] + eta * (self.peaks[i] - self.peaks[i - 1])
        return self.peaks[-1]

    def scaled(self, *, steps: int | None = None, peak: float | None = None) -> SineStages:
        """Return the same shape over another number of steps, or up to another last peak.

        Raises:
            InputError: fewer steps than stages.
        """
        factor = 1.0 if steps is None else steps / self.ends[-1]
        gain = 1.0 if peak is None else peak / self.peaks[-1]
        ends = tuple(round(e * factor) for e in self.ends)
        return SineStages(tuple(p * gain for p in self.peaks), ends, round(self.start * factor), self.falling)

    @classmethod
    def published(cls, size: Literal["7B", "13B", "1B"] = "7B") -> SineStages:
        """Return the stages of the paper's table (1B: up to its decay stage).

        Raises:
            InputError: no such size.
        """
        if size not in _PUBLISHED:
            raise InputError(f"no published stages for {size!r}; there are {', '.join(_PUBLISHED)}")
        return _PUBLISHED[size]


_PUBLISHED = {
    "7B": SineStages((5e-3, 5e-2, 5e-2, 2e-1, 2e-1), (6_000, 10_000, 12_000, 16_000, 16_500), start=5_000),
    "13B": SineStages((5e-3, 1e-2, 1e-2, 2e-2, 2e-2), (6_750, 10_750, 11_000, 15_000, 16_000), start=5_500),
    "1B": SineStages((1e-3, 5e-3, 5e-3, 5e-2, 5e-2), (15_000, 20_000, 25_000, 35_000, 95_000), start=10_000),
}


@dataclass(frozen=True)
class WSDC:
    """Warm-up, stable, decay, constant: a factor of the peak learning rate.

    Attributes:
        warmup, stable, decay: steps of each part.
        final: the factor after the decay, in (0, 1].
        shape: how it decays: `"cosine"`, `"exponential"` or `"linear"` (the paper does not say).
    """

    warmup: int
    stable: int
    decay: int
    final: float = 0.1
    shape: Literal["cosine", "exponential", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if min(self.warmup, self.stable, self.decay) < 0:
            raise InputError(
                f"warmup={self.warmup}, stable={self.stable}, decay={self.decay}: steps are 0 or more"
            )
        if not 0 < self.final <= 1:
            raise InputError(f"final is {self.final:g}; it is a share of the peak rate, in (0, 1]")
        if self.shape not in ("cosine", "exponential", "linear"):
            raise InputError(f"shape is {self.shape!r}; it must be 'cosine', 'exponential' or 'linear'")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        into = step - self.warmup - self.stable
        if into < 0:
            return 1.0
        if into >= self.decay:
            return self.final
        part = into / self.decay
        if self.shape == "cosine":
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * part))
        if self.shape == "linear":
            return 1 + (self.final - 1) * part
        return self.final**part


def as_schedule(value: Any) -> Schedule:
    """Return a schedule: a function as it is, a number as `Constant`."""
    return value if callable(value) else Constant(float(value))
