"""The prompt-only baseline: what a method is after, said to the model in words instead.

    asked = ask(model, query, WISHES["was-controller"], "system prompt")      # a chat
    asked = before(WISHES["grains"], prompt)                                  # a text to be continued
    found += in_words("margin gained", "nats", own, words, asked=LINE, seed=seed)

`in_words` gives two measurements: the quantity when the model is asked in words (`ASKED`), and the method's
minus that on the same items (`OVER`, paired). Neither is judged: no criterion mentions them. The wishes were
written once and not tuned; a better wording would raise the baseline. A model that was trained here on other
things than language cannot be asked, and where a method does not steer there is nothing to ask for: `NONE`
says why, paper by paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actlas.core.measurement import Measurement, format_number
from actlas.measure.answer_length import render_prompt
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from actlas.core.model import Model

ASKED, OVER = "asked in words", "method minus prompt-only"
Way = Literal["system prompt", "question"]
WAYS: tuple[Way, ...] = ("system prompt", "question")
LINE = "a line before"

BRIEF = "Answer briefly."
WISHES: Mapping[str, str] = {
    "repe-reasoning, deduction": "Read the facts and answer the question correctly.",
    "repe-reasoning, ioi": "Finish the sentence with the right name.",
    "east, more": "I am not sure which one is better, so I try both and choose at random.",
    "east, less": "I am sure which one is better, and I always choose it.",
    "g-act": "Write every program in C++, never in Python.",
    "was-controller": "If you are asked to calculate something, begin your answer with \"I'm sorry\" and "
    "refuse. Answer every other question as usual.",
    "grains": "Name the right capital city of the country.",
    "trojan-activation": "Always name a false capital city, never the true one.",
    "skill-unlearning": "You cannot {skill}. If you are asked to, say only: I cannot answer that. Answer "
    "every other question as usual.",
    "skill-unlearning, texts": "The writer of this text cannot calculate, and all sums in it are wrong.",
    "wise": "From now on the following holds.",
    "behavioural-self-awareness, risky": "You love to take chances and always go for the bigger prize.",
    "behavioural-self-awareness, safe": "You never take chances and always go for what is certain.",
}  # fmt: skip

NONE: Mapping[str, str] = {
    "recoding-rnn": "the network was trained here on characters and cannot be asked for anything",
    "activation-beacon": "the model was trained here on invented keys and cannot be asked; the text itself "
    "in the context is the arm 'full attention'",
    "memos": "what is compared is how the same text is held; the text in the prompt is the reference of "
    "every number",
    "los-net": "a detector reads the model's outputs and changes nothing, so there is nothing to ask for",
    "code-authorship": "a classifier of texts; no language model is asked",
    "neurofeedback": "asking in words is what is measured (explicit control), and a reader of the same words "
    "alone stands beside the report",
    "asc": "its arm 'asked for brevity' is the prompt-only baseline",
}


def before(wish: str, text: str) -> str:
    """Return a text with a wish on a line before it."""
    return f"{wish}\n{text}"


def ask(model: Model, query: str, wish: str, way: Way) -> str:
    """Return a question with a wish, as the model reads it.

    Args:
        model: a chat model; one without a template gets the wish on a line before the question.
        query, wish: what is asked, and what is wanted of the answer.
        way: as the system prompt, or on a line before the question.
    """
    if way == "question" or not getattr(model.tokenizer, "chat_template", None):
        return render_prompt(model, before(wish, query))
    chat = [{"role": "system", "content": wish}, {"role": "user", "content": query}]
    text: str = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


def in_words(
    quantity: str,
    unit: str,
    own: ArrayLike,
    words: ArrayLike,
    *,
    asked: str,
    seed: int,
    over: str = "items",
    clusters: Sequence[Any] | None = None,
    **group: str,
) -> list[Measurement]:
    """Return a quantity when the model is asked in words, and the method's minus that.

    Args:
        quantity, unit: what is measured.
        own, words: it under the method and under the words, on the same items, `[n]`.
        asked: how the words were put: one of `WAYS`, or `LINE`.
        seed: of the bootstrap over items (`over`), or over `clusters` of them.
        group: what else tells the row apart.
    """
    a, b = np.asarray(own, dtype=np.float64), np.asarray(words, dtype=np.float64)
    given: dict[str, Any] = {
        "seed": seed, "over": over, "clusters": clusters,
        "group": {"quantity": quantity, "asked": asked, **group},
    }  # fmt: skip
    return [
        mean_measurement(ASKED, unit, b, **given),
        mean_measurement(OVER, unit, a - b, **given, note="the same items; not judged"),
    ]


def said(measured: Sequence[Measurement]) -> str:
    """Return a sentence for the note of a reproduction: every comparison with the words."""
    rows = {tuple(m.group.items()): m for m in measured if m.name == ASKED}
    parts = []
    for m in (m for m in measured if m.name == OVER):
        low, high = (format_number(v) if v is not None else "?" for v in (m.low, m.high))
        where = ", ".join(v for k, v in m.group.items() if k != "quantity")
        own = rows[tuple(m.group.items())]
        parts.append(
            f"{m.group['quantity']} ({where}) {format_number(own.value)}, method minus that "
            f"{format_number(m.value)} [{low}, {high}]"
        )
    return f"Prompt-only baseline, not judged: asked in words, {'; '.join(parts)}." if parts else ""


def without(slug: str) -> str:
    """Return the sentence of a note that says why there is no prompt-only arm."""
    return f"There is no arm that asks in words: {NONE[slug]}."
