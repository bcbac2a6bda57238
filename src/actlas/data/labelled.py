"""Texts with labels and pairs of texts, for probes and steering directions.

    labelled("pairs.jsonl")        # lines with "text" and "label", or with "positive" and "negative"
    labelled("sentiment")          # the pairs of a task

Methods themselves never open files: whoever calls them turns a name or a path into data first.
"""

from __future__ import annotations

import json
import random
from os import PathLike
from pathlib import Path
from typing import Any

from actlas.core.errors import InputError, did_you_mean
from actlas.data.loaders import JSONL_SUFFIXES, read_text
from actlas.data.task_items import Pair
from actlas.data.tasks import pairs, task, tasks

Labelled = tuple[str, float]


def labelled(
    name_or_path: str | PathLike[str],
    tokenizer: Any = None,
    *,
    n: int = 128,
    seed: int = 0,
    only_pairs: bool = False,
) -> list[Labelled] | list[Pair]:
    """Return labelled texts, or pairs of a positive and a negative text.

    Args:
        name_or_path: a task's name, or a JSON-lines file.
        tokenizer: for a task's check of its answers.
        n: how many items to make of a task, or at most to take of a file, drawn with the seed.
        seed: of the draw.
        only_pairs: refuse labelled texts.

    Returns:
        `Pair`s (a `prompt` in a line is put before both texts unless they begin with it), or
        `(text, label)` with labels as numbers (true and false are 1 and 0).

    Raises:
        InputError: neither a task nor a readable file, a malformed line (named), mixed lines, or labels
            that are not numbers.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in tasks():
        return pairs(task(name, tokenizer, n=n, seed=seed))
    path = Path(name_or_path).expanduser()
    if not name or not path.is_file():
        raise InputError(
            f"{name!r} is neither a JSON-lines file nor a task ({', '.join(tasks())})"
            f"{did_you_mean(name, tasks())}"
        )
    if path.suffix.lower() not in JSONL_SUFFIXES:
        raise InputError(
            f"{path} is not .jsonl; labelled texts come as JSON lines with 'text' and 'label', or with"
            f" 'positive' and 'negative'"
        )
    items: list[Labelled | Pair] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            items.append(_item(line, f"{path}, line {number}", f"{path.stem}/{number}"))
    kinds = {isinstance(item, Pair) for item in items}
    if len(kinds) > 1:
        raise InputError(f"{path} mixes labelled texts and pairs; put them into two files")
    if only_pairs and kinds == {False}:
        raise InputError(f"{path} holds labelled texts where pairs are needed: 'positive' and 'negative'")
    random.Random(seed).shuffle(items)
    return items[:n]  # type: ignore[return-value]


def _item(line: str, where: str, id: str) -> Labelled | Pair:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a {type(record).__name__} where an object belongs")
    for fields in (("text", "label"), ("positive", "negative")):
        if not set(fields) <= set(record):
            continue
        first, second = (record[field] for field in fields)
        if not isinstance(first, str) or not first.strip():
            raise InputError(f"{where}: {fields[0]!r} is not a text")
        if fields[0] == "text":
            if not isinstance(second, bool | int | float):
                raise InputError(f"{where}: the label is {second!r}; it must be a number, true or false")
            return first, float(second)
        if not isinstance(second, str) or not second.strip():
            raise InputError(f"{where}: {fields[1]!r} is not a text")
        prompt = record.get("prompt") or ""
        if not isinstance(prompt, str):
            raise InputError(f"{where}: 'prompt' is not a text")
        if not (first.startswith(prompt) and second.startswith(prompt)):
            first, second = prompt + first, prompt + second
        return Pair(id, first, second, prompt=prompt)
    names = ", ".join(map(repr, record)) or "nothing"
    raise InputError(f"{where}: it has {names}; give 'text' and 'label', or 'positive' and 'negative'")
