"""What an edit costs and what it does, from the edited part of the model on.

    run = Suffix(model, edit, texts)          # one forward pass over the texts, stopped at the edit
    run.outcome(edit * 2).kl                  # KL(plain || edited) per token of each text, in nats
    run.outcome(edit * 4).kl                  # only the blocks after the edit run again

The price of an edit is the KL divergence of the model's next-token distributions, averaged over the tokens
of a text: 0 means that nobody can notice, and 0.1 nat per token is about what 4-bit rounding costs.
Its effect on a contrast is the change of preference

    pref = log p(positive) / n_positive - log p(negative) / n_negative

where only the tokens after what both texts of a pair begin with are scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.divergence import kl_divergence, logit_variance
from actlas.core.edit import ActivationEdit, Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.splitting import Head, SplitState, Tail, split_at
from actlas.measure.likelihood import output_logits

if TYPE_CHECKING:
    from actlas.core.contrast import Contrast
    from actlas.core.model import Model

Array = NDArray[np.float64]
BATCH_TOKENS = 768
BASE_BYTES = 256 * 2**20  # plain logits that are kept; beyond it they are computed again


@dataclass(frozen=True)
class Outcome:
    """What an edit did to texts, one number a text.

    Attributes:
        kl: KL(plain || edited) per token, nats.
        logp: mean log probability of its scored tokens under the edit, nats.
    """

    kl: Array
    logp: Array


@dataclass
class _Batch:
    rows: list[int]
    encoded: dict[str, Any]
    state: SplitState | None
    base: Tensor | None = None


class Suffix:
    """Texts that were run once up to where edits begin, and are run on from there as often as needed.

    Args:
        model: a causal language model. Edits that are installed belong to the plain model.
        edits: the edits that will be asked about, at any strength; they say where the model is cut.
        texts: at least one.
        scored_from: for each text, the number of its first scored token (at least 1).

    Raises:
        ModelError: not a causal language model.
        InputError: no texts, an empty text, or one of a single token.
    """

    def __init__(
        self,
        model: Model,
        edits: Edit | Iterable[Edit],
        texts: Sequence[str],
        *,
        scored_from: Sequence[int] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        if model.kind != "causal-lm":
            raise ModelError(
                f"{model.name} is a {model.kind}; the price of an edit needs a causal language model"
            )
        if not texts:
            raise InputError("there are no texts to price an edit on; give at least one")
        self.model, self.n = model, len(texts)
        self.skipped = blocks_before(model, [edits] if isinstance(edits, Edit) else list(edits))
        head: Head | None = None
        self._tail: Tail | None = None
        if self.skipped:
            head, self._tail = split_at(model, f"blocks.{self.skipped - 1}.resid_post")
        self._batches: list[_Batch] = []
        lengths = [_length(model, text) for text in texts]
        first = scored_from if scored_from is not None else [1] * self.n
        for i, (length, start) in enumerate(zip(lengths, first, strict=True)):
            if length < 2 or not 1 <= start < length:
                raise InputError(
                    f"text {i} has {length} tokens, scored from {start}; it needs one after its first"
                )
        self.scored_from, self.tokens = list(first), lengths
        for rows in _grouped(lengths, batch_tokens):
            encoded = model.encode([texts[i] for i in rows])
            self._batches.append(_Batch(rows, encoded, head(encoded) if head is not None else None))
        kept = sum(lengths) * 4 * (model.vocab_size or 50_000) <= BASE_BYTES
        for batch in self._batches if kept else []:
            batch.base = self._logits(batch, None)

    def outcome(self, edit: Edit | None) -> Outcome:
        """Run the texts under an edit (`None`: without).

        Raises:
            NonFiniteError: the edit makes the logits NaN or infinite.
            InputError: the edit reaches before the place where the model was cut.
        """
        kl, logp = np.zeros(self.n), np.zeros(self.n)
        for batch in self._checked(edit):
            base = self._base(batch)
            new = base if edit is None else self._logits(batch, edit)
            divergence = kl_divergence(base, new)
            for row, mine, ids in self._by_text(batch):
                kl[row] = float(divergence[mine].mean())
                start, z = self.scored_from[row], new[mine].float()
                kept = z[start - 1 : len(ids) - 1].log_softmax(-1)
                picked = kept.gather(-1, ids[start:].unsqueeze(-1))
                logp[row] = float(picked.double().mean())
        return Outcome(kl, logp)

    def fisher(self, edit: Edit, step: float) -> Array:
        """Return E[Var_p(u)] of each text, u the logits' derivative in the strength at 0.

        The derivative is a central difference: `(logits(step) - logits(-step)) / (2 step)`.
        """
        found = np.zeros(self.n)
        for batch in self._checked(edit):
            change = (self._logits(batch, edit * step) - self._logits(batch, edit * -step)) / (2 * step)
            variance = logit_variance(self._base(batch), change)
            for row, mine, _ in self._by_text(batch):
                found[row] = float(variance[mine].mean())
        return found

    def _checked(self, edit: Edit | None) -> list[_Batch]:
        if edit is not None and self.skipped and blocks_before(self.model, [edit]) < self.skipped:
            raise InputError(
                f"{edit.describe()} reaches before block {self.skipped - 1}, where the model was cut"
            )
        return self._batches

    def _base(self, batch: _Batch) -> Tensor:
        return batch.base if batch.base is not None else self._logits(batch, None)

    def _logits(self, batch: _Batch, edit: Edit | None) -> Tensor:
        """Return the logits of the batch's real tokens, `[tokens, vocab]`, text after text."""
        with self.model.edit(*([] if edit is None else [edit])), torch.no_grad():
            if self._tail is not None:
                output = self._tail(batch.state).logits
            else:
                output = output_logits(self.model, batch.encoded)
        logits: Tensor = output[batch.encoded["attention_mask"].bool()]
        if not bool(torch.isfinite(logits).all()):
            what = "the model" if edit is None else edit.describe()
            raise NonFiniteError(f"{what} makes logits that are NaN or infinite; use a smaller strength")
        return logits

    def _by_text(self, batch: _Batch) -> Iterable[tuple[int, slice, Tensor]]:
        """Yield each text's number, its rows in the batch's logits, and its token ids."""
        start, ids = 0, batch.encoded["input_ids"]
        for i, row in enumerate(batch.rows):
            length = int(batch.encoded["attention_mask"][i].sum())
            yield row, slice(start, start + length), ids[i, batch.encoded["attention_mask"][i].bool()]
            start += length


