"""What a request asks for, read from its JSON and checked, with one clear line for what is wrong.

    {"model": "smollm2", "messages": [...], "edits": ["happy*1.5", {"name": "brief", "strength": -1}]}

Fields and defaults are those of OpenAI's API. `edits` is ours; where a client cannot send it, the model's
name can carry them: `"smollm2+happy*1.5+brief*-1"`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError, did_you_mean

_UNSUPPORTED = (
    "tools",
    "functions",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "response_format",
    "suffix",
    "echo",
)
_IGNORED_IF = {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0}


@dataclass(eq=False)
class Job:
    """One checked request.

    Attributes:
        inputs: the prompt, or the chat as a list of `{"role", "content"}`.
        edit: the edits of this request as one, or `None`.
        names: the edits as they were asked for, e.g. `["happy*1.5"]`.
        max_tokens, temperature, top_p, seed, stop, stream: as in OpenAI's API.
        ids: the prompt's tokens, once the engine has encoded it.
    """

    inputs: str | list[dict[str, str]]
    edit: Edit | None
    names: list[str]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    stream: bool = False
    ids: list[int] = field(default_factory=list)

    @property
    def chat(self) -> bool:
        """Whether the prompt is a chat."""
        return not isinstance(self.inputs, str)


def read_job(
    body: Any, edits: Mapping[str, Edit], default: Sequence[str], *, chat: bool, model: str, most_tokens: int
) -> Job:
    """Return the job that a request's JSON asks for.

    Args:
        body: the decoded JSON.
        edits: the edits of this server, by name.
        default: what applies when a request says nothing of edits.
        chat: whether it came to the chat endpoint.
        model: the served model's name.
        most_tokens: the most new tokens that a request may ask for.

    Raises:
        InputError: a field that is missing, unknown here or of a wrong kind; it says which and what is right.
    """
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object; send e.g. {'model': ..., 'messages': [...]}")
    for name in _UNSUPPORTED:
        if body.get(name) not in (None, False, [], {}, 0):
            raise InputError(f"{name!r} is not supported by this server; leave it out")
    for name, value in _IGNORED_IF.items():
        if body.get(name, value) not in (None, value):
            raise InputError(f"{name!r} is {body[name]!r}; this server supports only {value}")
    if body.get("max_completion_tokens") is not None:
        body = {**body, "max_tokens": body["max_completion_tokens"]}
    named = str(body.get("model") or model)
    base, *suffix = named.split("+")
    if base and base != model:
        raise InputError(f"this server serves {model!r}, not {base!r}")
    asked = body.get("edits")
    if asked is None:
        asked = suffix if suffix else list(default)
    elif suffix:
        raise InputError(f"edits are given twice: in the model's name {named!r} and in 'edits'")
    edit, names = read_edits(asked, edits)
    return Job(
        inputs=_messages(body) if chat else _prompt(body),
        edit=edit,
        names=names,
        max_tokens=int(_number(body, "max_tokens", min(128, most_tokens), 1, most_tokens, whole=True)),
        temperature=_number(body, "temperature", 1.0, 0.0, 10.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        seed=int(_number(body, "seed", random.SystemRandom().randrange(2**31), 0, 2**63 - 1, whole=True)),
        stop=_stop(body.get("stop")),
        stream=_flag(body, "stream"),
    )


def read_edits(asked: Any, edits: Mapping[str, Edit]) -> tuple[Edit | None, list[str]]:
    """Return a request's edits as one edit, and how they were written.

    Args:
        asked: `"name"`, `"name*1.5"` or `{"name": ..., "strength": ...}`, in a list.
        edits: the edits of this server.

    Raises:
        InputError: an edit that this server has not got, or a strength that is not a finite number.
    """
    if isinstance(asked, str):
        asked = [asked]
    if not isinstance(asked, list):
        raise InputError(f"'edits' is {type(asked).__name__}; give a list, e.g. ['happy*1.5']")
    parts, names = [], []
    for item in asked:
        name, strength = _named(item)
        if name not in edits:
            known = f"; there are {', '.join(edits)}" if edits else "; start it with --edit NAME=PATH"
            raise InputError(f"this server has no edit {name!r}{did_you_mean(name, edits) or known}")
        parts.append(edits[name] if strength == 1.0 else edits[name] * strength)
        names.append(f"{name}*{strength:g}")
    return (compose(parts) if parts else None), names


def _named(item: Any) -> tuple[str, float]:
    if isinstance(item, str):
        name, star, said = item.partition("*")
        strength: Any = said if star else 1.0
    elif isinstance(item, dict) and isinstance(item.get("name"), str):
        name, strength = item["name"], item.get("strength", 1.0)
        unknown = set(item) - {"name", "strength"}
        if unknown:
            raise InputError(f"an edit has 'name' and 'strength', not {sorted(unknown)[0]!r}")
    else:
        raise InputError(f"an edit is 'name*strength' or {{'name', 'strength'}}, not {str(item)[:60]!r}")
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not abs(value) < 1e9:
        raise InputError(f"the strength of edit {name!r} is {strength!r}; it must be a finite number")
    return name.strip(), value


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("'messages' is missing or empty; send [{'role': 'user', 'content': '...'}]")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"message {i} has no 'role'; it must be 'system', 'user' or 'assistant'")
        content = message.get("content")
        if isinstance(content, list):  # the long form: text parts
            texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
            parts = [text for text in texts if isinstance(text, str)]
            if len(parts) != len(content):
                raise InputError(f"message {i} has parts that are not text; this server reads text only")
            content = "".join(parts)
        if not isinstance(content, str):
            raise InputError(f"message {i} has no text as its 'content'")
        found.append({"role": message["role"], "content": content})
    return found


def _prompt(body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("'prompt' is missing or empty; send one text")
    return prompt


def _number(
    body: Mapping[str, Any], name: str, default: float, low: float, high: float, whole: bool = False
) -> float:
    value = body.get(name)
    if value is None:
        return default
    right = isinstance(value, int) if whole else isinstance(value, (int, float))
    if isinstance(value, bool) or not right or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{name!r} is {value!r}; it must be {kind} from {low:g} to {high:g}")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, (bool, type(None))):
        raise InputError(f"{name!r} is {value!r}; it must be true or false")
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > 4 or not all(isinstance(s, str) and s for s in given):
        raise InputError(f"'stop' is {str(value)[:60]!r}; give a text, or a list of at most 4")
    return tuple(given)
