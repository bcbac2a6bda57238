"""Which tokens a store's rows are: a corpus cut into windows, and windows into shards, before any pass.

Every token of the corpus is one row, in order. A window is what the model sees at once: consecutive
tokens of one document, never of two. A shard is a run of whole windows. All of this follows from the
corpus, the tokenizer and three numbers (context, rows, shard_rows), so that a shard can be made at any
time, by anybody, in any order, and comes out the same.

A conversation (a list of `{"role", "content"}`, or a document with `.messages`) is put through the
tokenizer's chat template; the role of a token is that of the message whose content it lies in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.core.streaming import DEFAULT_CONTEXT, Window
from actlas.store.tokens import plain_text


@dataclass(frozen=True)
class Text:
    """A document in tokens.

    Attributes:
        id: its name in the corpus.
        ids: token ids.
        pieces: the text that each token stands for; joined they are the document.
        special: which tokens are the tokenizer's special ones.
        roles: the role of the message that each token lies in; `None` outside of messages.
        labels: the document's labels (`.group`).
    """

    id: str
    ids: Sequence[int]
    pieces: Sequence[str]
    special: Sequence[bool]
    roles: Sequence[str | None]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Cut:
    """A window of a document, `text.ids[start:stop]`."""

    text: Text
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def window(self) -> Window:
        """What is given to the model."""
        return Window(self.text.id, self.start, tuple(self.text.ids[self.start : self.stop]))


@dataclass
class ShardPlan:
    """The windows of one shard.

    Attributes:
        index: its number.
        first: its first row.
        rows: how many it has.
        cuts: its windows in the order of the rows.
    """

    index: int
    first: int
    rows: int = 0
    cuts: list[Cut] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 over documents, positions and token ids."""
        found = hashlib.sha256()
        for cut in self.cuts:
            for part in (cut.text.id, str(cut.start), ",".join(map(str, cut.window.ids))):
                data = part.encode("utf-8", "surrogatepass")
                found.update(len(data).to_bytes(8, "big") + data)
        return found.hexdigest()


def plan_shards(
    model: Model, corpus: Iterable[Any], *, context: int | None, rows: int | None, shard_rows: int
) -> Iterator[ShardPlan]:
    """Yield the shards of a store, one after the other, reading the corpus once.

    Args:
        model: whose tokenizer cuts the text.
        corpus: strings, documents with `.text` and `.id`, or conversations.
        context: tokens in a window; default: the model's context, at most 512.
        rows: stop after so many tokens; default: the whole corpus.
        shard_rows: rows in a shard at most, unless one window has more.

    Raises:
        InputError: no text at all, or a window that the model cannot take.
        ModelError: no tokenizer, or conversations without a chat template.
    """
    size = window_size(model, context)
    plan = ShardPlan(0, 0)
    taken = 0
    for text in texts(model, corpus):
        start = 0
        while start < len(text.ids) and (rows is None or taken < rows):
            stop = min(start + size, len(text.ids))
            if rows is not None:
                stop = min(stop, start + rows - taken)
            if plan.cuts and plan.rows + stop - start > shard_rows:
                yield plan
                plan = ShardPlan(plan.index + 1, plan.first + plan.rows)
            plan.cuts.append(Cut(text, start, stop))
            plan.rows += stop - start
            taken += stop - start
            start = stop
        if rows is not None and taken >= rows:
            break
    if not taken:
        raise InputError("the corpus has no text; give at least one document with some")
    yield plan


def window_size(model: Model, context: int | None) -> int:
    """Return the tokens of a window, or raise InputError where the model cannot take them."""
    limit = model.context_length
    size = context if context is not None else min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if size < 1 or (limit is not None and size > limit):
        raise InputError(f"context is {context}; {model.name} takes 1 to {limit} tokens")
    return size


def texts(model: Model, corpus: Iterable[Any]) -> Iterator[Text]:
    """Yield the documents of a corpus in tokens."""
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it cannot read a corpus of text")
    reader = _Reader(model)
    for i, document in enumerate([corpus] if isinstance(corpus, str) else corpus):
        yield reader.read(document, str(i))


class _Reader:
    def __init__(self, model: Model) -> None:
        self._name, self._tokenizer = model.name, model.tokenizer
        self._fast = bool(getattr(model.tokenizer, "is_fast", False))
        self._special = frozenset(getattr(model.tokenizer, "all_special_ids", ()))
        self._strings: dict[int, str] = {}

    def read(self, document: Any, default: str) -> Text:
        messages = document if isinstance(document, (list, tuple)) else getattr(document, "messages", None)
        name = str(getattr(document, "id", default))
        if messages is not None:
            text = self._template(messages, name)
        elif isinstance(document, str):
            text = document
        else:
            text = document.text
        text = plain_text(text)
        options = {"return_offsets_mapping": True} if self._fast else {}
        encoded = self._tokenizer(text, add_special_tokens=messages is None, verbose=False, **options)
        ids = encoded["input_ids"]
        spans = encoded["offset_mapping"] if self._fast else None
        return Text(
            name,
            ids,
            self._pieces(text, ids, spans),
            [i in self._special for i in ids],
            _roles(text, messages, spans) if messages is not None and spans else [None] * len(ids),
            dict(getattr(document, "group", {}) or {}),
        )

    def _template(self, messages: Any, name: str) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ModelError(
                f"document {name!r} is a conversation, and {self._name} has no chat template; "
                "give text, or a chat model"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(list(map(dict, messages)), tokenize=False)
        except Exception as error:
            raise InputError(
                f"the chat template of {self._name} does not take conversation {name!r}: {error}"
            ) from error
        return text

    def _pieces(self, text: str, ids: Sequence[int], spans: Any) -> list[str]:
        """Return the text of each token; what the tokenizer drops goes to the token behind it.

        A character of several tokens goes to the first of them. Tokens without text (added ones) are
        shown by their name.
        """
        if spans is None:
            return [self._string(i) for i in ids]
        pieces, done = [], 0
        for token, (start, stop) in zip(ids, spans, strict=True):
            if stop > start:
                pieces.append(text[done:stop] if stop > done else "")
                done = max(done, stop)
            else:
                pieces.append(self._string(token))
        return pieces

    def _string(self, token: int) -> str:
        if token not in self._strings:
            self._strings[token] = self._tokenizer.decode([token])
        return self._strings[token]


def _roles(text: str, messages: Any, spans: Any) -> list[str | None]:
    """Return the role of the message in whose content each token begins, `None` outside of all."""
    marked: list[tuple[int, int, str]] = []
    done = 0
    for message in messages:
        content = message["content"].strip() if isinstance(message["content"], str) else ""
        start = text.find(content, done) if content else -1
        if start >= 0:
            done = start + len(content)
            marked.append((start, done, str(message["role"])))
    roles: list[str | None] = []
    k = 0
    for start, stop in spans:
        while k < len(marked) and marked[k][1] <= start:
            k += 1
        inside = k < len(marked) and marked[k][0] < stop and start < marked[k][1] and stop > start
        roles.append(marked[k][2] if inside else None)
    return roles
