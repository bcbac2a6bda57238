"""From what people have (text, chats, ids, images, tensors) to a module's keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.layout import forward_parameters, plain_module

if TYPE_CHECKING:
    from actlas.core.model import Model


class InputEncoder:
    """Encodes inputs for one model."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    def pad_id(self) -> int:
        """The id used for padding; masked, so models without one borrow the end-of-text token."""
        tokenizer = self._model.tokenizer
        for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if value is not None:
                return int(value)
        return 0

    def encode(self, inputs: Any, padding_side: str | None, truncate: bool) -> dict[str, Any]:
        """See `Model.encode`."""
        if padding_side not in (None, "left", "right"):
            raise InputError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
        if isinstance(inputs, Mapping):
            encoded = {k: self._move(v) for k, v in inputs.items()}
        elif isinstance(inputs, str):
            encoded = self._texts([inputs], padding_side, truncate)
        elif _is_chat(inputs):
            encoded = self._chats([inputs], padding_side, truncate)
        elif isinstance(inputs, Sequence) and inputs and all(isinstance(x, str) for x in inputs):
            encoded = self._texts(list(inputs), padding_side, truncate)
        elif isinstance(inputs, Sequence) and inputs and all(_is_chat(x) for x in inputs):
            encoded = self._chats(list(inputs), padding_side, truncate)
        elif isinstance(inputs, Sequence) and inputs and all(isinstance(x, int) for x in inputs):
            encoded = self._ids(torch.tensor([list(inputs)]))
        elif isinstance(inputs, Tensor) and not inputs.is_floating_point() and self._reads_tokens():
            encoded = self._ids(inputs.unsqueeze(0) if inputs.ndim == 1 else inputs)
        elif isinstance(inputs, (list, tuple)) and not inputs:
            raise InputError("the list of inputs is empty; give at least one prompt")
        else:
            encoded = self._other(inputs)
        return self._finish(encoded, padding_side, truncate)

    def _texts(self, texts: list[str], padding_side: str | None, truncate: bool) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        if tokenizer is None:
            raise ModelError(f"{self._model.name} has no tokenizer, so it cannot read text; give tensors")
        for i, text in enumerate(texts):
            if not text.strip():
                which = "the prompt" if len(texts) == 1 else f"prompt {i}"
                raise InputError(f"{which} is empty; give some text")
        rows = [tokenizer(text)["input_ids"] for text in texts]
        return self._pad(rows, padding_side, truncate)

    def _chats(self, chats: list[Any], padding_side: str | None, truncate: bool) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"{self._model.name} has no chat template; give plain text")
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return self._pad(rows, padding_side, truncate)

    def _pad(self, rows: list[list[int]], padding_side: str | None, truncate: bool) -> dict[str, Any]:
        limit = self._model.context_length
        if truncate and limit is not None:
            rows = [row[:limit] for row in rows]
        for i, row in enumerate(rows):
            if not row:
                raise InputError(f"prompt {i} has no tokens; give some text")
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
            ids[i, where] = torch.tensor(row)
            mask[i, where] = 1
        return {"input_ids": self._move(ids), "attention_mask": self._move(mask)}

    def _ids(self, ids: Tensor) -> dict[str, Any]:
        if ids.ndim != 2:
            raise InputError(f"token ids have shape {list(ids.shape)}; they must be [pos] or [batch, pos]")
        ids = ids.long()
        return {"input_ids": self._move(ids), "attention_mask": self._move(torch.ones_like(ids))}

    def _other(self, inputs: Any) -> dict[str, Any]:
        processor = self._model.processor
        if processor is not None and not isinstance(inputs, Tensor):
            return {k: self._move(v) for k, v in dict(processor(inputs, return_tensors="pt")).items()}
        if isinstance(inputs, (list, tuple)) and all(isinstance(x, Tensor) for x in inputs):
            shapes = {tuple(x.shape) for x in inputs}
            if len(shapes) != 1:
                raise InputError(
                    f"the inputs have different shapes: {', '.join(str(list(s)) for s in shapes)}"
                )
            inputs = torch.stack(list(inputs))
        if not isinstance(inputs, Tensor):
            try:
                inputs = torch.as_tensor(inputs)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{self._model.name} cannot read a {type(inputs).__name__}") from error
        if inputs.is_floating_point():
            if not bool(torch.isfinite(inputs).all()):
                raise NonFiniteError("the input holds NaN or infinite values; all must be finite")
            inputs = inputs.to(self._model.dtype)
        if self._model.kind in ("image-classifier", "image-encoder") and inputs.ndim == 3:
            inputs = inputs.unsqueeze(0)
        name = getattr(plain_module(self._model.module), "main_input_name", None)
        if name and self._model.config is not None:
            return {name: self._move(inputs)}
        return {"_args": (self._move(inputs),)}

    def _finish(self, encoded: dict[str, Any], padding_side: str | None, truncate: bool) -> dict[str, Any]:
        ids = encoded.get("input_ids")
        if not isinstance(ids, Tensor):
            return self._decoder_start(encoded)
        if ids.numel() == 0:
            raise InputError("the prompt has no tokens; give some text")
        limit = self._model.context_length
        if limit is not None and ids.shape[1] > limit:
            if not truncate:
                raise InputError(
                    f"the prompt has {ids.shape[1]} tokens; {self._model.name} has a context of {limit}"
                )
            encoded = {
                k: v[:, :limit] if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in encoded.items()
            }
        mask = encoded.get("attention_mask")
        takes_positions = "position_ids" in forward_parameters(self._model.module)
        wanted = padding_side == "left" and takes_positions and "position_ids" not in encoded
        if wanted and isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            encoded["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return self._decoder_start(encoded)

    def _decoder_start(self, encoded: dict[str, Any]) -> dict[str, Any]:
        config = self._model.config
        if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in encoded:
            return encoded
        if "decoder_input_ids" not in forward_parameters(self._model.module):
            return encoded
        start = getattr(config, "decoder_start_token_id", None)
        main = next((v for v in encoded.values() if isinstance(v, Tensor)), None)
        if start is None or main is None:
            return encoded
        ids = torch.full((main.shape[0], 1), int(start), device=main.device)
        return {**encoded, "decoder_input_ids": ids}

    def _reads_tokens(self) -> bool:
        return "input_ids" in forward_parameters(self._model.module)

    def _move(self, value: Any) -> Any:
        return value.to(self._model.device) if isinstance(value, Tensor) else value


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)
    )
