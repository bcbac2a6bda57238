"""What a chat template writes around what was said, to the letter.

    template = ChatTemplate(tokenizer)
    text, segments = template.render(messages, "chat 7")     # segments: (end in characters, special, role)
    special, roles = label_tokens(offsets, segments)

A template is asked with placeholders in the place of the contents. What stands between the placeholders is
the template's, whatever people write in their messages. Of what stands between two contents, the part that
also stands at the very end closes the turn before; the rest opens the next turn. What a template puts
before the first turn of its own accord (a default system prompt) is a turn of the role `PREAMBLE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actlas.core.errors import InputError

PREAMBLE = "system"  # the role of what a template writes of its own accord before the first turn

Segment = tuple[int, bool, str]  # end (in characters), special, role


class ChatTemplate:
    """What a chat template writes around the contents, by the roles of a conversation."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, ...], list[str]] = {}

    def render(self, messages: Any, name: str) -> tuple[str, list[Segment]]:
        """Return the text of a conversation and its segments in order.

        Raises:
            InputError: no messages, or a template that refuses them or changes their contents.
        """
        if not isinstance(messages, Sequence) or not messages or isinstance(messages, str):
            raise InputError(f"conversation {name} has no messages; give a list of role and content")
        if not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
            raise InputError(f"conversation {name} has a message without 'role' and 'content'")
        roles = tuple(str(m["role"]) for m in messages)
        gaps = self._gaps(roles, name)
        contents = [str(m["content"]) for m in messages]
        text = self._apply([dict(m) for m in messages], name)
        for said in (contents, [c.strip() for c in contents]):  # some templates trim what was said
            if text == "".join(part for pair in zip(gaps, [*said, ""], strict=True) for part in pair):
                return text, self._segments(gaps, said, roles, name)
        raise InputError(f"the chat template rewrites the contents of conversation {name}; edit it first")

    def _segments(self, gaps: list[str], said: list[str], roles: tuple[str, ...], name: str) -> list[Segment]:
        segments: list[Segment] = []
        end = 0

        def add(length: int, special: bool, role: str) -> None:
            nonlocal end
            end += length
            segments.append((end, special, role))

        for own, special in self._preamble(gaps[0], roles, name):
            add(len(own), special, PREAMBLE)
        header = gaps[0][end:]
        for i, role in enumerate(roles):
            add(len(header), True, role)
            add(len(said[i]), False, role)
            trailer, header = self._split(gaps[i + 1], gaps[-1])
            add(len(trailer), True, role)
        return segments

    def _preamble(self, first: str, roles: tuple[str, ...], name: str) -> Iterator[tuple[str, bool]]:
        """Yield what stands before the first turn (a default system prompt), cut into template and text."""
        if roles[0] == "system":
            return
        try:
            header = self._split(*self._gaps((roles[0], "assistant", roles[0]), name)[-2:])[1]
        except InputError:  # this role cannot come twice, so nothing says where its header begins
            return
        before = first.removesuffix(header) if header and first.endswith(header) else ""
        if not before:
            return
        try:
            opening, closing, *_ = self._gaps(("system", *roles), name)
        except InputError:  # a template without system turns: what it writes of its own is markers
            yield before, True
            return
        trailer = closing.removesuffix(header)
        if trailer and before.startswith(opening) and before.endswith(trailer):
            yield opening, True
            yield before[len(opening) : len(before) - len(trailer)], False
            yield trailer, True
        else:
            yield before, True

    def _split(self, gap: str, final: str) -> tuple[str, str]:
        """Cut a gap into the end of one turn, which also stands at the very end, and the next header."""
        n = 0
        while n < min(len(gap), len(final)) and gap[n] == final[n]:
            n += 1
        return gap[:n], gap[n:]

    def _gaps(self, roles: tuple[str, ...], name: str) -> list[str]:
        """Return what the template writes before, between and after contents of these roles."""
        if roles not in self._known:
            marks = [f"(content-{i}-placeholder)" for i in range(len(roles))]
            messages = [{"role": r, "content": c} for r, c in zip(roles, marks, strict=True)]
            rest, gaps = self._apply(messages, name), []
            for mark in marks:
                gap, found, rest = rest.partition(mark)
                if not found:
                    raise InputError(
                        f"the chat template leaves out a message of conversation {name}: {roles}"
                    )
                gaps.append(gap)
            self._known[roles] = [*gaps, rest]
        return self._known[roles]

    def _apply(self, messages: list[dict[str, Any]], name: str) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # jinja's errors, or what the template raises on roles out of order
            raise InputError(f"the chat template refuses conversation {name}: {error}") from error


def label_tokens(
    offsets: Sequence[tuple[int, int]], segments: Sequence[Segment]
) -> tuple[tuple[bool, ...], tuple[str, ...]]:
    """Give each token the label of the segment in which it begins; a token across a border counts once."""
    special, roles = [], []
    i = 0
    for start, _ in offsets:
        while i + 1 < len(segments) and start >= segments[i][0]:
            i += 1
        special.append(segments[i][1])
        roles.append(segments[i][2])
    return tuple(special), tuple(roles)
