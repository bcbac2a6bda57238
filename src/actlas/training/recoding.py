"""Recoding: correct a recurrent state after every step by a gradient step on an error signal.

    s_t = (h, c of every layer) = LSTM(x_t, s_{t-1})
    delta_t = signal(h_top)                       surprise at what came, or the model's own uncertainty
    s'_t = s_t - eta * d delta_t / d s_t          the next step starts from s'_t

    model = RecurrentLM(vocabulary=60, width=96)
    fit_recurrent(model, ids, steps=400)
    run = read(model, test, recoding=Recoding("entropy", step=0.1))
    run.nll.mean(), run.before.mean(), run.after.mean()

Entropy signals may decode the prediction again from s'_t (`redecode`, their default). A signal that knows
the target must not: it would be told the answer; only later predictions may gain, and they are made with
feedback that a model without recoding has, too, as its next input. In training the correction is a constant
(no second-order gradients); learned step sizes get theirs through s'_t. The gradient of the sum over rows
keeps rows apart.

Source: "Recoding latent sentence representations - Dynamic gradient-based activation modification in RNNs"
(2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.progress import progress
from actlas.training.recoding_signals import EnsembleDecoder, Signal, SignalFunction, SignalName, StepSize

State = list[tuple[Tensor, Tensor]]


class RecurrentLM(nn.Module):
    """A language model of LSTM layers whose gates are written out, so that cells have gradients.

    Args:
        vocabulary: number of tokens.
        width: of embedding and states.
        layers: of LSTM.
        dropout: on the top state, while training.
        decoder: `"linear"` or `"ensemble"` (`EnsembleDecoder`).
        seed: of the weights.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 96,
        layers: int = 1,
        *,
        dropout: float = 0.0,
        decoder: Literal["linear", "ensemble"] = "linear",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(vocabulary, width, layers) < 1:
            raise InputError(f"sizes must be at least 1, not {vocabulary}, {width} and {layers}")
        if decoder not in ("linear", "ensemble"):
            raise InputError(f"decoder is {decoder!r}; it must be 'linear' or 'ensemble'")
        self.vocabulary, self.width, self.layers, self.dropout = vocabulary, width, layers, dropout
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary, width)
            self.gates = nn.ModuleList(nn.Linear(2 * width, 4 * width) for _ in range(layers))
            self.decode: nn.Module = (
                nn.Linear(width, vocabulary) if decoder == "linear" else EnsembleDecoder(width, vocabulary)
            )

    def start(self, rows: int) -> State:
        """Return the state before the first token: zeros."""
        zero = torch.zeros(rows, self.width, dtype=self.embed.weight.dtype, device=self.embed.weight.device)
        return [(zero, zero) for _ in range(self.layers)]

    def step(self, tokens: Tensor, state: State) -> State:
        """Return the state after tokens `[rows]`."""
        x = self.embed(tokens)
        new = []
        for layer, (h, c) in zip(self.gates, state, strict=True):
            i, f, g, o = layer(torch.cat([x, h], -1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            new.append((x, c))
        return new


class Recoding(nn.Module):
    """How states are corrected.

    Args:
        signal: name, or a function (see `Signal`).
        step: step size, or where a learned one starts.
        size: `"constant"`, `"learned"` or `"mlp"`.
        width: of the states, for `"mlp"`.
        redecode: predict again from the corrected state; default where the signal does not know the target.
        random: walk in a random direction of the gradient's length instead (a control).
        seed: of dropout masks and of random directions.

    Raises:
        InputError: a negative step, an unknown signal, or `redecode` with a signal that knows the target.
    """

    def __init__(
        self,
        signal: SignalName | SignalFunction | Signal,
        step: float = 0.1,
        *,
        size: str = "constant",
        width: int = 0,
        redecode: bool | None = None,
        random: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.signal = signal if isinstance(signal, Signal) else Signal(signal, seed=seed)
        self.size = StepSize(size, step, width)
        if redecode and self.signal.uses_target:
            raise InputError("this signal knows the target, so decoding again would be told the answer")
        self.redecode = (not self.signal.uses_target) if redecode is None else redecode
        self.random = random
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, state: State, decode: nn.Module, target: Tensor) -> tuple[State, Tensor]:
        """Return the corrected state and the signal before, `[rows]`.

        Args:
            state: as `RecurrentLM.step` returns it, with its graph.
            decode: state of the top layer -> logits.
            target: `[rows]`.

        Raises:
            InputError: the signal does not depend on the state.
            NonFiniteError: its gradient is not finite.
        """
        top = state[-1][0]
        self.signal.draw(top.shape[-1])
        delta = self.signal(top, decode, target)
        parts = [t for pair in state for t in pair]
        if not delta.requires_grad:
            raise InputError("the signal does not depend on the state: it has no gradient")
        grads = torch.autograd.grad(delta.sum(), parts, retain_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            raise InputError("the signal does not depend on the state: it has no gradient")
        moved = []
        for part, grad in zip(parts, grads, strict=True):
            g = torch.zeros_like(part) if grad is None else grad
            if not bool(torch.isfinite(g).all()):
                raise NonFiniteError("the gradient of the signal is NaN or infinite; use a smaller step")
            if self.random:
                drawn = torch.randn(g.shape, generator=self._generator).to(g)
                g = drawn * (g.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))
            moved.append(part - self.size(part) * g.detach())
        return list(zip(moved[::2], moved[1::2], strict=True)), delta


@dataclass(frozen=True)
class Reading:
    """What `read` returns, each `[rows, length - 1]`.

    Attributes:
        nll: of the next token, nats.
        before, after: the signal before and after the state was corrected (`nll` and `nll` without recoding).
        state: after the last token.
    """

    nll: Tensor
    before: Tensor
    after: Tensor
    state: State


def read(
    model: RecurrentLM, ids: Tensor, recoding: Recoding | None = None, state: State | None = None
) -> Reading:
    """Read rows of tokens `[rows, length]`, correcting the state after each. No gradients are left.

    Raises:
        ShapeError: rows of fewer than 2 tokens.
    """
    _check(ids)
    state = model.start(len(ids)) if state is None else state
    out: list[tuple[Tensor, Tensor, Tensor]] = []
    for x, y in zip(ids[:, :-1].T, ids[:, 1:].T, strict=True):
        state = [(h.detach(), c.detach()) for h, c in state]
        with torch.set_grad_enabled(recoding is not None):
            state = model.step(x, state)
            logits = model.decode(state[-1][0])
            nll = F.cross_entropy(logits, y, reduction="none")
            before = after = nll
            if recoding is not None:
                state, before = recoding(state, model.decode, y)
                after = recoding.signal(state[-1][0], model.decode, y)
                if recoding.redecode:
                    nll = F.cross_entropy(model.decode(state[-1][0]), y, reduction="none")
        out.append((nll.detach(), before.detach(), after.detach()))
    nlls, befores, afters = (torch.stack(t, 1) for t in zip(*out, strict=True))
    return Reading(nlls, befores, afters, [(h.detach(), c.detach()) for h, c in state])


def fit_recurrent(
    model: RecurrentLM,
    ids: Tensor,
    *,
    steps: int,
    recoding: Recoding | None = None,
    batch: int = 32,
    length: int = 35,
    rate: float = 4e-3,
    clip: float = 0.25,
    done: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train by truncated back-propagation through time, with recoding if it is given; return the losses.

    Adam with a falling rate takes the place of the thesis' SGD, which needs many epochs.

    Args:
        model: trained in place.
        ids: one long row of tokens, `[n]`, cut into `batch` rows that are read in order, again and again.
        steps: of the optimiser.
        recoding: corrects the states in training; a learned step size is trained along.
        batch, length: rows and tokens of a step.
        rate: of Adam; it falls to 0 by a cosine.
        clip: greatest norm of the gradient.
        done: called with step and loss.

    Raises:
        InputError: too few tokens for one step, or no steps.
    """
    if ids.ndim != 1 or len(ids) < batch * (length + 1):
        raise InputError(f"{batch} rows of {length} tokens need {batch * (length + 1)}, not {ids.numel()}")
    if steps < 1:
        raise InputError(f"steps is {steps}; it must be at least 1")
    rows = ids[: len(ids) // batch * batch].reshape(batch, -1)
    learned = [*model.parameters(), *(recoding.parameters() if recoding is not None else ())]
    optimiser = torch.optim.Adam(learned, lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    place, state, losses = 0, model.start(batch), []
    with progress("training a recurrent model", steps, "steps") as advance:
        for step in range(steps):
            if place + length + 1 > rows.shape[1]:
                place, state = 0, model.start(batch)
            chunk = rows[:, place : place + length + 1]
            state, loss = _loss(model, chunk, recoding, state)
            total = loss
            if isinstance(model.decode, EnsembleDecoder):
                total = loss + model.decode.anchor_loss(len(ids))
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(learned, clip)
            optimiser.step()
            falling.step()
            place += length
            losses.append(float(loss.detach()))
            advance()
            if done is not None:
                done(step + 1, losses[-1])
    return losses


def _loss(model: RecurrentLM, chunk: Tensor, recoding: Recoding | None, state: State) -> tuple[State, Tensor]:
    state = [(h.detach(), c.detach()) for h, c in state]
    tops, targets = [], chunk[:, 1:].T
    for x, y in zip(chunk[:, :-1].T, targets, strict=True):
        state = model.step(x, state)
        top = state[-1][0]
        if recoding is not None:
            state, _ = recoding(state, model.decode, y)
            top = state[-1][0] if recoding.redecode else top
        tops.append(top)
    h = F.dropout(torch.stack(tops), model.dropout, training=model.dropout > 0)
    logits = model.decode(h)
    return state, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _check(ids: Tensor) -> None:
    if ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ShapeError(f"tokens must be whole numbers [rows, 2 or more], not {list(ids.shape)}")
