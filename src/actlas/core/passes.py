"""What an edit may know about the forward pass it runs in.

Under `generate` with a KV cache a pass sees one token of each row, possibly behind padding, possibly
with beams of one request in neighbouring rows. A `Pass` says, for every token of the running pass,
which request it belongs to, which position it has among the real tokens of its sequence, and whether
it belongs to the prompt or was generated. With and without a cache, padded and alone, a token gets
the same answers, and that is why edits give the same tokens in all these cases.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError


@dataclass
class Generation:
    """State that lives as long as one call of `generate`.

    Attributes:
        requests: number of prompts (beams and returned sequences multiply the batch later).
        prompt_mask: bool `[requests, columns]`, True at real prompt tokens; `None` until known.
        memory: what sequence-level gates decided on the prompt, by edit.
    """

    requests: int | None = None
    prompt_mask: Tensor | None = None
    memory: dict[Any, Tensor] = field(default_factory=dict)


@dataclass
class Pass:
    """One forward pass of one tower.

    Attributes:
        batch: rows in this pass.
        length: tokens per row in this pass, or `None` for inputs that are not tokens.
        tokens: ids `[batch, length]`, or `None`.
        mask: bool `[batch, length]`, True at real tokens, or `None` if all are real.
        past: columns that lie in the cache already.
        full_mask: bool `[batch, past + length]`, or `None` if all are real.
        generation: the state of the running `generate`, or `None`.
    """

    batch: int
    length: int | None
    tokens: Tensor | None
    mask: Tensor | None
    past: int
    full_mask: Tensor | None
    generation: Generation | None
    values: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def repeats(self) -> int:
        """How many rows of the batch belong to one request (beams, returned sequences)."""
        if self.generation is None or not self.generation.requests:
            return 1
        return max(self.batch // self.generation.requests, 1)

    def rows(self, device: torch.device) -> Tensor:
        """Return the request that each row belongs to, `[batch]`."""
        return torch.arange(self.batch, device=device) // self.repeats

    def prompt_columns(self) -> int:
        """How many leading columns belong to the prompt."""
        if self.generation is not None and self.generation.prompt_mask is not None:
            return self.generation.prompt_mask.shape[1]
        if self.past:
            return self.past
        return self.length or 0

    def prompt_mask(self, device: torch.device) -> Tensor:
        """Return which prompt columns are real tokens, bool `[batch, prompt columns]`."""
        n = self.prompt_columns()
        state = self.generation
        if state is not None and state.prompt_mask is not None:
            return state.prompt_mask.to(device).repeat_interleave(self.repeats, dim=0)
        if self.full_mask is not None:
            return self.full_mask[:, :n].to(device)
        return torch.ones(self.batch, n, dtype=torch.bool, device=device)

    def positions(self, device: torch.device, everything: bool = False) -> Tensor:
        """Return each token's position among the real tokens of its row.

        Args:
            device: where.
            everything: for all columns so far (the keys of attention) instead of this pass's tokens.

        Returns:
            int64 `[batch, length]` (or `[batch, past + length]`); padding has -1.
        """
        if self.length is None:
            raise InputError("this edit is limited to positions, but the model's input has no token axis")
        columns = torch.arange(self.past + self.length, device=device)
        prompt = self.prompt_mask(device)
        n = prompt.shape[1]
        in_prompt = torch.where(prompt, prompt.cumsum(1) - 1, -1)
        after = prompt.sum(1, keepdim=True) + (columns - n).unsqueeze(0)
        whole = after.clone()
        upto = min(n, columns.shape[0])
        whole[:, :upto] = in_prompt[:, :upto]
        if (
            self.generation is None
            and self.full_mask is not None
            and self.full_mask.shape[1] == columns.shape[0]
        ):
            real = self.full_mask.to(device)
            whole = torch.where(real, real.cumsum(1) - 1, -1)
        return whole if everything else whole[:, self.past :]

    def generated(self, device: torch.device) -> Tensor:
        """Return which tokens of this pass were generated, bool `[length]`."""
        if self.length is None:
            raise InputError("this edit is limited to a phase, but the model's input has no token axis")
        columns = torch.arange(self.past, self.past + self.length, device=device)
        return columns >= self.prompt_columns()

    def real(self, device: torch.device) -> Tensor:
        """Return which tokens of this pass are real (not padding), bool `[batch, length]`."""
        assert self.length is not None
        if self.mask is not None:
            return self.mask.to(device)
        return torch.ones(self.batch, self.length, dtype=torch.bool, device=device)


#: What models call their key-value cache: transformers up to 5.23, and from 5.24 on.
CACHES = ("past_key_values", "cache")


class PassReader:
    """Turns the arguments of a tower's forward call into a Pass."""

    def __init__(self, root: nn.Module) -> None:
        self._signature = inspect.signature(type(root).forward)
        self._root = root

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], generation: Generation | None) -> Pass:
        """Return the Pass that these arguments describe."""
        try:
            bound = self._signature.bind_partial(self._root, *args, **kwargs).arguments
        except TypeError:
            bound = {}
        bound = {**bound, **bound.get("kwargs", {})}
        tokens = bound.get("input_ids")
        tokens = tokens if isinstance(tokens, Tensor) and not tokens.is_floating_point() else None
        embeds = bound.get("inputs_embeds")
        main = tokens if tokens is not None else embeds
        if not isinstance(main, Tensor):
            first = next((v for v in [*args, *kwargs.values()] if isinstance(v, Tensor)), None)
            return Pass(
                first.shape[0] if first is not None and first.ndim else 1,
                None,
                None,
                None,
                0,
                None,
                generation,
            )
        batch, length = main.shape[0], main.shape[1]
        past = _cached(next((bound[name] for name in CACHES if bound.get(name) is not None), None))
        full = bound.get("attention_mask")
        full_mask = None
        if isinstance(full, Tensor) and full.ndim == 2:
            full_mask = full.bool()
            if full_mask.shape[1] < past + length:
                ones = full_mask.new_ones(batch, past + length - full_mask.shape[1])
                full_mask = torch.cat([ones, full_mask], 1)
            full_mask = full_mask[:, : past + length]
        mask = full_mask[:, past:] if full_mask is not None else None
        if generation is not None:
            if generation.requests is None:
                generation.requests = batch
            if generation.prompt_mask is None:
                first_mask = mask if mask is not None else torch.ones(batch, length, dtype=torch.bool)
                generation.prompt_mask = first_mask[:: max(batch // generation.requests, 1)]
        return Pass(batch, length, tokens, mask, past, full_mask, generation)


def _cached(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, (tuple, list)) and cache and cache[0] is not None:
        return int(cache[0][0].shape[-2])
    return 0
