"""Penalties on the density of activations: what makes training prefer zeros.

    penalty = ActivationPenalty(model, kind="l1", weight=SineStages(...))

    with penalty:                                             # a plain loop
        for batch in batches:
            loss = module(**batch, labels=...).loss + penalty.value()
            loss.backward(); optimiser.step(); penalty.advance()

    Trainer(model.module, args, ..., callbacks=[penalty.callback()]).train()     # transformers

The penalty of activations a `[tokens, channels]` at one site, padding left out:

    l1        mean over tokens of sum over channels of |a|          (ProSparse; `reduce="mean"`: over both)
    soft_l0   mean over tokens and channels of a^2 / (a^2 + eps)    (DEFT: a differentiable share of
    non-zeros) hoyer     mean over tokens of (|a|_1 / |a|_2)^2 / channels      (scale free: 1 / channels to 1)

and then the sum over sites (`l1`) or their mean (the other two). Everything is computed in float32. The soft
L0 with DEFT's eps = 1e-7 has its steepest slope at |a| = sqrt(eps / 3), about 2e-4, and almost none at
ordinary
values: it removes what is nearly zero and hardly shrinks the rest. What an L1 weight means depends on its
reductions, so they are part of the object and of `describe()`.

Sources: Song et al. 2024, "ProSparse"; Runwal et al. 2024, "From PEFT to DEFT"; Yang et al. 2020,
    "DeepHoyer".
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.hooks import attach
from actlas.core.installation import PassWatcher
from actlas.core.model import Model
from actlas.core.sites import Site
from actlas.training.schedules import Schedule, as_schedule

Kind = Literal["l1", "soft_l0", "hoyer"]
DEFT_EPS = 1e-7


def density_loss(
    x: Tensor, *, kind: Kind = "soft_l0", eps: float = DEFT_EPS, reduce: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Return the penalty of activations `[..., channels]` at one site, a float32 number.

    Args:
        x: rows of activations; at least one.
        kind: see the module docstring.
        eps: of the soft L0; smaller is closer to counting.
        reduce: how L1 treats channels.

    Raises:
        InputError: an unknown kind, an eps that is not positive, or no rows.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
    if not 0 < eps < math.inf:
        raise InputError(f"eps is {eps:g}; it must be positive")
    if not x.numel():
        raise InputError("there are no activations to penalise: every token is padding")
    rows = x.float().reshape(-1, x.shape[-1])
    if kind == "l1":
        total = rows.abs().sum(1) if reduce == "sum" else rows.abs().mean(1)
        return total.mean()
    if kind == "soft_l0":
        squares = rows.square()
        return (squares / (squares + eps)).mean()
    squares = rows.square().sum(1)
    ratio = rows.abs().sum(1).square() / squares.clamp_min(1e-12)
    return ratio.mean() / rows.shape[1]


class ActivationPenalty:
    """Watches sites of a model while it trains, and turns what it sees into a loss.

    Args:
        model: the model that is trained.
        kind, eps, reduce: see `density_loss`.
        weight: a number, or a schedule over steps.
        sites: what is penalised; default every MLP's activations.

    Raises:
        SiteError: no such site (a fused MLP, say).
        InputError: as `density_loss`; a site that is not rows of channels.
    """

    def __init__(
        self,
        model: Model,
        *,
        kind: Kind = "soft_l0",
        weight: float | Schedule = 1.0,
        sites: str | list[str] = "blocks.*.mlp.act",
        eps: float = DEFT_EPS,
        reduce: Literal["sum", "mean"] = "sum",
    ) -> None:
        self.model, self.kind, self.eps, self.reduce = model, kind, eps, reduce
        self.schedule = as_schedule(weight)
        self.sites: list[Site] = model.resolve(sites)
        if not self.sites:
            raise InputError(f"{sites} names no site of {model.name}")
        density_loss(torch.ones(1, 1), kind=kind, eps=eps)
        if reduce not in ("sum", "mean"):
            raise InputError(f"reduce is {reduce!r}; it must be 'sum' or 'mean'")
        self.step = 0
        self._watcher = PassWatcher(model)
        self._handles: list[Any] = []
        self._found: dict[str, Tensor] = {}
        self._zeros: dict[str, float] = {}

    @property
    def weight(self) -> float:
        """The weight at the step of now."""
        return float(self.schedule(self.step))

    def __enter__(self) -> ActivationPenalty:
        if self._handles:
            raise InputError("this penalty is watching already; leave its block before entering it again")
        self._watcher.start()
        for site in self.sites:
            batch = functools.partial(self._batch, site)
            self._handles.append(attach(self.model.module, site, self._reader(site), batch=batch))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watcher.stop()
        self._found.clear()

    def _batch(self, site: Site) -> int:
        return self._watcher.of(site).batch

    def _reader(self, site: Site) -> Any:
        def read(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled() or site.name in self._found:
                return x  # an evaluation, or activation checkpointing that runs the block again
            run, rows = self._watcher.of(site), x
            if run.length is not None and x.ndim > 2 and x.shape[1] == run.length:
                rows = x[run.real(x.device)]
            self._zeros[site.name] = float((rows == 0).float().mean())
            self._found[site.name] = density_loss(rows, kind=self.kind, eps=self.eps, reduce=self.reduce)
            return x

        return read

    def unweighted(self) -> Tensor:
        """Return the penalty of the last forward pass and forget it.

        Raises:
            InputError: no forward pass with gradients since, or the block was not entered.
        """
        if not self._found:
            raise InputError("no activations were seen; run the model with gradients inside 'with penalty:'")
        values = torch.stack(list(self._found.values()))
        self._found.clear()
        return values.sum() if self.kind == "l1" else values.mean()

    def value(self) -> Tensor:
        """Return weight times penalty of the last forward pass; add it to the loss of that pass."""
        return self.weight * self.unweighted()

    def advance(self) -> None:
        """Count one step of the optimiser, for the schedule."""
        self.step += 1

    @property
    def zero_rate(self) -> float:
        """Share of exact zeros in the last forward pass, mean over sites."""
        return sum(self._zeros.values()) / len(self._zeros) if self._zeros else math.nan

    def describe(self) -> str:
        """Return one line that holds everything the weight depends on."""
        detail = f"eps={self.eps:g}, mean over sites" if self.kind == "soft_l0" else "mean over sites"
        if self.kind == "l1":
            detail = f"{self.reduce} over channels, mean over tokens, sum over sites"
        return f"{self.kind} ({detail}) on {len(self.sites)} sites, weight {self.schedule!r}"

    def callback(self) -> Any:
        """Return a callback for the transformers `Trainer` that watches, adds the loss and counts steps."""
        from actlas.training.trainer_callback import penalty_callback

        return penalty_callback(self)
