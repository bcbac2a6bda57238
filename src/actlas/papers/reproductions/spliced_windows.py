"""Windows of text cut at a site: what the model loses when other rows are put in the activation's place.

    windows = SplicedWindows(model, documents, site, count=12, length=128, massive=1500.0)
    windows.cross_entropy(None)                   # float64 [windows], nats a token, the model as it is
    windows.cross_entropy(sae.reconstruct(windows.rows))

The first part of the model runs once; only the blocks after the site run again. Rows that are massive,
above the dictionary's `skip_above`, always stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.splitting import split_at
from actlas.dictionaries.sources import loss_gradient

if TYPE_CHECKING:
    from actlas.core.model import Model

_ROWS = 4  # windows that run at once: their logits are the memory


class SplicedWindows:
    """The first tokens of some documents, with the activations and gradients at a site.

    Attributes:
        activations: float32 `[windows, length, d]`.
        gradients: dL/dx of the summed next-token loss, of the same shape; 0 at the last token.
        massive: which rows stay as they are, bool `[windows, length]`.
    """

    def __init__(
        self, model: Model, documents: Iterable[Any], site: str, *, count: int, length: int, massive: float
    ) -> None:
        tokenizer = model.tokenizer
        assert tokenizer is not None
        ids = [tokenizer(d.text, verbose=False)["input_ids"][:length] for d in documents]
        whole = [i for i in ids if len(i) == length][:count]
        if len(whole) < count:
            raise InputError(f"only {len(whole)} documents have {length} tokens; {count} are needed")
        self._head, self._tail = split_at(model, site)
        self._parts, activations, gradients = [], [], []
        for start in range(0, count, _ROWS):
            given = torch.tensor(whole[start : start + _ROWS])
            encoded = {"input_ids": given, "attention_mask": torch.ones_like(given)}
            trace = model.trace(encoded, site, grad=True, stop=False)
            gradient, labelled = loss_gradient(trace, site)
            gradients.append((gradient * labelled.unsqueeze(-1)).float())
            state = self._head(encoded)
            activations.append(state.activation.float())
            self._parts.append((state, given))
        self.activations, self.gradients = torch.cat(activations), torch.cat(gradients)
        self.massive = self.activations.norm(dim=-1) > massive

    @property
    def rows(self) -> Tensor:
        """All activations, `[windows * length, d]`."""
        return self.activations.flatten(0, 1)

    def cross_entropy(self, rows: Tensor | None) -> NDArray[np.float64]:
        """Return each window's mean next-token loss in nats, `[windows]`.

        Args:
            rows: what stands in the activations' place, `[windows * length, d]`; `None`: nothing.
        """
        new = self._written(rows)
        out = []
        for i, (state, ids) in enumerate(self._parts):
            part = new[i * _ROWS : i * _ROWS + len(ids)]
            logits = self._tail(state, part.to(state.activation)).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            out.append(loss.reshape(len(ids), -1).double().mean(1))
        return torch.cat(out).numpy()

    def logit_change(
        self, directions: Tensor, size: float, *, windows: int = 2, at: int = 24
    ) -> NDArray[np.float64]:
        """Return the mean absolute change of the next token's logits when a direction is added there.

        Args:
            directions: unit rows `[n, d]`.
            size: norm of what is added.
            windows: in how many windows (a power of the first few).
            at: at which token; the window is cut after it.

        Returns:
            float64 `[n]`, averaged over windows and vocabulary.
        """
        total = np.zeros(len(directions))
        for i in range(windows):
            _, ids = self._parts[i // _ROWS]
            cut = ids[i % _ROWS : i % _ROWS + 1, : at + 1]
            short = self._head({"input_ids": cut, "attention_mask": torch.ones_like(cut)})
            base = self._tail(short, logits_to_keep=1).logits[0, -1].double()
            for start in range(0, len(directions), 32):
                pushed = short.activation.repeat(len(directions[start : start + 32]), 1, 1)
                pushed[:, -1] += size * directions[start : start + 32].to(pushed)
                logits = self._tail(short, pushed, logits_to_keep=1).logits[:, -1].double()
                total[start : start + 32] += (logits - base).abs().mean(1).numpy()
        return total / windows

    def _written(self, rows: Tensor | None) -> Tensor:
        if rows is None:
            return self.activations
        new = rows.reshape(self.activations.shape).to(self.activations)
        return torch.where(self.massive.unsqueeze(-1), self.activations, new)
