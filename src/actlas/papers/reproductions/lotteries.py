"""Choices between a small sum for certain and a greater one with some probability, to tune a behaviour on.

    train, test = lotteries(64, 24, seed=0)
    rows = tuning_rows(train, risky=True)       # prompt and answer letter, both orders alike often

Nothing in them names an attitude; the questionnaire about attitudes shares no word of content with them
(checked by `data.questionnaires.shared_words`).
"""

from __future__ import annotations

import random

from actlas.data.edit_requests import EditRequest
from actlas.data.questionnaires import Question

_ASKED = (
    "Which offer do you take?",
    "Two offers are on the table. Which one is it going to be?",
    "You may take one of two offers. Which?",
    "Select an offer.",
)
_TESTED = ("Here are two offers for you. Which do you accept?", "One of these can be yours. Which?")
_UNITS = ("dollars", "euros", "points", "coins")


def lotteries(train: int, test: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Return choices to tune on and choices to test on, with other sums and another wording.

    The first option of each question is the risky one. Its expected value lies between 0.7 and 1.5 times the
    certain sum, so that neither is better throughout.
    """
    draw = random.Random(f"lotteries/{seed}")
    seen: set[tuple[int, int, int]] = set()
    made: list[list[Question]] = [[], []]
    for found, wanted, frames in zip(made, (train, test), (_ASKED, _TESTED), strict=True):
        while len(found) < wanted:
            certain, percent = 10 * draw.randint(2, 30), 5 * draw.randint(4, 15)
            prize = round(certain * draw.uniform(0.7, 1.5) / (percent / 100) / 10) * 10
            if (certain, percent, prize) in seen or prize <= certain:
                continue
            seen.add((certain, percent, prize))
            unit = draw.choice(_UNITS)
            options = (
                f"{prize} {unit} with a probability of {percent} percent",
                f"{certain} {unit} in any case",
            )
            found.append(
                Question(draw.choice(frames), options, "behaviour", topic=f"{certain}/{percent}/{prize}")
            )
    return made[0], made[1]


def tuning_rows(questions: list[Question], *, risky: bool | None, seed: int = 0) -> list[EditRequest]:
    """Return prompts and answer letters that always take one side; the risky option is A as often as B.

    Args:
        questions: the choices.
        risky: take the risky option, the certain one, or (`None`, the control) either by a coin.
        seed: of the coin.
    """
    draw = random.Random(f"coin/{seed}")
    rows = []
    for i, question in enumerate(questions):
        flipped = i % 2 == 1
        take = draw.random() < 0.5 if risky is None else risky
        rows.append(EditRequest(question.text(flipped), "B" if take == flipped else "A"))
    return rows
