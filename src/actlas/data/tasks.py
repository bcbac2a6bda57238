"""`task(...)`: prompts with checked one-token answers, generated from templates with a fixed seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from actlas.core.errors import InputError, did_you_mean
from actlas.data import tasks_facts, tasks_judgement, tasks_pattern
from actlas.data.single_token import Builder, Tokens
from actlas.data.task_items import Pair, Task, TaskInfo, TaskItem

_LEAST = 8  # fewer items than this (and than asked for) is no task
_PATIENCE = 2000  # drafts in a row that gave nothing new: there is nothing more
_INFOS = {info.name: info for room in (tasks_pattern, tasks_facts, tasks_judgement) for info in room.TASKS}


def tasks() -> dict[str, TaskInfo]:
    """Return every task by name."""
    return dict(_INFOS)


def task(name: str, tokenizer: Any = None, *, n: int = 64, seed: int = 0, words: int | None = None) -> Task:
    """Make a task of up to `n` different items.

    The first `k` items are the same for every `n` of at least `k`.

    Args:
        name: one of `tasks()`.
        tokenizer: answers are checked against it: right and wrong answers are one token each and differ.
            One of transformers or of `tokenizers`; `None` skips the check.
        n: how many items; a task that has fewer different ones for this tokenizer gives those and says so
            in its `note`.
        seed: the same seed gives the same items.
        words: draw from only so many words of each list that is checked for one-token words (names in
            `"ioi"`), so that every word comes up often; `None` draws from all.

    Raises:
        InputError: unknown name, `n` below 1, `words` below 4, or a tokenizer for which fewer than 8 items
            (or fewer than `n`, if that is less) can be made.
    """
    if name not in _INFOS:
        raise InputError(
            f"there is no task {name!r}; the tasks are {', '.join(_INFOS)}{did_you_mean(name, _INFOS)}"
        )
    if n < 1:
        raise InputError(f"a task of {n} items makes no sense; ask for at least 1")
    if words is not None and words < 4:
        raise InputError(f"a task needs at least 4 words to draw from, not {words}")
    info = _INFOS[name]
    tokens = Tokens(tokenizer)
    items: dict[str, TaskItem] = {}
    refused, fruitless = "", 0
    for draft in info.build(Builder(tokens, f"{name}/{seed}", words)):
        item = _fit(draft, tokens)
        fruitless += 1
        if item is None:
            refused = refused or f"{draft.answer!r} after {draft.prompt[-40:]!r}"
        elif item.prompt not in items:
            items[item.prompt] = replace(item, id=f"{name}/{seed}/{len(items)}")
            fruitless = 0
        if len(items) == n or fruitless == _PATIENCE:
            break
    if len(items) < min(n, _LEAST):
        reason = f"; the first answer that was not one token is {refused}" if refused else ""
        raise InputError(f"the task {name!r} has only {len(items)} items for this tokenizer{reason}")
    note = "" if len(items) == n else f"{len(items)} of the {n} items asked for exist for this tokenizer"
    return Task(tuple(items.values()), seed, info, note)


def pairs(source: Task) -> list[Pair]:
    """Return contrastive pairs made of a task.

    Sentiment and true-false give the judged texts themselves (a positive and a negative review, a true and a
    false statement); every other task gives the prompt with the right answer and with the most tempting
    wrong one.
    """
    found: dict[tuple[str, str], Pair] = {}
    for item in source:
        contrast, other = source.info.contrast, item.counterfactual
        if contrast is None:
            texts = (item.text, item.prompt + item.wrong[0])
        elif other is None:
            continue
        elif item.group[contrast[0]] == contrast[1]:
            texts = (item.stimulus, other.stimulus)
        else:
            texts = (other.stimulus, item.stimulus)
        found.setdefault(texts, Pair(item.id, *texts, item.group, item.prompt if contrast is None else ""))
    return list(found.values())


def _fit(draft: TaskItem, tokens: Tokens) -> TaskItem | None:
    """Return the draft with its tokens, or `None` if it does not fit the tokenizer."""
    other = draft.counterfactual
    if not tokens.known:
        return draft
    for spaced in (True, False):
        item = _with_ids(draft, tokens, spaced)
        if item is None:
            continue
        if other is None:
            return _with_variants(item, tokens, spaced)
        partner = _alike(item, other, tokens, spaced)
        if partner is not None:
            return _with_variants(replace(item, counterfactual=partner), tokens, spaced)
    return None


def _alike(item: TaskItem, other: TaskItem, tokens: Tokens, spaced: bool) -> TaskItem | None:
    """Return another draft with its tokens, or `None` if it has not as many as `item`."""
    partner = _with_ids(other, tokens, spaced)
    same = partner is not None and len(tokens.ids(partner.prompt)) == len(tokens.ids(item.prompt))
    return partner if same else None


def _with_variants(item: TaskItem, tokens: Tokens, spaced: bool) -> TaskItem:
    """Look up the tokens of an item's variants; those that do not fit are left out."""
    if not item.variants:
        return item
    fitted = {name: _alike(item, other, tokens, spaced) for name, other in item.variants.items()}
    return replace(item, variants={name: other for name, other in fitted.items() if other is not None})


def _with_ids(draft: TaskItem, tokens: Tokens, spaced: bool) -> TaskItem | None:
    """Put the space before the answer (`spaced`) or at the end of the prompt, and look up the tokens."""
    prompt, words = draft.prompt, draft.choices
    if not spaced:
        if not all(word.startswith(" ") for word in words):
            return None
        prompt, words = f"{prompt} ", tuple(word[1:] for word in words)
    ids = [tokens.one(prompt, word) for word in words]
    answer_id = ids[0]
    if answer_id is None:
        return None
    wrong: dict[int, str] = {}
    for token, word in zip(ids[1:], words[1:], strict=True):
        if token is not None and token != answer_id:
            wrong.setdefault(token, word)
    if not wrong or (ids[1] is None):
        return None
    return replace(
        draft,
        prompt=prompt,
        answer=words[0],
        wrong=tuple(wrong.values()),
        answer_id=answer_id,
        wrong_ids=tuple(wrong),
    )
