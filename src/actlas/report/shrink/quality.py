"""What a mix costs in quality: held-out text through the ordinary model with the mix's edits.

Language models: perplexity over the original's on the same tokens, with a paired interval over documents, and
the share of weights that a token needed. Encoders have no perplexity: there 1 + the mean cosine distance of a
text's embedding (mean of its tokens' last hidden states) from the one that the original gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError, ModelError
from actlas.measure.likelihood import Losses, nll
from actlas.measure.samples import mean_measurement
from actlas.measure.sparsity_price import sparsity_price

if TYPE_CHECKING:
    from actlas.core.model import Model

KINDS = ("causal-lm", "encoder")


@dataclass(frozen=True)
class Quality:
    """Quality of a mix; see `rows.Row`."""

    value: float
    low: float | None
    high: float | None
    touched: float = 1.0


@dataclass
class Judge:
    """Measures quality on one held-out text, against the original.

    Attributes:
        model: the model without edits.
        held: documents that nothing was fitted on.
        tokens, context: how much is read, in windows of how many tokens.
        seed: of the bootstrap.
    """

    model: Model
    held: Sequence[Any]
    tokens: int = 4096
    context: int = 256
    seed: int = 0
    _base: Losses | None = field(default=None, repr=False)
    _vectors: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.model.kind not in KINDS:
            raise ModelError(
                f"{self.model.name} is a model of kind {self.model.kind}; "
                f"what shrinking costs can be measured for {' and '.join(KINDS)}"
            )
        self.options: dict[str, Any] = {"tokens": self.tokens, "context": self.context}

    @property
    def what(self) -> str:
        """Name of the quality, for tables and plots."""
        return "perplexity" if self.model.kind == "causal-lm" else "embeddings"

    def base(self) -> float:
        """Measure the original; return its perplexity (encoders: 1)."""
        if self.model.kind != "causal-lm":
            self._vectors = self._embed()
            return 1.0
        self._base = nll(self.model, self.held, **self.options)
        if len(self._base.tokens) < 2:
            raise InputError("the held-out text is one document; an interval needs at least two")
        return float(torch.tensor(self._base.nll.sum() / self._base.tokens.sum()).exp())

    def __call__(self, edits: Sequence[Edit]) -> Quality:
        """Measure a mix."""
        if self._base is None and self._vectors is None:
            self.base()
        if not edits:
            return Quality(1.0, 1.0, 1.0)
        if self._base is not None:
            edit = compose(edits)
            found = sparsity_price(
                self.model, self.held, edit, base=self._base, seed=self.seed, **self.options
            )
            return Quality(found[2].value, found[2].low, found[2].high, found[0].value)
        assert self._vectors is not None
        with self.model.edit(*edits):
            other = self._embed()
        off = 1 - torch.nn.functional.cosine_similarity(self._vectors, other, dim=-1)
        m = mean_measurement("distance", "cosine", off.numpy(), seed=self.seed)
        low, high = (None if b is None else 1 + b for b in (m.low, m.high))
        return Quality(1 + m.value, low, high)

    def _embed(self) -> Tensor:
        """Return one vector a document, float64 `[documents, d]`."""
        limit, found = min(self.context, self.model.context_length or self.context), []
        read = 0
        for document in self.held:
            text = document if isinstance(document, str) else document.text
            encoded = self.model.encode(text[: 3 * limit], truncate=True)
            hidden = self.model.forward(encoded).last_hidden_state.double()
            mask = encoded.get("attention_mask", torch.ones(hidden.shape[:2])).to(hidden).unsqueeze(-1)
            found.append(((hidden * mask).sum(1) / mask.sum(1))[0].cpu())
            read += hidden.shape[1]
            if read >= self.tokens:
                break
        return torch.stack(found)
