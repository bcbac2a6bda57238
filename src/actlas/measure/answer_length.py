"""How long answers are, whether they end, and whether they are right.

    answer_length(model, task("arithmetic", tokenizer))        # three measurements
    write_answers(model, ["What is 2 + 2?", ...])              # the answers themselves

An answer is written greedily to its end-of-turn token or to a cap. Two things shorten text without any
thought behind it: the cap, and output that broke; so the length is never reported without the share of
answers that ended and, where the right answer is known, the share that contains it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.measure.registry import measure
from actlas.measure.samples import mean_measurement, rate_measurement

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

BATCH = 32


@dataclass(frozen=True)
class Written:
    """Answers to prompts, in their order.

    Attributes:
        prompts: the prompts as the model read them (chat template included).
        texts: the answers.
        tokens: int64 `[n]`, tokens of each answer, its end-of-turn token included.
        ended: bool `[n]`, whether it ended by itself before the cap.
        seconds: wall-clock time of all of them.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: NDArray[np.int64]
    ended: NDArray[np.bool_]
    seconds: float


def write_answers(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    chat: bool | None = None,
    instruction: str = "",
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = BATCH,
    edits: Sequence[Edit | None] | None = None,
) -> Written:
    """Write an answer to each prompt; installed edits apply.

    Args:
        model: a language model that generates.
        prompts: questions, as text.
        max_new_tokens: the cap.
        chat: put the chat template around a prompt; `None` does so where the model has one.
        instruction: a line that is put before each question (the prompt-only baseline), or empty.
        temperature, seed: of the sampling; 0 is greedy.
        batch: answers that are written at once.
        edits: one edit (or `None`) for each prompt, so that one batch answers under several.

    Raises:
        InputError: no prompts, or an empty one.
        ModelError: a chat was asked for and the model has no template.
    """
    if not prompts:
        raise InputError("there are no prompts to answer; give at least one")
    rendered = [render_prompt(model, f"{instruction}\n{p}" if instruction else p, chat) for p in prompts]
    order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))
    texts, tokens, ended = (
        [""] * len(rendered),
        np.zeros(len(rendered), np.int64),
        np.zeros(len(rendered), bool),
    )
    ends = _end_tokens(model)
    start = time.perf_counter()
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        made = model.generate(
            [rendered[i] for i in rows],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + first,
            edits_by_row=None if edits is None else [edits[i] for i in rows],
        )
        for i, text, ids in zip(rows, made.texts, made.tokens, strict=True):
            texts[i], tokens[i] = text, len(ids)
            ended[i] = len(ids) > 0 and int(ids[-1]) in ends
    return Written(tuple(rendered), tuple(texts), tokens, ended, time.perf_counter() - start)


def render_prompt(model: Model, prompt: str, chat: bool | None = None) -> str:
    """Return a prompt as the model reads it: inside its chat template, if it has one and `chat` allows."""
    template = getattr(model.tokenizer, "chat_template", None)
    if not prompt.strip():
        raise InputError("one of the prompts is empty; leave it out")
    if chat and not template:
        raise ModelError(f"{model.name} has no chat template; ask with chat=False")
    if chat is False or not template:
        return prompt
    message = [{"role": "user", "content": prompt}]
    text: str = model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return text


def holds_answer(text: str, answer: str) -> bool:
    """Return whether a text contains the right answer: a number as a whole number, a word in any case."""
    wanted = answer.strip()
    if re.fullmatch(r"-?\d+", wanted):
        return re.search(rf"(?<![\d.]){re.escape(wanted)}(?!\d|\.\d)", text.replace(",", "")) is not None
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE) is not None


@measure(
    "answer-length",
    summary="how many tokens an answer takes, how many answers end by themselves, how many are right",
    unit="tokens",
    needs=("causal-lm",),
    data="task",
    quick={"most": 4, "max_new_tokens": 24},
    source="Activation Steering for Chain-of-Thought Compression, the measured quantities",
)
def answer_length(
    model: Model,
    task: Any,
    *,
    seed: int = 0,
    max_new_tokens: int = 64,
    most: int = 64,
    chat: bool | None = None,
    instruction: str = "",
) -> list[Measurement]:
    """Write answers to a task's prompts and measure length, ends and rightness.

    Args:
        model: see `write_answers`.
        task: items with `.prompt` and `.answer`, or `(prompt, answer)` pairs, or prompts alone.
        seed: of the bootstrap.
        max_new_tokens, chat, instruction: see `write_answers`.
        most: how many of the items are used.

    Returns:
        `answer-length` (tokens, capped), `answer-ended` and, where answers are known, `answer-accuracy`.

    Raises:
        InputError: no items, or items of another form.
    """
    items = [_item(item, i) for i, item in enumerate(list(task)[:most])]
    written = write_answers(
        model,
        [p for p, _ in items],
        max_new_tokens=max_new_tokens,
        chat=chat,
        instruction=instruction,
        seed=seed,
    )
    return measure_written(written, [a for _, a in items], cap=max_new_tokens, seed=seed)


def measure_written(
    written: Written, answers: Sequence[str | None], *, cap: int, seed: int = 0, **group: str
) -> list[Measurement]:
    """Return the measurements of answers that were written already; see `answer_length`."""
    found = [
        mean_measurement(
            "answer-length", "tokens", written.tokens, seed=seed, over="prompts", better="lower", group=group,
            note=f"greedy, to the end-of-turn token or {cap} tokens", details={"cap": cap},
        ),
        rate_measurement("answer-ended", written.ended, seed=seed, better="higher", group=group),
    ]  # fmt: skip
    if all(a is not None for a in answers):
        right = [holds_answer(t, str(a)) for t, a in zip(written.texts, answers, strict=True)]
        found.append(rate_measurement("answer-accuracy", right, seed=seed, better="higher", group=group))
    return found


def _item(item: Any, number: int) -> tuple[str, str | None]:
    if isinstance(item, str):
        return item, None
    if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(x, str) for x in item):
        return item[0], item[1]
    if hasattr(item, "prompt") and hasattr(item, "answer"):
        return str(item.prompt), str(item.answer)
    raise InputError(
        f"item {number} is {type(item).__name__}; give a prompt, (prompt, answer), or a task's items"
    )


def _end_tokens(model: Model) -> set[int]:
    config = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    ends = set(config) if isinstance(config, (list, tuple)) else {config}
    ends.add(getattr(model.tokenizer, "eos_token_id", None))
    return {int(e) for e in ends if e is not None}
