"""Prompts with the texts that may follow them, as one padded batch, and what a model makes of them.

    rows = continuations(model, ["The capital of France is"], [" Paris"])
    rows.greedy(model)          # [True]: greedy decoding would say exactly this

Prompts are padded on the left and continuations on the right, so that the prompt fills the same leading
columns of every row. Edits that decide on the prompt and then hold (gates per sequence, side memories) are
told which columns are the prompt (`as_generation`), so one pass over prompt and continuation gives the
decisions, and the tokens, that generating would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.layout import forward_parameters

if TYPE_CHECKING:
    from actlas.core.model import Model

Chat = Sequence[Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class Continuations:
    """A batch of prompts, each with what follows.

    Attributes:
        inputs: the module's arguments.
        prompt_mask: bool `[rows, prompt columns]`, True at real tokens.
        targets: int64 `[rows, width]`, the tokens that follow; -100 beyond the end of a row.
    """

    inputs: dict[str, Tensor]
    prompt_mask: Tensor
    targets: Tensor

    @property
    def columns(self) -> Tensor:
        """The columns whose logits predict the targets, int64 `[width]`."""
        start = self.prompt_mask.shape[1] - 1
        return torch.arange(start, start + self.targets.shape[1], device=self.targets.device)

    @property
    def real(self) -> Tensor:
        """Which targets are tokens, bool `[rows, width]`."""
        return self.targets >= 0

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the logits that predict the targets, `[rows, width, vocab]`, from all or only these."""
        return logits if logits.shape[1] == self.targets.shape[1] else logits[:, self.columns]

    def losses(self, predictions: Tensor) -> Tensor:
        """Return the negative log-likelihood of each target, `[rows, width]` in nats, 0 beyond the end."""
        flat = torch.nn.functional.cross_entropy(
            predictions.float().flatten(0, 1), self.targets.flatten(), reduction="none", ignore_index=-100
        )
        return flat.view(self.targets.shape)

    def logits(self, model: Model) -> Tensor:
        """Run the model without gradients and return the logits that predict the targets.

        Raises:
            NonFiniteError: NaN or infinity among them.
        """
        options: dict[str, Any] = {"use_cache": False} if _takes(model, "use_cache") else {}
        if _takes(model, "logits_to_keep"):
            options["logits_to_keep"] = self.columns
        with as_generation(model, self.prompt_mask):
            found = self.predictions(model.forward(self.inputs, **options).logits)
        if not bool(torch.isfinite(found[self.real]).all()):
            raise NonFiniteError(
                f"the logits of {model.name} hold NaN or infinity; lower the edit's strength"
            )
        return found

    def greedy(self, model: Model) -> Tensor:
        """Return whether greedy decoding gives exactly these tokens, bool `[rows]`."""
        return self.agree(self.logits(model))

    def agree(self, predictions: Tensor) -> Tensor:
        """Return whether every target is the likeliest token of its place, bool `[rows]`."""
        return ((predictions.argmax(-1) == self.targets) | ~self.real).all(1)


def continuations(
    model: Model, prompts: Sequence[str | Chat], follow: Sequence[str | Sequence[int]]
) -> Continuations:
    """Return prompts with what follows each, as one batch.

    Args:
        model: a causal language model with a tokenizer.
        prompts: texts, none empty; or chats, whose continuation is the answer.
        follow: for each prompt the text that follows it directly (with its leading space), or its tokens.

    Raises:
        ModelError: not a causal language model with a tokenizer.
        InputError: lists of different lengths, an empty prompt, or a continuation without tokens.
    """
    if model.kind != "causal-lm" or model.tokenizer is None:
        raise ModelError(f"{model.name} is of kind {model.kind}; a causal-lm with a tokenizer is needed")
    if len(prompts) != len(follow) or not prompts:
        raise InputError(
            f"there are {len(prompts)} prompts and {len(follow)} continuations; give as many, >= 1"
        )
    encoded = model.encode(list(prompts), padding_side="left")
    mask = encoded["attention_mask"].bool()
    after = [
        list(f) if not isinstance(f, str) else following(model, p, f)
        for p, f in zip(prompts, follow, strict=True)
    ]
    for prompt, ids in zip(prompts, after, strict=True):
        if not ids:
            raise InputError(f"nothing follows the prompt {str(prompt)[-60:]!r}; give at least one token")
    width = max(map(len, after))
    targets = torch.full((len(after), width), -100)
    for i, ids in enumerate(after):
        targets[i, : len(ids)] = torch.tensor(ids)
    targets = targets.to(mask.device)
    real = torch.cat([mask, targets >= 0], 1)
    whole = torch.cat([encoded["input_ids"], targets.clamp_min(0)], 1)
    inputs = {"input_ids": whole, "attention_mask": real.long()}
    return Continuations(model.encode(inputs, padding_side="left"), mask, targets)


def following(model: Model, prompt: str | Chat, text: str) -> list[int]:
    """Return the tokens that a text adds after a prompt; its own where it changes the prompt's last token."""
    tokenizer = model.tokenizer
    if not isinstance(prompt, str):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    before, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, prompt + text))
    if whole[: len(before)] == before:
        return list(whole[len(before) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def as_generation(model: Model, prompt_mask: Tensor) -> Iterator[None]:
    """Run passes as if the columns after the prompt had been generated; installed edits see it so.

    Args:
        model: the model whose installed edits are told.
        prompt_mask: bool `[rows, prompt columns]`, True at real tokens.
    """
    with ExitStack() as stack:
        for installation in model._installations:
            stack.enter_context(installation.generating(prompt_mask.shape[0], prompt_mask))
        yield


def _takes(model: Model, option: str) -> bool:
    return option in forward_parameters(model.module)
