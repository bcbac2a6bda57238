"""What a patch writes, and where: the four ways to take a part of a model out of a run, or put it back.

    mode       run            what is written                          where it may be written
    denoise    corrupted      the activation of the clean run          from the first changed token on
    noise      clean          the activation of the corrupted run      from the first changed token on
    resample   clean          that of another pair's clean prompt      every token but the first
    mean       clean          the mean over all tokens of all prompts  every token but the first
    zero       clean          zero                                     every token but the first

Denoising asks which parts are enough to bring the behaviour back, noising which are needed for it. Left
of the first token in which a pair's prompts differ the two runs are equal, so there is nothing to write.
The first token of a text stays out of means and of ablations: its activations are massive (a hundred times
the others) and serve as a resting place of attention, whatever the text says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.circuits.prefix import SharedRun, padded
from actlas.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.nodes import Position
    from actlas.core.dictionary import Dictionary
    from actlas.core.model import Model
    from actlas.core.sites import Site

Mode = Literal["denoise", "noise", "resample", "mean", "zero"]
MODES: tuple[Mode, ...] = ("denoise", "noise", "resample", "mean", "zero")


def check_mode(mode: str) -> None:
    """Raise InputError unless `mode` is one."""
    if mode not in MODES:
        raise InputError(
            f"there is no mode {mode!r}{did_you_mean(mode, MODES) or '; there are ' + ', '.join(MODES)}"
        )


class Source:
    """What each mode writes at sites and features.

    Args:
        pairs: the prompts.
        mode: see the module docstring.
        base: site -> activation `[n, pos, ...]` of the run that is patched.
        other: site -> activation of the run on the other prompts of the pairs (denoise, noise).
        seed: which other pair resampling takes.

    Attributes:
        mask: where something may be written, bool `[n, pos]`.
    """

    def __init__(
        self,
        pairs: PromptPairs,
        mode: Mode,
        base: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        *,
        seed: int = 0,
    ) -> None:
        self.mode, self.base, self.other = mode, base, other
        real = pairs.clean["attention_mask"].bool()
        column = torch.arange(pairs.width, device=real.device)
        if mode in ("denoise", "noise"):
            self.mask = real & (column >= pairs.changed[:, None])
        else:
            self.mask = real & (real.cumsum(1) > 1)
        self._real = self.mask
        self._taken = torch.arange(len(pairs))
        if mode == "resample":
            if len(pairs) < 2:
                raise InputError("resampling takes activations of other pairs; give at least 2 pairs")
            shuffled = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
            self._taken[shuffled] = shuffled.roll(1)
            self.mask = self.mask & self.mask[self._taken]

    def values(self, site: str) -> Tensor:
        """Return what is written at a site, `[n, pos, ...]` (aligned at the last token)."""
        return self._written(self.base[site], self.other.get(site))

    def codes(self, lens: Dictionary, site: str) -> tuple[Tensor, Tensor]:
        """Return the codes of a dictionary in the patched run and those written, `[n, pos, features]`.

        Massive tokens, which the dictionary was not fitted on, are left as they are.
        """
        base = self.base[site]
        now = lens.encode(base).dense()
        other = self.other.get(site)
        new = self._written(now, None if other is None else lens.encode(other).dense())
        massive = lens.massive(base)
        if other is not None:
            massive = massive | lens.massive(other)
        return now, torch.where(massive.unsqueeze(-1), now, new)

    def _written(self, base: Tensor, other: Tensor | None) -> Tensor:
        if self.mode in ("denoise", "noise"):
            assert other is not None
            return other
        if self.mode == "resample":
            return base[self._taken]
        if self.mode == "zero":
            return torch.zeros_like(base)
        mean = base[self._real].double().mean(0).to(base.dtype)
        return mean.expand_as(base)


def at(pairs: PromptPairs, position: Position) -> Tensor:
    """Return which columns a position means, bool `[n, pos]`.

    Raises:
        InputError: a name that the pairs do not know.
    """
    column = torch.arange(pairs.width, device=pairs.answer_ids.device)
    if position == "all":
        return (column >= 0).expand(len(pairs), -1)
    if isinstance(position, int):
        return (column == pairs.width + position).expand(len(pairs), -1)
    return column == pairs.column(position)[:, None]


def read_both(
    model: Model, pairs: PromptPairs, sites: Iterable[Site], mode: Mode, *, seed: int = 0
) -> tuple[SharedRun, Tensor, Source]:
    """Run what a mode needs.

    Returns:
        The run that is patched, the logits `[n, vocab]` after the other prompts of the pairs, and the
        source of what is written.
    """
    check_mode(mode)
    wanted = list(sites)
    patched, other = ("corrupt", "clean") if mode == "denoise" else ("clean", "corrupt")
    run = SharedRun(model, getattr(pairs, patched), wanted)
    found: dict[str, Any] = {}
    if mode in ("denoise", "noise"):
        start = run.first_column(int(pairs.changed.min()))
        encoded = run.arguments(None, pairs.width - start, getattr(pairs, other))
        trace = model.trace(encoded, [*wanted, *_logits(model)], stop=False)
        found, logits = (
            {s.name: padded(trace[s.name], pairs.width) for s in wanted},
            trace.logits[:, -1].float(),
        )
    else:
        logits = pairs.last_logits(model, other)
    return run, logits, Source(pairs, mode, run.values, found, seed=seed)


def _logits(model: Model) -> list[Site]:
    return model.resolve("logits")
