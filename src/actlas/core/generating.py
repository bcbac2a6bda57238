"""Generating text with edits: prompts padded on the left, seeds, and one edit per row if wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass
class Generation:
    """What `Model.generate` returns.

    Attributes:
        texts: the generated text of each row (prompt left out).
        tokens: the generated ids of each row, int64 `[n]`, cut after the end-of-text token.
        prompts: the prompts as given.
        sequences: whole rows as transformers returns them, `[rows, columns]`.
    """

    texts: list[str]
    tokens: list[Tensor]
    prompts: list[str]
    sequences: Tensor


def generate(
    model: Model,
    inputs: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    num_beams: int,
    seed: int,
    use_cache: bool,
    edits_by_row: Sequence[Edit | None] | None,
    on_token: Callable[[Tensor], None] | None,
    options: dict[str, Any],
) -> Generation:
    """Generate text; see `Model.generate`, which gives the defaults."""
    _check_options(max_new_tokens, temperature, top_p, num_beams, on_token)
    if not callable(getattr(model.module, "generate", None)):
        raise ModelError(f"{model.name} ({model.kind}) does not generate text")
    encoded = model.encode(inputs, padding_side="left")
    encoded.pop("decoder_input_ids", None)
    if model.kind == "causal-lm":
        encoded.pop("position_ids", None)
        limit, length = model.context_length, encoded["input_ids"].shape[1]
        if limit is not None and length + max_new_tokens > limit:
            raise InputError(
                f"the prompt has {length} tokens and max_new_tokens is {max_new_tokens}; "
                f"{model.name} has a context of {limit}"
            )
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "use_cache": use_cache,
        "do_sample": temperature > 0,
        **options,
    }
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": options.get("top_k", 0)}
    if model.tokenizer is not None:
        settings.setdefault("pad_token_id", model._encoder.pad_id)
    settings["logits_processor"] = [*(options.get("logits_processor") or []), _Finite(model, edits_by_row)]
    if on_token is not None:
        settings["streamer"] = _Streamer(on_token)
    with ExitStack() as stack:
        if edits_by_row is not None:
            stack.enter_context(_rows(model, encoded, edits_by_row))
        stack.enter_context(torch.random.fork_rng(devices=_devices(model.device)))
        torch.manual_seed(seed)
        stack.enter_context(torch.no_grad())
        run: Callable[..., Tensor] = model.module.generate  # type: ignore[assignment]
        sequences = run(**encoded, **settings)
    return _generation(model, inputs, encoded, sequences)


def _check_options(
    max_new_tokens: int, temperature: float, top_p: float, num_beams: int, on_token: object
) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise InputError(f"temperature is {temperature:g}; it must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p:g}; it must be above 0 and at most 1")
    if num_beams < 1:
        raise InputError(f"num_beams is {num_beams}; it must be at least 1")
    if on_token is not None and num_beams > 1:
        raise InputError(f"num_beams is {num_beams}; tokens can be streamed with 1 beam only")


@contextmanager
def _rows(model: Model, encoded: dict[str, Any], edits: Sequence[Edit | None]) -> Iterator[None]:
    rows = next(v for v in encoded.values() if isinstance(v, Tensor)).shape[0]
    if len(edits) != rows:
        raise InputError(
            f"edits_by_row has {len(edits)} entries for {rows} prompts; give one for each, or None"
        )
    limited = [e.at(rows=i) for i, e in enumerate(edits) if e is not None]
    if not limited:
        yield
        return
    with model.edit(*limited):
        yield


def _generation(model: Model, inputs: Any, encoded: dict[str, Any], sequences: Tensor) -> Generation:
    prompt = encoded["input_ids"].shape[1] if model.kind == "causal-lm" else 0
    ends = set(_as_list(getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)))
    if model.tokenizer is not None and model.tokenizer.eos_token_id is not None:
        ends.add(model.tokenizer.eos_token_id)
    tokens = []
    for row in sequences[:, prompt:]:
        stops = [i for i, t in enumerate(row.tolist()) if t in ends]
        tokens.append(row[: stops[0] + 1] if stops else row)
    texts: list[str] = []
    if model.tokenizer is not None:
        texts = [model.tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
    prompts = [inputs] if isinstance(inputs, str) else [p for p in inputs if isinstance(p, str)]
    return Generation(texts, tokens, prompts if not isinstance(inputs, dict) else [], sequences)


class _Finite:
    """Stops a generation whose logits have become NaN or infinite, and says under which edits."""

    def __init__(self, model: Model, edits_by_row: Sequence[Edit | None] | None) -> None:
        self._model, self._by_row = model, edits_by_row
        self._steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._steps += 1
        if not bool(torch.isfinite(scores.amax(-1)).all()):  # NaN, +inf, or nothing left to choose from
            edits = [*self._model.installed, *(e for e in self._by_row or () if e is not None)]
            under = " + ".join(dict.fromkeys(e.describe() for e in edits))
            cause = f"under {under}; use a smaller strength" if under else "without any edit"
            raise NonFiniteError(f"the logits are NaN or infinite at new token {self._steps} {cause}")
        return scores


class _Streamer:
    """Adapts transformers' streamer protocol to a callback."""

    def __init__(self, on_token: Callable[[Tensor], None]) -> None:
        self._on_token, self._prompt = on_token, True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._on_token(value)

    def end(self) -> None:
        self._prompt = True


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [int(value)]
