"""What a language model answers, as a function of an activation; and texts with tokens erased.

    answer = answer_function(model, "The capital of France is", [" Paris", " Rome"])
    found = integrate_each(answer.function, answer.x, text_baseline(model, answer.ids), steps=64)
    found[0].values.sum(-1)              # one number a token: what it adds to log p(" Paris")

What makes a path integral hard in a language model is its first token. Its massive activation, on which the
attention of all later tokens rests, appears and disappears abruptly on the way to a zero embedding: in
`smollm2` 64 points leave gaps of half of F(x) - F(x') or more. So `text_baseline` leaves the first token
where it is (its attribution is 0) and moves the others to the mean embedding of the vocabulary, where 64
points leave about 1%; the published zero baseline is one option away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.attributions import Function, Integrated, Rule, integrate_each
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.layout import forward_parameters
from actlas.core.splitting import SplitState, split_at

if TYPE_CHECKING:
    from actlas.core.model import Model

Replacement = Literal["pad", "mask"]
BaselineKind = Literal["mean", "zero", "pad"]


@dataclass(frozen=True, eq=False)
class AnswerFunction:
    """Log probabilities of continuations as a function of the activation at a site.

    Attributes:
        x: the activation of the text, `[pos, ...]`, float32.
        function: from `[b, pos, ...]` to `[b, k]`, one log probability (nats) for each continuation.
        ids: token ids of what the model reads, int64 `[pos]`.
        prompt_length: how many of them belong to the prompt.
    """

    x: Tensor
    function: Function
    ids: Tensor
    prompt_length: int


def answer_function(
    model: Model, prompt: str | Tensor, answers: Sequence[str | Tensor] | str, *, site: str = "embed"
) -> AnswerFunction:
    """Return log p(answer | prompt) as a function of an activation.

    Args:
        model: a causal language model; a copy in float32 is made of one in half precision.
        prompt: text, or token ids `[pos]`.
        answers: one continuation or several that share all but their last token (for one token each:
            any), as text that follows the prompt directly, or as token ids.
        site: where the activation is varied; `"embed"` is what enters the first block.

    Raises:
        InputError: an answer that adds no token, or answers that would need passes of their own.
        ModelError: the model predicts no tokens.
    """
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is a {model.kind}; answers need a causal language model")
    model = in_float32(model)
    start = prompt if isinstance(prompt, Tensor) else token_ids(model, prompt)
    wanted = [answers] if isinstance(answers, str) else list(answers)
    tails = [a if isinstance(a, Tensor) else added_ids(model, prompt, a) for a in wanted]
    first = tails[0][:-1]
    if any(not torch.equal(t[:-1], first) for t in tails):
        raise InputError("the answers differ before their last token; attribute them one at a time")
    ids = torch.cat([start, first])
    head, tail = split_at(model, site)
    state = head({"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)})
    chosen = torch.stack(tails)
    keep = len(first) + 1
    options = {"logits_to_keep": keep} if "logits_to_keep" in forward_parameters(model.module) else {}

    def function(x: Tensor) -> Tensor:
        logits = _logits(tail(state, x, grad=torch.is_grad_enabled(), **options))[:, -keep:]
        log_p = _wide(logits).log_softmax(-1)
        rows = []
        for ids_of_one in chosen:
            index = ids_of_one.to(log_p.device).reshape(1, -1, 1).expand(len(log_p), -1, 1)
            rows.append(log_p.gather(-1, index).squeeze(-1).sum(-1))
        return torch.stack(rows, dim=-1)

    return AnswerFunction(_wide(state.activation[0]), function, ids, len(start))


def attribute_pair(
    model: Model,
    one: Tensor,
    other: Tensor,
    *,
    steps: int = 64,
    baseline: BaselineKind = "mean",
    rule: Rule = "gauss",
    keep_first: bool = True,
    whole_answer: bool = True,
) -> tuple[list[Integrated], list[Tensor]]:
    """Attribute the log probabilities of two answers to the tokens before them.

    Args:
        model: a causal language model.
        one, other: token ids of two texts; their answers are what follows the shared beginning.
        steps, rule: see `integrate`.
        baseline, keep_first: see `text_baseline`.
        whole_answer: all tokens of an answer, or its last one only (what comes before it is prompt then).

    Returns:
        For each text the attributions of log p(answer), and one number for each of its tokens, float64
        `[pos]` (0 for tokens that are only predicted).

    Raises:
        InputError: no shared beginning, or an answer without a token.
    """
    start = answer_start(one, other)
    cuts = [start if whole_answer else len(ids) - 1 for ids in (one, other)]
    texts, made, scores = (one, other), [], []
    same = torch.equal(one[: cuts[0]], other[: cuts[1]]) and torch.equal(
        one[cuts[0] : -1], other[cuts[1] : -1]
    )
    groups = [[0, 1]] if same else [[0], [1]]
    for group in groups:
        first = group[0]
        answer = answer_function(model, texts[first][: cuts[first]], [texts[i][cuts[i] :] for i in group])
        start_value = text_baseline(model, answer.ids, baseline, keep_first=keep_first)
        made += integrate_each(answer.function, answer.x, start_value, steps=steps, rule=rule)
    for ids, found in zip(texts, made, strict=True):
        whole = torch.zeros(len(ids), dtype=torch.float64)
        whole[: len(found.values)] = found.values.flatten(1).sum(-1).cpu()
        scores.append(whole)
    return made, scores


def answer_start(one: Tensor, other: Tensor) -> int:
    """Return where the answers of two texts start: after what both begin with.

    Raises:
        InputError: they begin differently, or one is the beginning of the other.
    """
    start = shared_length(one, other)
    if not 0 < start < min(len(one), len(other)):
        raise InputError(
            "two texts to compare need a shared beginning and an answer of at least one token each; "
            f"of these, with {len(one)} and {len(other)} tokens, the first {start} are shared"
        )
    return start


def site_function(
    model: Model, inputs: Any, target: Callable[[Any], Tensor], site: str
) -> tuple[Tensor, Function]:
    """Return the activation of one input at a site, and `target(model's output)` as a function of it.

    Args:
        target: from the model's output for b rows to `[b]`.

    Raises:
        InputError: several inputs.
    """
    model = in_float32(model)
    head, tail = split_at(model, site)
    state: SplitState = head(inputs)
    if state.activation.shape[0] != 1:
        raise InputError(
            f"attributions are for one input at a time; this batch has {state.activation.shape[0]}"
        )

    def function(x: Tensor) -> Tensor:
        value = target(tail(state, x, grad=torch.is_grad_enabled()))
        if value.shape != x.shape[:1]:
            raise ShapeError(
                f"the target must give one number for each row: [{len(x)}], not {list(value.shape)}"
            )
        return value

    return _wide(state.activation[0]), function


def text_baseline(
    model: Model, ids: Tensor, kind: BaselineKind = "mean", *, keep_first: bool = True, site: str = "embed"
) -> Tensor:
    """Return the activation `[pos, ...]` at a site of a text whose tokens say nothing.

    Args:
        model: a model with token embeddings.
        ids: int64 `[pos]`.
        kind: the embedding that every token gets: the vocabulary's `"mean"`, `"zero"`, or that of the
            padding (or end-of-text) token, `"pad"`.
        keep_first: leave the first token as it is; see the module docstring.
        site: where the activation is read.

    Raises:
        InputError: an unknown kind, or a model without input embeddings or without such a token.
    """
    model = in_float32(model)
    getter = getattr(model.module, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    weight = getattr(table, "weight", None)
    if table is None or not isinstance(weight, Tensor):
        raise InputError(f"{model.name} has no table of token embeddings; give the baseline as a tensor")
    if kind == "pad":
        source = weight[empty_token(model)]
    elif kind in ("mean", "zero"):
        source = weight.mean(0) if kind == "mean" else torch.zeros_like(weight[0])
    else:
        raise InputError(f"baseline is {kind!r}; it must be 'mean', 'zero', 'pad' or a tensor")

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        new = source.detach().to(output).expand_as(output).clone()
        scale = output.norm() / torch.nn.functional.embedding(args[0], weight).norm()  # Gemma scales here
        new *= scale
        if keep_first:
            new[:, 0] = output[:, 0]
        return new

    handle = table.register_forward_hook(hook)
    try:
        encoded = {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones_like(ids).unsqueeze(0)}
        return _wide(split_at(model, site)[0](encoded).activation[0])
    finally:
        handle.remove()


def empty_token(model: Model) -> int:
    """Return the id of the padding token, or of the end-of-text token.

    Raises:
        InputError: the model has neither.
    """
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(model.tokenizer, name, None)
        if token is not None:
            return int(token)
    raise InputError(f"{model.name} has neither a padding nor an end-of-text token; choose another option")


def _wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ModelError("the model gives no logits")
    return found


def in_float32(model: Model) -> Model:
    """Return the model, or a float32 copy of one in half precision.

    Raises:
        InputError: it is in half precision and has edits installed, which a copy would not have.
    """
    if model.dtype in (torch.float32, torch.float64):
        return model
    import copy

    from actlas.core.model import Model as Wrapped

    if model.installed:
        raise InputError(
            f"gradients are computed in float32 and {model.name} is {model.dtype} with edits installed; "
            "load it in float32"
        )
    module = copy.deepcopy(model.module).float()
    return Wrapped(module, model.tokenizer, model.processor, model.name, kind=model.kind, source=model.source)


def token_ids(model: Model, text: str) -> Tensor:
    """Return the token ids `[pos]` of one text as the model reads it."""
    ids: Tensor = model.encode(text)["input_ids"][0]
    return ids


def added_ids(model: Model, prompt: str | Tensor, answer: str) -> Tensor:
    """Return the token ids that an answer adds after a prompt.

    Raises:
        InputError: it adds none, or changes the tokens of the prompt.
    """
    if isinstance(prompt, Tensor):
        raise InputError("an answer as text needs the prompt as text; give both as ids")
    before, whole = token_ids(model, prompt), token_ids(model, prompt + answer)
    if len(whole) <= len(before) or not torch.equal(whole[: len(before)], before):
        raise InputError(
            f"{answer!r} adds no tokens of its own after the prompt (a space may belong to the answer: "
            f"{' ' + answer.strip()!r})"
        )
    return whole[len(before) :]


def shared_length(one: Tensor, other: Tensor) -> int:
    """Return how many first tokens two sequences have in common."""
    n = min(len(one), len(other))
    differ = (one[:n] != other[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


def erased(
    model: Model, ids: Tensor, positions: Sequence[int], replace: Replacement = "pad"
) -> dict[str, Any]:
    """Return the model's arguments for one text with some of its tokens erased.

    Args:
        model: a model that reads tokens.
        ids: int64 `[pos]`.
        positions: which tokens.
        replace: `"pad"` puts the padding (or end-of-text) token there; `"mask"` hides the tokens from
            attention, all others staying where they are.

    Raises:
        InputError: an unknown replacement, a position outside the text, every token at once, or a model
            with neither a padding nor an end-of-text token.
    """
    places = sorted({int(p) for p in positions})
    if places and not (places[0] >= 0 and places[-1] < len(ids)):
        raise InputError(
            f"token {places[-1] if places[0] >= 0 else places[0]} is outside a text of {len(ids)}"
        )
    if len(places) >= len(ids):
        raise InputError(f"all {len(ids)} tokens would be erased; leave at least one")
    index = torch.tensor(places, dtype=torch.long, device=ids.device)
    new, mask = ids.clone(), torch.ones_like(ids)
    if replace == "pad":
        new[index] = empty_token(model)
    elif replace == "mask":
        mask[index] = 0
    else:
        raise InputError(f"replace is {replace!r}; here it must be 'pad' or 'mask'")
    encoded: dict[str, Any] = {"input_ids": new.unsqueeze(0), "attention_mask": mask.unsqueeze(0)}
    if replace == "mask" and "position_ids" in forward_parameters(model.module):
        encoded["position_ids"] = torch.arange(len(ids), device=ids.device).unsqueeze(0)
    return encoded
