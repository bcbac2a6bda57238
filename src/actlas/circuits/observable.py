"""Observables: a task as a linear functional of the logits.

    pronoun = Observable({" she": 1, " he": -1})
    pronoun.value(model, ["My sister said that"])     # [1], logit(she) - logit(he)
    pronoun.readout(model)                            # [d], y = W_U' n, reads the final norm's output

An observable needs no data: what it is pulled back to through the network (`propagate`) says which
directions of an activation move it.

Source: Dunefsky and Cohan 2024, "Observable Propagation" (arXiv 2312.16291), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError
from actlas.core.layout import weight_matrix
from actlas.measure.likelihood import output_logits, takes_option

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model


@dataclass(frozen=True)
class Observable:
    """Coefficients of tokens.

    Attributes:
        tokens: text (with its leading space) or token id -> coefficient.
        name: what to call it; made of the tokens by default.
    """

    tokens: Mapping[str | int, float]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InputError("an observable needs tokens; give e.g. {' she': 1, ' he': -1}")
        wrong = [(t, c) for t, c in self.tokens.items() if not math.isfinite(c) or c == 0]
        if wrong:
            raise InputError(
                f"the coefficient of {wrong[0][0]!r} is {wrong[0][1]}; it must be a number, not 0"
            )
        if not self.name:
            object.__setattr__(
                self, "name", " ".join(f"{c:+g}{str(t).strip()}" for t, c in self.tokens.items())
            )

    @classmethod
    def of_pairs(cls, pairs: PromptPairs) -> Observable:
        """Return the mean of answer minus wrong answer over a task's pairs, as one functional.

        Raises:
            InputError: answers and wrong answers are the same tokens equally often, so nothing is left.
        """
        share: dict[str | int, float] = {}
        for ids, sign in ((pairs.answer_ids, 1.0), (pairs.wrong_ids, -1.0)):
            for i in ids.tolist():
                share[i] = share.get(i, 0.0) + sign / len(pairs)
        kept = {i: c for i, c in share.items() if abs(c) > 1e-12}
        if not kept:
            raise InputError(
                f"answers and wrong answers of {pairs.task} cancel: each token is both equally often. Take"
                " pairs of one kind, or name the tokens"
            )
        return cls(kept, pairs.task)

    def ids(self, model: Model) -> tuple[Tensor, Tensor]:
        """Return the token ids int64 `[k]` and coefficients float64 `[k]`.

        Raises:
            ModelError: texts but no tokenizer.
            InputError: a text of more than one token (words that share a first piece would look alike), an id
                outside the vocabulary, or two texts that are one token.
        """
        found: dict[int, float] = {}
        head = model.unembed_module
        size = weight_matrix(head).shape[0] if head is not None else 0
        for token, coefficient in self.tokens.items():
            number = token if isinstance(token, int) else _one(model, token)
            if not 0 <= number < size:
                raise InputError(f"there is no token {number} in a vocabulary of {size}")
            if number in found:
                raise InputError(f"{token!r} is the same token as another of this observable; name it once")
            found[number] = float(coefficient)
        return torch.tensor(list(found)), torch.tensor(list(found.values()), dtype=torch.float64)

    def readout(self, model: Model) -> Tensor:
        """Return `y = W_U' n`, float64 `[d]`: it reads the output of the final norm.

        Raises:
            ModelError: the model has no output head.
            InputError: the tokens' rows cancel, so the observable is always 0.
        """
        head = model.unembed_module
        if head is None:
            raise ModelError(f"{model.name} ({model.kind}) has no output head over a vocabulary")
        ids, coefficients = self.ids(model)
        weight = weight_matrix(head).detach()
        y: Tensor = coefficients @ weight[ids.to(weight.device)].double().cpu()
        if not float(y.norm()) > 0:
            raise InputError(f"the output head's rows of {self.name} cancel, so the observable is always 0")
        scale = model.tower.logit_scale if model.tower is not None else 1.0
        return y * scale

    def of_logits(self, model: Model, logits: Tensor) -> Tensor:
        """Return the value `[...]` of logits `[..., vocab]`, float64."""
        ids, coefficients = self.ids(model)
        picked = logits[..., ids.to(logits.device)].double()
        return picked @ coefficients.to(picked.device)

    def value(self, model: Model, inputs: Any) -> Tensor:
        """Return the value after each prompt, float64 `[n]`. Installed edits apply."""
        encoded = model.encode(inputs, padding_side="left")
        options = {"logits_to_keep": 1} if takes_option(model, "logits_to_keep") else {}
        return self.of_logits(model, output_logits(model, dict(encoded), **options)[:, -1]).cpu()


def _one(model: Model, text: str) -> int:
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer; name the observable's tokens by their ids")
    ids: Sequence[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"{text!r} is {len(ids)} tokens for {model.name}; an observable needs single tokens (a"
            " leading space matters)"
        )
    return int(ids[0])