class PairSuffix:
    """A `Suffix` over both sides of a contrast, which knows the preference of each pair.

    Args:
        model, edits: see `Suffix`.
        contrast: the pairs. What both texts of a pair begin with is not scored.
    """

    def __init__(self, model: Model, edits: Edit | Iterable[Edit], contrast: Contrast) -> None:
        shared = [_shared(model, p, q) for p, q in zip(contrast.positive, contrast.negative, strict=True)]
        self.run = Suffix(model, edits, contrast.texts, scored_from=shared * 2)
        self.n = len(contrast)
        self.base = self.preference(self.run.outcome(None))

    def preference(self, outcome: Outcome) -> Array:
        """Return log p(positive) - log p(negative) per token of each pair, `[n]`, in nats."""
        return outcome.logp[: self.n] - outcome.logp[self.n :]

    def effect(self, edit: Edit) -> tuple[Array, Array]:
        """Return the change of preference `[n]` and the KL per token `[2n]` (positive texts first)."""
        outcome = self.run.outcome(edit)
        return self.preference(outcome) - self.base, outcome.kl


def preference(model: Model, contrast: Contrast) -> Array:
    """Return `log p(positive) - log p(negative)` per token after the shared beginning, `[n]`, in nats.

    Edits that are installed apply.
    """
    return PairSuffix(model, (), contrast).base


def price(model: Model, edit: Edit, texts: Sequence[str]) -> Array:
    """Return KL(plain || edited) per token of each text, `[n]`, in nats; see `Suffix`."""
    return Suffix(model, edit, texts).outcome(edit).kl


def blocks_before(model: Model, edits: Sequence[Edit]) -> int:
    """Return how many blocks run before anything that the edits read or write; 0 if that is not known.

    Edits that are installed already run in both parts of a cut model, so nothing is skipped then.
    """
    if model.tower is None or model.installed or not edits:
        return 0
    least = model.tower.n_blocks
    for part in (p for e in edits for p in e.parts()):
        if not isinstance(part, ActivationEdit):
            return 0
        names = [part.site] if part.condition is None else [part.site, part.condition.lens.site]
        for site in model.resolve(names):
            if site.kind in ("module", "embed") or site.tower != model.tower.name:
                return 0
            if site.block is not None:
                least = min(least, site.block + (site.kind == "resid_post"))
    return least


def _length(model: Model, text: str) -> int:
    if not text.strip():
        raise InputError("one of the texts is empty; leave it out")
    return len(model.tokenizer(text)["input_ids"])


def _shared(model: Model, one: str, other: str) -> int:
    """Return how many first tokens two texts share, at least 1 and so that both have one more."""
    a, b = (model.tokenizer(text)["input_ids"] for text in (one, other))
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return max(1, min(same, len(a) - 1, len(b) - 1))


def _grouped(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group texts of like length, so that little is padded."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
