"""What KV blocks need of a model: one row run behind a cache, and what makes a cache valid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError
from actlas.core.rotary import Rotary, rotary_of

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model


def run(model: Model, ids: Sequence[int], positions: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
    """Run one row of tokens; return logits `[tokens, vocabulary]` and the grown cache."""
    from transformers import DynamicCache

    row = torch.tensor([list(ids)], device=model.device)
    where = torch.tensor([list(positions)], device=model.device)
    past = DynamicCache() if cache is None else cache
    output = model.module(input_ids=row, position_ids=where, past_key_values=past, use_cache=True)
    return output.logits[0], output.past_key_values


def stack(model: Model, cache: Any, n: int) -> tuple[Tensor, Tensor]:
    """Return a copy of the keys and values of a cache, `[layers, kv heads, tokens, head width]` each."""
    layers = getattr(cache, "layers", ())
    held = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in layers]
    if not held or any(k is None or v is None or k.ndim != 4 or k.shape[2] != n for k, v in held):
        raise ModelError(
            f"{model.name} does not keep keys and values of all {n} tokens in all blocks "
            "(a sliding or hybrid cache), so they cannot be stored"
        )
    keys = torch.stack([k[0] for k, _ in held if k is not None])
    return keys.detach().clone(), torch.stack([v[0] for _, v in held if v is not None]).detach().clone()


def rotation(model: Model) -> Rotary | None:
    """Return the model's rotation, or `None` where keys cannot be moved."""
    try:
        return rotary_of(model)
    except ModelError:
        return None


def installed_edits(model: Model) -> tuple[str, ...]:
    """Return descriptions of the installed edits, each with a digest of what it holds."""
    return tuple(f"{e.describe()} [{_digest(e)}]" for e in model.installed)


def _digest(edit: Edit) -> str:
    record, tensors = edit._record()
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:12]


def one_row(model: Model, text: Any) -> tuple[int, ...]:
    """Return the ids of one text, chat or row of ids."""
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} ({model.kind}) is not a decoder, so it has no reusable cache")
    ids = model.encode(list(text) if isinstance(text, tuple) else text)["input_ids"]
    if ids.shape[0] != 1:
        raise InputError(f"a block holds one text, not {ids.shape[0]}")
    return tuple(ids[0].tolist())


def more_ids(model: Model, more: str | Sequence[int]) -> tuple[int, ...]:
    """Return the ids of text that continues something, without special tokens."""
    if isinstance(more, str):
        if model.tokenizer is None:
            raise ModelError(f"{model.name} has no tokenizer; give token ids")
        more = model.tokenizer.encode(more, add_special_tokens=False)
    if not len(more):
        raise InputError("no token was given to run behind the block; give some text")
    return tuple(int(i) for i in more)


def check_context(model: Model, needed: int) -> None:
    """Raise if so many positions are more than the model's context."""
    limit = model.context_length
    if limit is not None and needed > limit:
        raise InputError(f"{needed} positions are needed, but {model.name} has a context of {limit}")
