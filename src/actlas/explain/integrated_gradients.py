"""Integrated gradients of any output with respect to any activation, as a lens.

    s_t = sum_c (x_tc - x'_tc) * integral_0^1 dF/dx_tc (x' + a (x - x')) da          sum_t s_t = F(x) - F(x')

F is the log probability of an answer, the difference of two, a class's logit, or any function of the
output; x the token embeddings, the image, or the activation at a site. The lens keeps the baseline x' and
the mean gradient of one input, so that `score` gives the attribution of every token of that input, and
the same linear reading of another activation of it (under an edit, say). `measurements` say by how much
the attributions miss the change of F.

For text the default baseline is the vocabulary's mean embedding with the first token kept, because the
published zero baseline does not converge in models with massive activations; see `core.answer_function`.

Source: Sundararajan, Taly and Yan 2017, "Axiomatic Attribution for Deep Networks".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.answer_function import (
    AnswerFunction,
    answer_function,
    in_float32,
    site_function,
    text_baseline,
    token_ids,
)
from actlas.core.attributions import Function, Integrated, Rule, integrate
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens, check_finite
from actlas.core.measurement import Measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

Target = str | tuple[str, str] | int | Callable[[Any], Tensor] | None


@dataclass(kw_only=True, eq=False)
class IntegratedGradients(Lens):
    """Attributions of one output of one input.

    Attributes:
        scores: float32, one attribution for each position, `[pos]` (for an image: each pixel, `[c, h, w]`).
        gradient: float32, the mean gradient along the path, of the activation's shape.
        baseline: float32, of the activation's shape.
        tokens: what the positions are, for text.
        target: what was attributed, in words.
        value, baseline_value: the target at the input and at the baseline.
        steps: points on the path.
    """

    scores: Tensor
    gradient: Tensor
    baseline: Tensor
    tokens: tuple[str, ...] = ()
    target: str = ""
    value: float = 0.0
    baseline_value: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        if self.gradient.shape != self.baseline.shape:
            raise ShapeError(
                f"gradient and baseline must have one shape, not {list(self.gradient.shape)} and "
                f"{list(self.baseline.shape)}"
            )
        check_finite("IntegratedGradients", gradient=self.gradient, baseline=self.baseline)

    @property
    def channels(self) -> int:
        return self.gradient.shape[-1]

    @property
    def error(self) -> float:
        """How far the attributions are from adding up, as a fraction of `|F(x) - F(x')|`."""
        change = self.value - self.baseline_value
        return abs(float(self.scores.double().sum()) - change) / max(abs(change), 1e-30)

    def encode(self, x: Tensor) -> Tensor:
        """Return `(x - baseline) * gradient`, of the shape `[..., pos, d]` of the activation."""
        if x.shape[-self.gradient.ndim :] != self.gradient.shape:
            raise ShapeError(
                f"these attributions are of one input, {list(self.gradient.shape)}; x is {list(x.shape)}"
            )
        return (x - self.baseline.to(x)) * self.gradient.to(x)

    def score(self, x: Tensor) -> Tensor:
        """Return the attribution of every position, `[..., pos]`."""
        codes = self.encode(x)
        return codes.sum(-1) if self.tokens else codes

    def top(self, n: int = 5) -> list[tuple[str, float]]:
        """Return the `n` tokens of largest attribution, by size, with their scores.

        Raises:
            InputError: the input had no tokens.
        """
        if not self.tokens:
            raise InputError("this input has no tokens; read scores")
        order = self.scores.abs().argsort(descending=True)[:n].tolist()
        return [(self.tokens[i], float(self.scores[i])) for i in order]


def integrated_gradients(
    model: Model,
    inputs: Any,
    target_fn: Target = None,
    baseline: Any = "auto",
    steps: int = 64,
    *,
    site: str | None = None,
    rule: Rule = "gauss",
    keep_first: bool = True,
    batch: int = 16,
) -> IntegratedGradients:
    """Attribute one number of a model's output to an activation.

    Args:
        model: any model; a copy in float32 is used for one in half precision.
        inputs: one input, anything `encode` takes.
        target_fn: what is attributed. For a language model, an answer (its log probability in nats), two
            answers (the difference of theirs), or `None` for the most probable next token. A class's
            number, or `None` for the most probable one, for a classifier. Or a function from the output
            of b rows to `[b]`.
        baseline: `"mean"`, `"zero"` or `"pad"` for text (see `text_baseline`), a number, or a tensor that
            broadcasts against the activation. `"auto"` is `"mean"` for text and 0 otherwise.
        steps: points on the path.
        site: which activation; default the token embeddings, or the input itself where it is numbers.
        rule, batch: see `integrate`.
        keep_first: leave the first token out of the path; text baselines only.

    Raises:
        InputError: several inputs, an answer that adds no token, a target that has no gradient.
    """
    encoded = model.encode(inputs)
    text = isinstance(encoded.get("input_ids"), Tensor)
    answered = isinstance(target_fn, (str, tuple)) or (target_fn is None and model.kind == "causal-lm")
    ids = encoded["input_ids"][0] if text else None
    if text and len(encoded["input_ids"]) != 1:
        raise InputError(f"attributions are for one input at a time, not {len(encoded['input_ids'])}")
    where = site or ("embed" if text and model.layout is not None else "input")
    if answered:
        if ids is None:
            raise InputError(f"{model.name} reads no text; give a class's number or a function as target")
        prompt = inputs if isinstance(inputs, str) else ids
        answer, function, said = _answers(model, prompt, target_fn, where)
        x, ids = answer.x, answer.ids
    else:
        function_of, said = _target(model, encoded, target_fn)
        if where == "input":
            x, function = _input_function(model, encoded, function_of)
        else:
            x, function = site_function(model, encoded, function_of, where)
    start = _baseline(model, baseline, ids, where, keep_first)
    found = integrate(function, x, start, steps=steps, rule=rule, batch=batch)
    return _lens(model, found, x, start, ids, where, said)


def _answers(
    model: Model, prompt: str | Tensor, target: Any, site: str
) -> tuple[AnswerFunction, Function, str]:
    """Return the function of one answer, or of the difference of two."""
    if target is None:
        ids = token_ids(model, prompt) if isinstance(prompt, str) else prompt
        top = model.logits({"input_ids": ids.unsqueeze(0)})[0, -1].argmax().reshape(1)
        made = answer_function(model, ids, [top.to(ids.device)], site=site)
        return made, lambda z: made.function(z)[:, 0], f"log p({model.token_strings(top)[0]!r})"
    if isinstance(target, str):
        made = answer_function(model, prompt, target, site=site)
        return made, lambda z: made.function(z)[:, 0], f"log p({target!r})"
    if len(target) != 2:
        raise InputError(f"a target of answers is one or two of them, not {len(target)}")
    made = answer_function(model, prompt, list(target), site=site)
    said = f"log p({target[0]!r}) - log p({target[1]!r})"
    return made, lambda z: made.function(z)[:, 0] - made.function(z)[:, 1], said


def _target(model: Model, encoded: dict[str, Any], target: Any) -> tuple[Callable[[Any], Tensor], str]:
    if callable(target):
        return target, getattr(target, "__name__", "a function of the output")
    logits = model.logits(encoded)
    if logits.ndim != 2:
        raise InputError(f"{model.name} gives {list(logits.shape)}; say what to attribute with a function")
    number = int(logits[0].argmax()) if target is None else target
    if not isinstance(number, int) or not 0 <= number < logits.shape[-1]:
        raise InputError(f"the target is {target!r}; classes are 0 to {logits.shape[-1] - 1}")

    def chosen(output: Any) -> Tensor:
        found: Tensor = output if isinstance(output, Tensor) else output.logits
        return found[:, number]

    return chosen, f"logit of class {number}"


def _input_function(
    model: Model, encoded: dict[str, Any], target: Callable[[Any], Tensor]
) -> tuple[Tensor, Function]:
    """Return the input tensor itself, and the target as a function of it."""
    wide = in_float32(model)
    args = list(encoded.get("_args", ()))
    key: Any = next((k for k, v in encoded.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if key is None and not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
        raise InputError(f"{model.name}'s input holds no numbers to attribute to; name a site")
    x = encoded[key] if key is not None else args[0]
    if len(x) != 1:
        raise InputError(f"attributions are for one input at a time, not {len(x)}")

    def function(z: Tensor) -> Tensor:
        given = {**encoded, key: z} if key is not None else {**encoded, "_args": (z, *args[1:])}
        given = {
            k: v.expand(len(z), *v.shape[1:]) if isinstance(v, Tensor) and len(v) == 1 and k != key else v
            for k, v in given.items()
        }
        return target(wide._call(given))

    return x[0].float(), function


def _baseline(model: Model, given: Any, ids: Tensor | None, site: str, keep_first: bool) -> Any:
    if given == "auto" if isinstance(given, str) else given is None:
        given = "mean" if ids is not None else 0.0
    if not isinstance(given, str):
        return given
    if ids is None:
        raise InputError(f"the baseline {given!r} is for text; give a number or a tensor")
    return text_baseline(model, ids, given, keep_first=keep_first, site=site)  # type: ignore[arg-type]


def _lens(
    model: Model, found: Integrated, x: Tensor, start: Any, ids: Tensor | None, site: str, target: str
) -> IntegratedGradients:
    values = found.values.cpu()
    tokens = tuple(model.token_strings(ids)) if ids is not None and model.tokenizer is not None else ()
    scores = values.flatten(1).sum(-1) if ids is not None else values
    if ids is not None and not tokens:
        tokens = tuple(str(int(i)) for i in ids)
    error = Measurement(
        "completeness error",
        found.error,
        "fraction",
        1,
        better="lower",
        note=f"{abs(found.gap):.3g} of a change of {found.value - found.baseline_value:.4g}",
        details={"gap": found.gap, "steps": found.steps},
    )
    return IntegratedGradients(
        site=site,
        fingerprint=model.fingerprint,
        measurements=(error,),
        scores=scores.float(),
        gradient=found.gradient.float().cpu(),
        baseline=torch.as_tensor(start, dtype=torch.float32).expand_as(x).clone().cpu(),
        tokens=tokens,
        target=target,
        value=found.value,
        baseline_value=found.baseline_value,
        steps=found.steps,
    )
