"""What each tensor of a model's output means: names, shapes, and how to read them.

    print(explain_output(model, "The capital of France is"))

Not understanding outputs is among the obstacles that *Deep Learning Model Reuse in the HuggingFace
Community* (Taraghi et al. 2024) found most often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from actlas.core.model import Model
from actlas.core.passes import CACHES

_MEANING: dict[str, str] = {
    "loss": "the training loss for the labels that were given; lower is better",
    "last_hidden_state": "the last block's output for every token, after the final norm; not a probability",
    "pooler_output": "one vector a text, made from its first token by a trained layer; for sentence "
    "similarity the mean of last_hidden_state over real tokens is usually better",
    "hidden_states": "the residual stream: the embeddings, then the output of every block",
    "attentions": "attention weights of every block; each row (query) sums to 1 over the keys it may see",
    "cross_attentions": "attention of decoder tokens over encoder tokens; each row sums to 1",
    "past_key_values": "the key-value cache: pass it to the next call with only the new token to save time",
    "cache": "the key-value cache: pass it to the next call with only the new token to save time",
    "encoder_last_hidden_state": "the encoder's output for every input token",
    "image_embeds": "one unit vector an image, in the space that it shares with texts",
    "text_embeds": "one unit vector a text, in the space that it shares with images",
    "logits_per_image": "similarity of each image to each text, scaled; softmax over texts: probabilities",
    "logits_per_text": "similarity of each text to each image, scaled; softmax over images: probabilities",
    "router_logits": "scores of the experts for each token, before softmax",
    "aux_loss": "load-balancing loss of the experts",
}
_LOGITS: dict[str, str] = {
    "causal-lm": "scores of every vocabulary entry for the NEXT token: row i predicts token i + 1; "
    "softmax over the last axis gives probabilities",
    "seq2seq": "scores of every vocabulary entry for each decoder position; softmax over the last axis gives "
    "probabilities",
    "image-classifier": "one score a class; softmax over the last axis gives probabilities, argmax the class",
    "encoder": "scores of a head on the encoder, one a class or vocabulary entry; softmax over the last axis",
}
_AXES: dict[str, tuple[str, ...]] = {
    "last_hidden_state": ("batch", "position", "width"),
    "pooler_output": ("batch", "width"),
    "hidden_states": ("batch", "position", "width"),
    "attentions": ("batch", "head", "query", "key"),
    "cross_attentions": ("batch", "head", "query", "key"),
    "encoder_last_hidden_state": ("batch", "position", "width"),
    "image_embeds": ("image", "width"),
    "text_embeds": ("text", "width"),
    "logits_per_image": ("image", "text"),
    "logits_per_text": ("text", "image"),
}


@dataclass(frozen=True)
class OutputPart:
    """One tensor (or tuple of tensors) of an output.

    Attributes:
        name: how to reach it, e.g. `"logits"` or `"hidden_states[0..30]"`.
        shape: sizes; of the first tensor, if there are several.
        axes: what each axis is, as far as it is known.
        dtype: element type.
        meaning: how to read it.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    meaning: str

    def __str__(self) -> str:
        sizes = ", ".join(f"{a} {n:,}" if a else f"{n:,}" for a, n in zip(self.axes, self.shape, strict=True))
        return f"{self.name} [{sizes}] {self.dtype}: {self.meaning}"


@dataclass(frozen=True)
class OutputExplanation:
    """What a model returned for some inputs.

    Attributes:
        returned: class of the output.
        parts: its tensors.
        example: the output of the first input in words, where that can be said.
    """

    returned: str
    parts: tuple[OutputPart, ...]
    example: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"The model returns {self.returned}:"] + [f"  {p}" for p in self.parts]
        return "\n".join([*lines, self.example] if self.example else lines)


def explain_output(model: Model, inputs: Any = None) -> OutputExplanation:
    """Run a model once and say what each tensor of its output means.

    Args:
        model: any model.
        inputs: anything `Model.encode` takes; by default a short text, or an input that fits.

    Raises:
        InputError: no input was given and none could be guessed.
    """
    if inputs is None and model.tokenizer is not None:
        inputs = "The capital of France is"
    if inputs is None:
        from actlas.measure.complexity import forward_arguments
        from actlas.report.example import example_for

        module, args, kwargs = forward_arguments(model, example_for(model).inputs, 16, 0)
        with torch.no_grad():
            output = module(*args, **kwargs)
    else:
        output = model.forward(inputs)
    parts = tuple(_parts(model, output))
    return OutputExplanation(type(output).__name__, parts, _example(model, output))


def _parts(model: Model, output: Any) -> Iterator[OutputPart]:
    if isinstance(output, Tensor):
        yield _part(model, "the tensor itself", "logits" if model.kind in _LOGITS else "", output)
    elif isinstance(output, Mapping):
        for name, value in output.items():
            yield from _value(model, str(name), value)
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _value(model, f"[{i}]", value)


def _value(model: Model, name: str, value: Any) -> Iterator[OutputPart]:
    if isinstance(value, Tensor):
        yield _part(model, name, name, value)
    elif isinstance(value, (tuple, list)) and value and all(isinstance(v, Tensor) for v in value):
        yield _part(model, f"{name}[0..{len(value) - 1}]", name, value[0])
    elif value is not None and name in CACHES:
        length = value.get_seq_length() if hasattr(value, "get_seq_length") else "?"
        yield OutputPart(name, (), (), type(value).__name__, f"{_MEANING[name]}; it holds {length} positions")
    elif isinstance(value, Mapping):
        for inner, tensor in value.items():
            yield from _value(model, f"{name}.{inner}", tensor)
    elif value is not None:
        yield OutputPart(name, (), (), type(value).__name__, "not a tensor")


def _part(model: Model, shown: str, name: str, tensor: Tensor) -> OutputPart:
    meaning = _LOGITS.get(model.kind, "") if name == "logits" else _MEANING.get(name.rpartition(".")[2], "")
    axes = _AXES.get(name.rpartition(".")[2], ())
    if name == "logits":
        text = ("batch", "position", "vocabulary")
        axes = text if tensor.dim() == 3 else ("batch", "class") if tensor.dim() == 2 else ()
    if len(axes) != tensor.dim():
        axes = ("batch", *[""] * (tensor.dim() - 1)) if tensor.dim() else ()
    dtype = str(tensor.dtype).removeprefix("torch.")
    unknown = "this architecture's own output; see its documentation"
    return OutputPart(shown, tuple(tensor.shape), axes, dtype, meaning or unknown)


def _example(model: Model, output: Any) -> str:
    """The most probable next tokens or classes of the first input."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() not in (2, 3):
        return ""
    row = logits[0, -1] if logits.dim() == 3 else logits[0]
    p = row.double().softmax(-1)
    top = p.topk(min(3, len(p)))
    if model.kind == "causal-lm" and model.tokenizer is not None:
        names = [repr(model.tokenizer.decode([int(i)])) for i in top.indices]
        return "Most probable next tokens here: " + _list(names, top.values)
    if model.kind == "image-classifier":
        labels = getattr(model.config, "id2label", None) or {}
        names = [str(labels.get(int(i), f"class {int(i)}")) for i in top.indices]
        return "Most probable classes here: " + _list(names, top.values)
    return ""


def _list(names: list[str], values: Tensor) -> str:
    return ", ".join(f"{n} ({float(v):.1%})" for n, v in zip(names, values, strict=True))
