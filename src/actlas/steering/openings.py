"""Openings: how likely an answer begins with certain words, and directions between two ways to begin.

    log P(opening | prompt) = sum_t log p(opening_t | prompt, opening_<t)

Only the opening's few tokens are run for every strength: the keys and values of the prompts are computed
once. That is exact for edits of the last prompt token and of what follows it, which is what `pushed` does:

    h_l <- h_l + push_l * v_l          at the last prompt token and every token of the opening
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.contrast import Contrast, read_contrast
from actlas.core.direction import Direction
from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError, ModelError
from actlas.core.passes import CACHES
from actlas.steering.controller import Push

if TYPE_CHECKING:
    from actlas.core.model import Model

REFUSING = ("I'm sorry, but I can't help with that.", "Sorry, I can't do that.", "I cannot answer that.")
COMPLYING = ("Sure, here is the answer.", "Certainly! Here is what I found.", "The answer is as follows.")


def opening_directions(
    model: Model,
    prompts: Sequence[str],
    sites: Iterable[str],
    *,
    positive: Sequence[str] = REFUSING,
    negative: Sequence[str] = COMPLYING,
) -> dict[str, Direction]:
    """Return, by site, the mean difference at the last token of `prompt + positive` and `prompt + negative`.

    Args:
        model: the model.
        prompts: whole prompts, chat template applied; they take the openings in turn.
        sites: names or patterns.
        positive, negative: openings, as many of both.

    Raises:
        InputError: no prompts, or openings that are empty or not as many on both sides.
    """
    if not prompts:
        raise InputError("directions between openings need at least one prompt")
    if not positive or len(positive) != len(negative):
        raise InputError(f"give as many openings of both kinds, not {len(positive)} and {len(negative)}")
    contrast = Contrast(
        tuple(p + positive[i % len(positive)] for i, p in enumerate(prompts)),
        tuple(p + negative[i % len(negative)] for i, p in enumerate(prompts)),
    )
    return {
        name: Direction.of(
            r, r.difference.mean(0), "mean_diff", fingerprint=model.fingerprint, data=contrast.hash
        )
        for name, r in read_contrast(model, contrast, tuple(sites)).items()
    }


def embedding_direction(
    model: Model, *, positive: Sequence[str] = REFUSING, negative: Sequence[str] = COMPLYING
) -> Tensor:
    """Return the unit vector from the mean input embedding of `negative`'s tokens to that of `positive`'s.

    This is how the released code of the weighted steering controller makes its direction; nothing says
    that input embeddings mean anything in the middle of the model, so measure it beside another one.

    Raises:
        ModelError: the model has no tokenizer or no input embedding.
    """
    embedding = getattr(model.module, "get_input_embeddings", lambda: None)()
    if model.tokenizer is None or embedding is None:
        raise ModelError(f"{model.name} has no tokenizer or no input embeddings")
    sides = []
    for phrases in (positive, negative):
        ids = [i for p in phrases for i in model.tokenizer(p, add_special_tokens=False)["input_ids"]]
        sides.append(embedding.weight[torch.tensor(ids)].detach().float().mean(0))
    difference = sides[0] - sides[1]
    unit: Tensor = difference / difference.norm().clamp_min(1e-30)
    return unit


def pushed(vectors: Mapping[str, Tensor], pushes: Tensor, *, positions: Any = None) -> Edit:
    """Return the edit that adds `pushes[:, l] * vectors[l]` to every token, each row by its own pushes.

    Args:
        vectors: by site, `[d]`.
        pushes: `[batch, L]`, in the order of `vectors`; may require gradients.
        positions: limit it, as in `edit.at`.
    """
    edit = compose(
        Push(site, vector, lambda here, row=row: pushes[:, row : row + 1])
        for row, (site, vector) in enumerate(vectors.items())
    )
    return edit if positions is None else edit.at(positions=positions)


@dataclass
class _Batch:
    index: Tensor
    last: Tensor
    mask: Tensor
    cache: Any


class OpeningScorer:
    """Scores one opening after many prompts, as often as needed.

    Args:
        model: a causal language model; edits that are installed now apply to the prompts.
        prompts: whole prompts, chat template applied.
        opening: what the answer should begin with.
        batch: prompts that are run together.

    Raises:
        InputError: no prompts, or an empty opening.
        ModelError: the model keeps no key-value cache.
    """

    def __init__(self, model: Model, prompts: Sequence[str], opening: str, batch: int = 16) -> None:
        if model.tokenizer is None:
            raise ModelError(f"{model.name} has no tokenizer")
        ids = model.tokenizer(opening, add_special_tokens=False)["input_ids"]
        if not prompts or not ids:
            raise InputError("scoring an opening needs prompts and an opening that is not empty")
        self.model, self.count = model, len(prompts)
        self.opening = torch.tensor(ids, device=model.device)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self._batches = [self._prepare(prompts, order[i : i + batch]) for i in range(0, len(order), batch)]

    def _prepare(self, prompts: Sequence[str], index: list[int]) -> _Batch:
        encoded = self.model.encode([prompts[i] for i in index], padding_side="left")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        if ids.shape[1] < 2:
            raise InputError("scoring an opening needs prompts of at least 2 tokens")
        given = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
        if "position_ids" in encoded:
            given["position_ids"] = encoded["position_ids"][:, :-1]
        if "logits_to_keep" in _parameters(self.model):
            given["logits_to_keep"] = 1
        with torch.no_grad():
            output = self.model.module(**given, use_cache=True)
        cache = next((getattr(output, n) for n in CACHES if getattr(output, n, None) is not None), None)
        if cache is None:
            raise ModelError(f"{self.model.name} keeps no key-value cache")
        return _Batch(torch.tensor(index), ids[:, -1:], mask, cache)

    @property
    def batches(self) -> list[Tensor]:
        """The numbers of the prompts of each batch."""
        return [b.index for b in self._batches]

    def logits(self, number: int, *, grad: bool = False) -> Tensor:
        """Return the logits of batch `number` at the last prompt token and the opening's but its last.

        Returns:
            `[batch, tokens of the opening, vocab]`; installed edits apply to these tokens.
        """
        held = self._batches[number]
        rest = self.opening[:-1].expand(len(held.last), -1)
        ids = torch.cat([held.last, rest], 1)
        mask = torch.cat([held.mask, torch.ones_like(rest)], 1)
        places = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        name = next(n for n in CACHES if n in _parameters(self.model))
        given = {"input_ids": ids, "attention_mask": mask, name: copy.deepcopy(held.cache)}
        if "position_ids" in _parameters(self.model):
            given["position_ids"] = places
        with torch.set_grad_enabled(grad):
            found: Tensor = self.model.module(**given, use_cache=True).logits
        return found

    def log_likelihood(self, logits: Tensor) -> Tensor:
        """Return `log P(opening | prompt)` of one batch's logits, `[batch]`."""
        log_p = torch.log_softmax(logits.float(), -1)
        own = self.opening.expand(len(logits), -1).unsqueeze(-1)
        return log_p.gather(-1, own).squeeze(-1).sum(1)

    def run(self, edit_of: Callable[[Tensor], Edit | None] | None = None) -> tuple[Tensor, Tensor]:
        """Return `P(opening | prompt)` `[n]` and the log-probabilities of the first token `[n, vocab]`.

        Args:
            edit_of: the numbers of a batch's prompts -> the edit for them; `None` for none.
        """
        likely, first = torch.empty(self.count), None
        for number, index in enumerate(self.batches):
            edit = None if edit_of is None else edit_of(index)
            if edit is None:
                logits = self.logits(number)
            else:
                with self.model.edit(edit):
                    logits = self.logits(number)
            likely[index] = self.log_likelihood(logits).exp().cpu()
            log_p = torch.log_softmax(logits[:, 0].float(), -1).cpu()
            first = torch.empty(self.count, log_p.shape[1]) if first is None else first
            first[index] = log_p
        assert first is not None
        return likely, first


def _parameters(model: Model) -> frozenset[str]:
    from actlas.core.layout import forward_parameters

    return frozenset(forward_parameters(model.module))
