"""Run the last token of many prompts again and again, at the price of one token a prompt.

    runs = LastToken(model, prompts, "blocks.19.mlp.act")
    runs.values                                   # [n, d_mlp], the activation of each last token
    logits = runs.logits(runs.values + 0.1)       # [n, vocab], only block 19 and later, only one token

A patch at the last token leaves every earlier token as it was, and with a causal mask these never look at
it. So their keys and values are computed once and kept, the blocks before the site are skipped
(`core.splitting`), and one run costs the last token's share of the blocks behind the site. The kept keys
and values are never written to, so that runs do not depend on one another and gradients pass through
(`SharedRun` in `circuits.prefix` reruns any columns, without gradients).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.prefix import KeysValues, cache_name
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import forward_parameters
from actlas.core.passes import CACHES
from actlas.core.splitting import SplitState, split_at
from actlas.measure.likelihood import takes_option

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.trace import Trace


class LastToken:
    """Prompts of which only the last token is run.

    Args:
        model: a causal language model with a key-value cache.
        inputs: texts, or arguments `[n, pos]` that are padded on the left.
        site: one site with channels for every token.

    Attributes:
        model, site: as given.
        values: `[n, ...features]`, what the model computes at the site for each last token.

    Raises:
        ModelError: not a causal language model with a cache.
        InputError: padding at the end, or a prompt of one token.
    """

    def __init__(self, model: Model, inputs: Any, site: str) -> None:
        if model.kind != "causal-lm" or cache_name(model) is None:
            raise ModelError(
                f"{model.name} is a model of kind {model.kind}; a causal-lm with a key-value cache is needed"
            )
        encoded = model.encode(inputs, padding_side="left")
        ids = encoded["input_ids"]
        mask = encoded.get("attention_mask", torch.ones_like(ids))
        if not bool(mask[:, -1].all()):
            raise InputError("a prompt ends with padding; pad on the left, so that last tokens stand last")
        if ids.shape[1] < 2 or int(mask.sum(1).min()) < 2:
            raise InputError(f"prompt {int(mask.sum(1).argmin())} has one token; give prompts of at least 2")
        self.model = model
        places = (mask.cumsum(1) - 1).clamp_min(0)
        first = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
        self._last = {"input_ids": ids[:, -1:], "attention_mask": mask}
        if "position_ids" in forward_parameters(model.module):
            first["position_ids"], self._last["position_ids"] = places[:, :-1], places[:, -1:]
        options = {"logits_to_keep": 1} if takes_option(model, "logits_to_keep") else {}
        with torch.no_grad():
            output = model._call(first, use_cache=True, **options)
        found = next((c for n in CACHES if (c := getattr(output, n, None)) is not None), None)
        kept = KeysValues.of(model, found, ids.shape[1] - 1)
        if kept is None:
            raise ModelError(
                f"{model.name} keeps no keys and values of whole prompts (a sliding window, perhaps); use "
                "shorter prompts"
            )
        self._kept = kept
        self._cut(site)

    def _cut(self, site: str) -> None:
        self.site: Site = self.model.resolve(site)[0]
        self._head, self._tail = split_at(self.model, site)
        self._state = self._head(self._encoded(None))

    @property
    def values(self) -> Tensor:
        """What the model computes at the site for each last token, `[n, ...features]`."""
        return self._state.activation[:, 0]

    def at(self, site: str) -> LastToken:
        """Return the same prompts cut at another site; what was computed for earlier tokens is shared."""
        moved = copy.copy(self)
        moved._cut(site)
        return moved

    def take(self, rows: Tensor) -> LastToken:
        """Return some of the prompts, int64 rows; nothing of them is computed again but the last token."""
        moved = copy.copy(self)
        moved._last = {name: value[rows] for name, value in self._last.items()}
        moved._kept = KeysValues(self._kept.name, [(k[rows], v[rows]) for k, v in self._kept.layers])
        moved._cut(self.site.name)
        return moved

    def __len__(self) -> int:
        return int(self._last["input_ids"].shape[0])

    def logits(
        self, values: Tensor | None = None, *, rows: Tensor | None = None, grad: bool = False
    ) -> Tensor:
        """Return the logits `[n, vocab]` after each prompt, with these activations at the site.

        Args:
            values: `[n, ...features]`; `None`: the model's own.
            rows: int64, which prompts (repeats are fine: one prompt under several patches); `None`: all.
            grad: keep the graph from `values` to the logits.
        """
        state = self._at(rows)
        given = state.activation if values is None else values.unsqueeze(1)
        logits: Tensor = self._tail(state, given, grad=grad).logits
        return logits[:, -1]

    def full(self) -> Tensor:
        """Return the logits `[n, vocab]` of the last tokens from the first block on; installed edits see
        only these tokens."""
        with torch.no_grad():
            logits: Tensor = self.model._call(self._encoded(None)).logits
        return logits[:, -1]

    def trace(
        self,
        sites: str | Site | Iterable[str | Site],
        *,
        edit: Edit | None = None,
        grad: bool = False,
        stop: bool = True,
    ) -> Trace:
        """Read other sites at the last token; `edit` sees only that token. See `Model.trace`."""
        with self.model.edit(edit) if edit is not None else nullcontext():
            return self.model._run(self._encoded(None), self.model.resolve(sites), grad=grad, stop=stop)

    def _encoded(self, rows: Tensor | None) -> dict[str, Any]:
        """Return the last tokens' arguments, with a cache that is read only."""
        n = len(self)
        chosen = torch.arange(n, device=self.model.device) if rows is None else rows
        last = self._last if rows is None else {name: value[rows] for name, value in self._last.items()}
        columns = self._last["attention_mask"].shape[1] - 1
        return {**last, self._kept.name: self._kept.cache(chosen, columns)}

    def _at(self, rows: Tensor | None) -> SplitState:
        state = replace(self._state, encoded=self._encoded(rows))
        if rows is None:
            return state
        stream = None if state.stream is None else state.stream[rows]
        return replace(state, activation=state.activation[rows], stream=stream)
