"""Two-armed bandits told as text: what was played and what it paid, up to just before the next choice.

    Machine A and machine B pay points each time. ...
    A paid 52. B paid 47. ...
    Next I choose machine

Payments are Gaussian with standard deviation 10 and means `gap` standard deviations apart. The order in
which the arms are introduced, which one is better, how many rounds were played and the gap are drawn for
each prompt, so that neither a letter nor a place tells the better arm.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SPREAD = 10.0
ARMS = ("A", "B")
ACTIONS = (" A", " B")
_WORDS = {
    "machines": (
        "There are two machines, {0} and {1}. Each time I play one, it pays points. I want to earn as many "
        "points as I can.\n",
        "Machine {arm} paid {paid}.",
        "\nSo next I play machine",
    ),
    "cafes": (
        "I know two cafes, {0} and {1}, and rate every visit. I try to eat as well as possible.\n",
        "Cafe {arm}: {paid} points.",
        "\nToday I go to cafe",
    ),
}


@dataclass(frozen=True)
class Bandit:
    """One prompt and what is known about it.

    Attributes:
        prompt: ends just before the arm's letter.
        rounds: how many payments the agent has seen.
        gap: difference of the arms' means, in standard deviations.
        better: the better arm.
        evidence: difference of the observed means in standard errors (positive: A better); 0 if an arm
            was never played.
    """

    prompt: str
    rounds: int
    gap: float
    better: str
    evidence: float


def bandits(n: int, *, words: str = "machines", rounds: int = 8, seed: int = 0) -> list[Bandit]:
    """Return `n` prompts.

    Args:
        n: how many; the letters' order and the better arm are balanced among them.
        words: the story, one of `"machines"` and `"cafes"`.
        rounds: from 1 to so many payments in a prompt.
        seed: of everything that is drawn.
    """
    draw = random.Random(f"{words}/{seed}")
    made = []
    for i in range(n):
        order = ARMS if i % 2 == 0 else ARMS[::-1]
        better = ARMS[i // 2 % 2]
        gap = draw.uniform(0.0, 4.0)
        base = draw.randint(35, 65)
        means = {arm: base + (gap if arm == better else -gap) * SPREAD / 2 for arm in ARMS}
        played = [draw.choice(ARMS) for _ in range(draw.randint(1, rounds))]
        paid = [(arm, max(0, round(draw.gauss(means[arm], SPREAD)))) for arm in played]
        start, line, end = _WORDS[words]
        story = " ".join(line.format(arm=arm, paid=value) for arm, value in paid)
        prompt = start.format(*order) + story + end
        made.append(Bandit(prompt, len(paid), gap, better, _evidence(paid)))
    return made


def _evidence(paid: Sequence[tuple[str, int]]) -> float:
    of = {arm: [v for a, v in paid if a == arm] for arm in ARMS}
    if not of["A"] or not of["B"]:
        return 0.0
    error = SPREAD * (1 / len(of["A"]) + 1 / len(of["B"])) ** 0.5
    return float(sum(of["A"]) / len(of["A"]) - sum(of["B"]) / len(of["B"])) / error
