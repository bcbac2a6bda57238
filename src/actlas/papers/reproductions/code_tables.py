"""Prompts that hide a code in a table and ask for it, with one question answered as an example.

table = code_tables(8, people=12, seed=0)[0]
    table.prompt    # 'The code of Alice is 48213. ... Question: What is the code of Ben? ...'
table.code      # '90311'
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_NAMES = (
    "Alice",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Karen",
    "Liam",
    "Mary",
    "Noah",
    "Olive",
    "Paul",
    "Quinn",
    "Rosa",
    "Simon",
    "Tina",
)


@dataclass(frozen=True)
class CodeTable:
    """A prompt and the code that it asks for."""

    prompt: str
    code: str


def code_tables(n: int, people: int, seed: int = 0) -> list[CodeTable]:
    """Return `n` prompts with a table of `people` codes each (at most 20)."""
    draw = random.Random(f"code tables/{seed}")
    found = []
    for _ in range(n):
        names = draw.sample(_NAMES, people)
        codes = {name: str(draw.randint(10000, 99999)) for name in names}
        asked, example = draw.sample(names, 2)
        table = " ".join(f"The code of {name} is {code}." for name, code in codes.items())
        question = "\n\nQuestion: What is the code of {0}?\nAnswer: The code of {0} is"
        prompt = f"{table}{question.format(example)} {codes[example]}.{question.format(asked)}"
        found.append(CodeTable(prompt, codes[asked]))
    return found
