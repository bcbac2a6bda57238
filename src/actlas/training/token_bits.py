"""Fewer activation bits for tokens that attention does not need: 4 for some, 8 for the others.

    edit = token_bits(model, corpus, low=4, high=8, fraction=0.5)         # actlas fit token-bits ...
    with model.edit(edit): ...

The score of a token in a layer is the sum over heads of its pre-softmax attention score against the first
token, which every token may see. Tokens below the layer's threshold are rounded to `low` bits, the others to
`high` (one range a token), in what this layer's MLP and its down projection read, and in what the next
layer's attention reads and its queries and keys. The threshold is the `fraction` quantile on calibration
text, so that a token's bits depend on the text before it alone; ranking the tokens of a sequence against each
other, as published, tells early tokens about later ones.

`score="random"` draws tokens with the same probability and `"inverse"` takes the other end: the controls.

Source: Shen et al. 2024, "EdgeQAT", section on token importance (there also the values, which are computed
before the scores here and stay at `high`; the released code averages scores over the batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from actlas.core.edit import Edit, WholeEdit, register_edit
from actlas.core.errors import InputError, ModelError
from actlas.core.hooks import attach
from actlas.core.installation import PassWatcher
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.numbers import QuantSpec, fake_quant
from actlas.measure.likelihood import nll
from actlas.measure.quant_price import quant_prices
from actlas.training.qat import check_language_model, split_documents

if TYPE_CHECKING:
    from actlas.core.installation import Installation

Score = Literal["first_token", "random", "inverse"]
_ROUNDED_HERE = ("mlp_norm", "mlp.act")
_ROUNDED_NEXT = ("attn_norm", "attn.q", "attn.k")


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class TokenBits(WholeEdit):
    """Round activations to bits that depend on the token; see the module's text.

    Attributes:
        thresholds: of the score, one a layer, `[layers]`.
        low, high: bits.
        fraction: share of tokens with `low` bits on the calibration text.
        score: what decides.
        seed: of `"random"`.
        counts: tokens with `low` bits and all tokens since it was made, for the mean number of bits.
    """

    whole: ClassVar[str] = "bits are chosen for every token"

    thresholds: Tensor
    low: int = 4
    high: int = 8
    fraction: float = 0.5
    score: Score = "first_token"
    seed: int = 0

    def __post_init__(self) -> None:
        for bits in (self.low, self.high):
            if not 2 <= bits <= 8:
                raise InputError(f"activations have 2 to 8 bits here, not {bits}")
        if self.low > self.high:
            raise InputError(f"low={self.low} is above high={self.high}; swap them")
        if not 0 <= self.fraction <= 1:
            raise InputError(f"fraction is {self.fraction:g}; it must be from 0 to 1")
        if self.score not in get_args(Score):
            raise InputError(f"score is {self.score!r}; it must be {', '.join(get_args(Score))}")
        object.__setattr__(self, "counts", [0, 0])

    counts: ClassVar[list[int]]

    @property
    def mean_bits(self) -> float:
        """Mean bits of the tokens that ran so far; by `fraction` before the first."""
        few, every = self.counts
        share = few / every if every else self.fraction
        return self.low * share + self.high * (1 - share)

    def describe(self) -> str:
        return f"TokenBits A{self.low}/A{self.high} by {self.score}, {self.fraction:.0%} at A{self.low}"

    def _attach(self, installation: Installation) -> None:
        model = installation.model
        blocks = _blocks(model)
        if len(self.thresholds) != len(blocks):
            raise InputError(
                f"{len(self.thresholds)} thresholds do not fit {model.name}'s {len(blocks)} blocks"
            )
        generator = torch.Generator().manual_seed(self.seed)
        masks: dict[int, Tensor] = {}
        for b in blocks:
            installation.keep(
                _on(
                    model, f"blocks.{b}.attn.scores", self._chooser(b, masks, generator), installation.watcher
                )
            )
            for kind in _ROUNDED_HERE:
                self._place(installation, f"blocks.{b}.{kind}", b, masks)
            if b + 1 in blocks:
                for kind in _ROUNDED_NEXT:
                    self._place(installation, f"blocks.{b + 1}.{kind}", b, masks)

    def _place(self, installation: Installation, site: str, b: int, masks: dict[int, Tensor]) -> None:
        installation.keep(_on(installation.model, site, self._rounder(b, masks), installation.watcher))

    def _chooser(
        self, b: int, masks: dict[int, Tensor], generator: torch.Generator
    ) -> Callable[[Tensor], Tensor]:
        def choose(scores: Tensor) -> Tensor:
            found = first_token_scores(scores.detach())
            limit = float(self.thresholds[b])
            if self.score == "random":
                few = (torch.rand(found.shape, generator=generator) < self.fraction).to(found.device)
            else:
                few = found < limit if self.score == "first_token" else found >= limit
            masks[b] = few
            self.counts[0] += int(few.sum())
            self.counts[1] += few.numel()
            return scores

        return choose

    def _rounder(self, b: int, masks: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
        low, high = (QuantSpec(bits, granularity="channel") for bits in (self.low, self.high))

        def round_tokens(x: Tensor) -> Tensor:
            few = masks.get(b)
            if few is None or few.shape != x.shape[:2]:
                raise ModelError(f"attention of block {b} gave no scores before its tokens were rounded")
            flat = x.flatten(2)
            chosen = torch.where(few[..., None], fake_quant(flat, low), fake_quant(flat, high))
            return chosen.view_as(x)

        return round_tokens

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        names = ("low", "high", "fraction", "score", "seed")
        return {n: getattr(self, n) for n in names}, {"thresholds": self.thresholds}

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        given = {k: v for k, v in record.items() if k != "type"}
        return cls(tensors["thresholds"], **given)


def first_token_scores(scores: Tensor) -> Tensor:
    """Return each token's score against the first one, summed over heads, `[batch, query]`.

    Args:
        scores: `[batch, heads, query, key]`, before the softmax.
    """
    return scores[..., 0].sum(1)


def _blocks(model: Model) -> list[int]:
    if model.n_blocks is None:
        raise ModelError(f"{model.name} has no known layout, so its attention scores cannot be read")
    return list(range(model.n_blocks))


def _on(model: Model, name: str, function: Callable[[Tensor], Tensor], watcher: PassWatcher) -> Any:
    (site,) = model.resolve(name)
    return attach(model.module, site, function, batch=lambda: watcher.of(site).batch or 1)


def calibrate_thresholds(
    model: Model, documents: Any, fraction: float, *, tokens: int = 4096, context: int = 256
) -> Tensor:
    """Return the `fraction` quantile of each layer's token scores, float32 `[layers]`."""
    found: dict[int, list[Tensor]] = {b: [] for b in _blocks(model)}
    watcher = PassWatcher(model)
    with ExitStack() as stack:
        stack.callback(watcher.stop)
        watcher.start()
        for b, kept in found.items():

            def read(scores: Tensor, kept: list[Tensor] = kept) -> Tensor:
                kept.append(first_token_scores(scores.detach()).flatten().float())
                return scores

            stack.callback(_on(model, f"blocks.{b}.attn.scores", read, watcher).remove)
        nll(model, documents, tokens=tokens, context=context)
    quantile = torch.tensor(float(fraction))
    return torch.stack([torch.quantile(torch.cat(kept), quantile) for kept in found.values()])


