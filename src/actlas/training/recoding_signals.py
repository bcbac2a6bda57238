"""What a recoded state is corrected by: error signals and step sizes.

    target_nll   -log p(y)                          y: the character that came (feedback)
    entropy      H(p)
    mc_dropout   H(mean_k softmax(W (m_k * h)))     m_k: dropout masks, drawn once a step of the sequence
    ensemble     H(mean_k softmax(W_k h))           an `EnsembleDecoder`, held near its random start by
                 lambda / N * mean_k |W_k - W_k0|^2,  lambda = data noise / prior scale

    step size    a constant, softplus(a) with a learned, or softplus(MLP(h)) with 300 and 100 hidden units

The released code of the thesis computes p^-p - 1 for the surprisal, averages the ensemble over rows of the
batch and compares with no anchors; these are the signals as the text defines them.

Sources: "Recoding latent sentence representations" (2020); anchors: Pearce et al. 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, did_you_mean

SignalName = Literal["target_nll", "entropy", "mc_dropout", "ensemble"]
SIGNALS = ("target_nll", "entropy", "mc_dropout", "ensemble")
#: `(state [rows, d], decode: state -> logits, target [rows]) -> [rows]`
SignalFunction = Callable[[Tensor, Callable[[Tensor], Tensor], Tensor], Tensor]


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row in nats, `[...]` from `[..., v]`."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class EnsembleDecoder(nn.Module):
    """K linear decoders with a common answer, log mean_k softmax(W_k h + b_k).

    Args:
        width, outputs: of each decoder.
        members: K.
        prior_scale: variance of the normal distribution that weights start from and are anchored to.
        data_noise: the numerator of lambda.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        members: int = 10,
        *,
        prior_scale: float = 0.05,
        data_noise: float = 0.15,
    ) -> None:
        super().__init__()
        if members < 2 or not prior_scale > 0 or not data_noise > 0:
            raise InputError(
                f"an ensemble needs 2 members or more and positive scales, not {members}, {prior_scale:g} "
                f"and {data_noise:g}"
            )
        self.strength = data_noise / prior_scale
        self.weight = nn.Parameter(torch.randn(members, outputs, width) * prior_scale**0.5)
        self.bias = nn.Parameter(torch.zeros(members, outputs))
        self.register_buffer("anchor", self.weight.detach().clone())

    def forward(self, h: Tensor) -> Tensor:
        """Return the log of the mean prediction, `[..., outputs]`."""
        logits = torch.einsum("...d,kvd->k...v", h, self.weight)
        logits = logits + self.bias.reshape(len(self.bias), *([1] * (h.ndim - 1)), -1)
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(self.weight))

    def anchor_loss(self, items: int) -> Tensor:
        """Return the anchors' share of the loss, for `items` training items in all."""
        anchor: Tensor = self.anchor  # type: ignore[assignment]
        apart = (self.weight - anchor).square().sum((1, 2)).mean()
        return self.strength / items * apart


class Signal(nn.Module):
    """An error signal by name, or any function of state, decoder and target.

    Args:
        what: the name or the function.
        samples, rate: dropout masks and their rate, for `"mc_dropout"`.
        seed: of the masks.
        uses_target: whether a function looks at the target.
    """

    def __init__(
        self,
        what: SignalName | SignalFunction,
        *,
        samples: int = 10,
        rate: float = 0.21,
        seed: int = 0,
        uses_target: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(what, str) and what not in SIGNALS:
            hint = did_you_mean(what, SIGNALS)
            raise InputError(f"there is no signal {what!r}{hint} (there are {', '.join(SIGNALS)})")
        if samples < 1 or not 0 < rate < 1:
            raise InputError(f"samples is {samples} and rate {rate:g}; give 1 or more, and a rate in (0, 1)")
        self.what, self.samples, self.rate = what, samples, rate
        self.uses_target = what == "target_nll" or (not isinstance(what, str) and uses_target)
        self._generator = torch.Generator().manual_seed(seed)
        self._masks: Tensor | None = None

    def draw(self, width: int) -> None:
        """Draw what is random, once for a step of the sequence."""
        if self.what == "mc_dropout":
            kept = torch.rand(self.samples, 1, width, generator=self._generator) >= self.rate
            self._masks = kept.float() / (1 - self.rate)

    def forward(self, h: Tensor, decode: Any, target: Tensor) -> Tensor:
        """Return the signal of each row, `[rows]`, of states `[rows, d]` and targets `[rows]`."""
        if not isinstance(self.what, str):
            return self.what(h, decode, target)
        if self.what == "target_nll":
            return F.cross_entropy(decode(h), target, reduction="none")
        if self.what == "mc_dropout":
            if self._masks is None:
                self.draw(h.shape[-1])
            assert self._masks is not None
            log_p = decode(h * self._masks.to(h)).log_softmax(-1)
            return entropy(log_p.logsumexp(0))
        if self.what == "ensemble" and not isinstance(decode, EnsembleDecoder):
            raise InputError("the signal 'ensemble' needs a model whose decoder is an ensemble")
        return entropy(decode(h))


class StepSize(nn.Module):
    """How far a state moves against the gradient.

    Args:
        kind: `"constant"`, `"learned"` (one number) or `"mlp"` (of the state).
        start: the step, or what a learned one starts from; 0 or more.
        width: of the states, for `"mlp"`.
    """

    def __init__(self, kind: str = "constant", start: float = 0.1, width: int = 0) -> None:
        super().__init__()
        if not 0 <= start < math.inf:
            raise InputError(f"step is {start:g}; it must be 0 or more (a negative step raises the error)")
        if kind not in ("constant", "learned", "mlp"):
            raise InputError(f"the step size is {kind!r}; it must be 'constant', 'learned' or 'mlp'")
        if kind != "constant" and start == 0:
            raise InputError("a learned step cannot start from 0; give a small positive number")
        self.kind, self.start = kind, start
        inverse = math.log(math.expm1(start)) if start > 0 else 0.0  # softplus(inverse) = start
        if kind == "learned":
            self.raw = nn.Parameter(torch.tensor(inverse))
        elif kind == "mlp":
            if width < 1:
                raise InputError(f"a step size by MLP needs the states' width, not {width}")
            last = nn.Linear(100, 1)
            nn.init.constant_(last.bias, inverse)
            nn.init.normal_(last.weight, std=1e-2)
            self.net = nn.Sequential(nn.Linear(width, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), last)

    def forward(self, h: Tensor) -> Tensor | float:
        """Return the step for states `[rows, d]`: a number, or `[rows, 1]`."""
        if self.kind == "learned":
            return F.softplus(self.raw)
        if self.kind == "mlp":
            return F.softplus(self.net(h.detach()))
        return self.start
