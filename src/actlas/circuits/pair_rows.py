"""One pair of prompts as text: its token ids and answers, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.layout import forward_parameters
from actlas.data.single_token import Tokens
from actlas.data.task_items import TaskItem

if TYPE_CHECKING:
    from actlas.core.model import Model


def pair_row(
    model: Model, item: TaskItem | Mapping[str, str], number: int, variant: str | None
) -> tuple[str, str, int, int, TaskItem | None]:
    """Return (clean, corrupted, answer id, wrong id, item) of one item or record."""
    tokens = Tokens(model.tokenizer)
    if isinstance(item, Mapping):
        missing = [k for k in ("clean", "corrupt", "answer", "wrong") if not item.get(k)]
        if missing:
            raise InputError(f"pair {number} lacks {missing[0]!r}; it needs clean, corrupt, answer and wrong")
        clean, corrupt = str(item["clean"]), str(item["corrupt"])
        ids = [_one(model, tokens, clean, str(item[k]), number) for k in ("answer", "wrong")]
        if ids[0] == ids[1]:
            raise InputError(f"pair {number}: the answer and the wrong answer are both {item['answer']!r}")
        return clean, corrupt, ids[0], ids[1], None
    other = item.counterfactual if variant is None else item.variants.get(variant)
    if other is None:
        named = f"the variants {', '.join(item.variants) or '(none)'}" if variant else "no counterfactual"
        raise InputError(f"item {item.id!r} has {named}, so there is nothing to patch from; use another task")
    answer = (
        item.answer_id
        if item.answer_id is not None
        else _one(model, tokens, item.prompt, item.answer, number)
    )
    wrong = other.answer_id
    if wrong is None:
        wrong = _one(model, tokens, item.prompt, other.answer, number)
    if wrong == answer:
        wrong = (
            item.wrong_ids[0] if item.wrong_ids else _one(model, tokens, item.prompt, item.wrong[0], number)
        )
    return item.prompt, other.prompt, answer, wrong, item


def _one(model: Model, tokens: Tokens, prompt: str, answer: str, number: int) -> int:
    found = tokens.one(prompt, answer)
    if found is None:
        pieces = model.tokenizer.convert_ids_to_tokens(list(tokens.ids(answer)))
        raise InputError(
            f"pair {number}: the answer {answer!r} must be one token after its prompt, it is {pieces};"
            " answers that share a first piece would look perfect"
        )
    return found


def check_lengths(model: Model, clean: Sequence[str], corrupt: Sequence[str]) -> None:
    for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)):
        for text in (a, b):
            if not text.strip():
                raise InputError(f"a prompt of pair {i} is empty; give some text")
        ids = [model.tokenizer(text)["input_ids"] for text in (a, b)]
        if len(ids[0]) != len(ids[1]):
            raise InputError(
                f"the prompts of pair {i} have {len(ids[0])} and {len(ids[1])} tokens; they must have equally"
                " many, because activations are patched position by position"
            )
        if ids[0] == ids[1]:
            raise InputError(
                f"the prompts of pair {i} are the same, so there is nothing to patch: {a[:60]!r}"
            )


def encode_left(model: Model, texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = model.encode(list(texts), padding_side="left")
    return with_positions(model, {k: encoded[k] for k in ("input_ids", "attention_mask")})


def with_positions(model: Model, encoded: dict[str, Any]) -> dict[str, Tensor]:
    if "position_ids" in forward_parameters(model.module):
        encoded["position_ids"] = (encoded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return encoded