@method(
    "token-bits",
    room="training",
    returns="Edit",
    data="corpus",
    summary="8-bit activations for tokens that attend to the first one, 4 bits for the others",
    example="actlas fit token-bits smollm2 prose --low 4 --high 8 -o token-bits/",
    papers=("edgeqat",),
)
def token_bits(
    model: Model,
    data: Any,
    *,
    low: int = 4,
    high: int = 8,
    fraction: float = 0.5,
    score: Score = "first_token",
    held_out: float = 0.5,
    tokens: int = 2048,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit with thresholds from a corpus.

    Args:
        model: a causal language model with a layout.
        data: a corpus; its last part is held out for the numbers.
        low, high, fraction, score: see `TokenBits`.
        held_out, tokens, context: share of documents, and tokens of them, on which it is measured (and as
            many for the thresholds).
        seed: of random choices.

    Returns:
        The edit; its measurements are the prices of it and of random tokens at the same share, and their
        paired difference.

    Raises:
        InputError, ModelError: bad bits or shares, no causal language model.
    """
    check_language_model(model)
    learn, test = split_documents(data, held_out)
    empty = torch.zeros(len(_blocks(model)))
    TokenBits(empty, low, high, fraction, score, seed)  # refuses bad values before the text is read
    part = 1 - fraction if score == "inverse" else fraction
    limits = calibrate_thresholds(model, learn, part, tokens=tokens, context=context)
    edit = TokenBits(limits, low, high, fraction, score, seed)
    random = TokenBits(limits, low, high, fraction, "random", seed)
    found = quant_prices(
        model, test, {"token-bits": edit, "random": random}, pairs=[("token-bits", "random")], seed=seed,
        tokens=tokens, context=context,
    )  # fmt: skip
    return edit.bind(model.fingerprint).with_measurements(found)
