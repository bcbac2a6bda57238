"""Which answer a model prefers under many vectors at one site: prompts run once, later blocks often.

    margin_i = log p(answer_i+ | prompt_i) - log p(answer_i- | prompt_i)          in nats
    P(true)_i = sigmoid(margin_i)                                   between the two answers

What follows the shared beginning of a pair is its answer. Where all answers are one token, both are read
from one pass over the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.answer_function import answer_start, token_ids
from actlas.core.contrast import Contrast
from actlas.core.errors import ModelError, NonFiniteError
from actlas.core.layout import forward_parameters
from actlas.core.splitting import split_at

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]
_ROWS = 64  # rows of one pass, copies under different vectors included


class Margins:
    """The margins of a contrast.

    Args:
        model: a causal language model.
        contrast: the pairs.

    Raises:
        ModelError: not a causal language model.
        InputError: a pair without a shared beginning, or with an empty answer.
    """

    def __init__(self, model: Model, contrast: Contrast) -> None:
        if model.kind != "causal-lm":
            raise ModelError(f"{model.name} is a {model.kind}; answers need a causal language model")
        self.model, self.contrast, self.n = model, contrast, len(contrast)
        sides = [
            (token_ids(model, a).cpu(), token_ids(model, b).cpu())
            for a, b in zip(contrast.positive, contrast.negative, strict=True)
        ]
        starts = [answer_start(a, b) for a, b in sides]
        self.single = all(len(a) == len(b) == s + 1 for (a, b), s in zip(sides, starts, strict=True))
        if self.single:
            texts = [a[:-1] for a, _ in sides]
            self._answers = [[(i, a[-1:]), (i, b[-1:])] for i, (a, b) in enumerate(sides)]
        else:
            texts = [ids[:-1] for pair in sides for ids in pair]
            self._answers = [
                [(2 * i, a[s:]), (2 * i + 1, b[s:])]
                for i, ((a, b), s) in enumerate(zip(sides, starts, strict=True))
            ]
        self._keep = max(len(ids) for pair in self._answers for _, ids in pair)
        longest = max(len(t) for t in texts)
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):  # padded on the left: all answers end in the last columns
            ids[row, longest - len(text) :], mask[row, longest - len(text) :] = text, 1
        self.ids, self.mask = ids, mask
        takes = "logits_to_keep" in forward_parameters(model.module)
        self._options: dict[str, Any] = {"logits_to_keep": self._keep} if takes else {}

    def plain(self) -> Array:
        """Return the margins `[n]` of the model as it is, installed edits included."""
        rows = []
        for at in range(0, len(self.ids), _ROWS):
            output = self.model.forward(self._encoded(slice(at, at + _ROWS)), **self._options)
            rows.append(self._log_p(output, slice(at, at + _ROWS)))
        return self._margins(np.concatenate(rows))

    def under(self, site: str, changes: Sequence[Tensor | Callable[[Tensor], Tensor]]) -> Array:
        """Return the margins `[len(changes), n]` with each change made at every token of a site.

        Args:
            changes: a vector that is added, or a function of the activation `[batch, pos, ...]`.
        """
        head, tail = split_at(self.model, site)
        copies = len(changes)
        step = max(1, _ROWS // max(copies, 1))
        found: list[Array] = []
        for at in range(0, len(self.ids), step):
            rows = slice(at, at + step)
            state = head(self._encoded(rows))
            x = state.activation
            moved = torch.stack([_changed(x, c) for c in changes], dim=1).flatten(0, 1)
            log_p = self._log_p(tail(state, moved, **self._options), rows, copies)
            found.append(log_p.reshape(-1, copies, *log_p.shape[1:]))
        whole = np.concatenate(found)
        return np.stack([self._margins(whole[:, c]) for c in range(copies)])

    def _encoded(self, rows: slice) -> dict[str, Any]:
        return self.model.encode(
            {"input_ids": self.ids[rows], "attention_mask": self.mask[rows]}, padding_side="left"
        )

    def _log_p(self, output: Any, rows: slice, copies: int = 1) -> Array:
        """Return the log probabilities of both answers of each row, `[rows, 2]` (0 where it has only one)."""
        logits: Tensor = getattr(output, "logits", output)[:, -self._keep :]
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                f"the logits of {self.model.name} hold NaN or infinity; use a smaller strength"
            )
        start = rows.start
        result = np.zeros((len(logits), 2))
        for pair in self._answers:
            for side, (row, ids) in enumerate(pair):
                if not start <= row < start + len(logits) // copies:
                    continue
                for copy in range(copies):
                    z = logits[(row - start) * copies + copy, -len(ids) :].float().log_softmax(-1)
                    picked = z.gather(-1, ids.to(z.device).unsqueeze(-1))
                    result[(row - start) * copies + copy, side] = float(picked.double().sum())
        return result

    def _margins(self, log_p: Array) -> Array:
        found: Array = np.array([log_p[a[0], 0] - log_p[b[0], 1] for a, b in self._answers])
        return found


def _changed(x: Tensor, change: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
    return x + change.to(x).reshape(x.shape[2:]) if isinstance(change, Tensor) else change(x)


def probability(margins: Array) -> Array:
    """Return P(true) between the two answers, `1 / (1 + exp(-margin))`."""
    result: Array = 0.5 * (1 + np.tanh(np.asarray(margins) / 2))
    return result
