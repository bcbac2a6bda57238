"""Facts to write into a model: what it should say after a prompt, and what must stay as it is.

    requests = edit_requests("edits.jsonl")

One JSON object a line:

    {"prompt": "The capital of France is", "target": " Rome", "subject": "France",
     "paraphrases": ["France's capital is the city of"], "locality": ["The capital of Spain is"]}

`subject`, `paraphrases`, `locality` and `irrelevant` may be left out. Paraphrases and locality prompts are
for measuring only; `irrelevant` are texts that a method may use to learn what must not change.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from actlas.core.errors import InputError, did_you_mean
from actlas.data.loaders import read_text

_LISTS = ("paraphrases", "locality", "irrelevant")
_FIELDS = ("prompt", "target", "subject", *_LISTS)


@dataclass(frozen=True)
class EditRequest:
    """One fact to write.

    Attributes:
        prompt: what the model reads.
        target: what it should say directly after, with its leading space.
        subject: the part of the prompt that the fact is about, or empty.
        paraphrases: other prompts that must give the target.
        locality: prompts whose answer must stay as it was.
        irrelevant: texts that have nothing to do with it, for methods that learn from some.
    """

    prompt: str
    target: str
    subject: str = ""
    paraphrases: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()
    irrelevant: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"an edit request needs a {name}; it is {value!r}")
        if self.subject and self.subject not in self.prompt:
            raise InputError(f"the subject {self.subject!r} is not part of the prompt {self.prompt!r}")
        for name in _LISTS:
            if not all(isinstance(t, str) and t.strip() for t in getattr(self, name)):
                raise InputError(f"{name} of {self.prompt!r} holds something that is no text")
        for name in ("locality", "irrelevant"):
            if self.prompt in getattr(self, name):
                raise InputError(f"{self.prompt!r} is edited and is one of its own {name} texts; take it out")

    @classmethod
    def of(cls, item: Any) -> EditRequest:
        """Return a request from a request or a mapping with its fields.

        Raises:
            InputError: a missing, empty or unknown field.
        """
        if isinstance(item, EditRequest):
            return item
        if not isinstance(item, Mapping):
            raise InputError(
                f"an edit request is an object with prompt and target, not {type(item).__name__}"
            )
        unknown = next((k for k in item if k not in _FIELDS), None)
        if unknown is not None:
            raise InputError(f"an edit request has no field {unknown!r}{did_you_mean(unknown, _FIELDS)}")
        given: dict[str, Any] = {"prompt": item.get("prompt"), "target": item.get("target")}
        given["subject"] = item.get("subject") or ""
        for name in _LISTS:
            value = item.get(name) or ()
            given[name] = (value,) if isinstance(value, str) else tuple(value)
        return cls(**given)


def as_requests(data: Iterable[Any]) -> list[EditRequest]:
    """Return requests of requests or mappings, checked against each other.

    Raises:
        InputError: none at all, two for one prompt, or a prompt that is edited by one request and must stay
            as it is by another.
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise InputError(f"edit requests are a list, not {type(data).__name__}")
    found = [EditRequest.of(item) for item in data]
    if not found:
        raise InputError("there are no edit requests; give at least one")
    prompts: dict[str, EditRequest] = {}
    for request in found:
        known = prompts.setdefault(request.prompt, request)
        if known is not request:
            raise InputError(f"two requests edit the prompt {request.prompt!r}; keep one")
    for request in found:
        for name in ("locality", "irrelevant"):
            clash = next((t for t in getattr(request, name) if t in prompts), None)
            if clash is not None:
                raise InputError(f"{clash!r} is edited and is a {name} text of another request; take one out")
    return found


def edit_requests(path: str | PathLike[str], *, n: int | None = None, seed: int = 0) -> list[EditRequest]:
    """Read requests from a JSON-lines file.

    Args:
        path: the file.
        n: take at most so many, drawn with the seed; `None` takes all, in their order.
        seed: of the draw.

    Raises:
        InputError: no such file, or a malformed line (named).
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{str(path)!r} is no file; edit requests come as JSON lines with prompt and target")
    found = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(EditRequest.of(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}, line {number}: {error}") from error
    if n is not None and n < len(found):
        found = random.Random(seed).sample(found, n)
    return as_requests(found)
