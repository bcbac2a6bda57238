"""Prompts for gates: three skills, each in templates to fit on and in others that only tests see.

    skill("arithmetic", 40, seed=0)                     # "What is 31 plus 54?", ...
    skill("arithmetic", 40, seed=0, held_out=True)      # "Find the sum of 12 and 30.", ...

`CODE_TASKS` are small programming tasks, and `sums(...)` are longer texts of one skill.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from actlas.core.errors import InputError
from actlas.data.facts_table import CLEAR

SKILLS = ("arithmetic", "coding", "geography")

_FIT = {
    "arithmetic": (
        "What is {a} plus {b}?",
        "Compute {a} times {b}.",
        "Calculate {c} minus {a}.",
        "Please add {a} and {b}.",
    ),
    "coding": (
        "Write a Python function to {task}.",
        "Write Python code to {task}.",
        "How do I {task} in Python?",
        "Show me a Python program to {task}.",
    ),
    "geography": (
        "What is the capital of {country}?",
        "Which continent is {country} in?",
        "Name the capital city of {country}.",
        "Where in the world is {capital}?",
    ),
}
_HELD_OUT = {
    "arithmetic": (
        "I had {a} apples and got {b} more. How many do I have now?",
        "If you take {a} away from {c}, what is left?",
        "Find the sum of {a} and {b}.",
    ),
    "coding": (
        "I need a script that can {task}; please use Python.",
        "Implement a routine to {task}.",
        "Help me code something to {task}.",
    ),
    "geography": (
        "I am flying to {country}. In which city does its government sit?",
        "{capital} is the capital of which country?",
        "Tell me on which continent I can find {country}.",
    ),
}
_SMALL_TALK = (
    "Tell me a story about a {thing}.",
    "Write a poem about the {thing}.",
    "Why do people like a {thing}?",
    "Describe a {thing} in one sentence.",
    "What do you think of a {thing}?",
)
_SMALL_TALK_HELD_OUT = (
    "Give me three names for a {thing}.",
    "Write a letter to a friend about your {thing}.",
    "How would you explain a {thing} to a child?",
)
_THINGS = (
    "river", "fox", "garden", "castle", "ship", "winter", "mountain", "friend", "dream", "horse", "teacher",
    "window", "song", "market", "bridge", "cat", "forest", "king", "storm", "island", "letter", "lamp",
    "bird", "door", "village",
)  # fmt: skip

CODE_TASKS = (
    "compute the trapezoid rule", "sort a list of numbers", "reverse a string", "multiply two matrices",
    "find the largest prime below n", "read a text file", "count the words in a sentence",
    "merge two sorted arrays", "compute the greatest common divisor", "search a binary tree",
    "print the Fibonacci numbers", "parse a date", "find the shortest path in a graph", "draw a histogram",
    "solve a quadratic equation", "check whether a word is a palindrome", "compute a factorial",
    "convert Celsius to Fahrenheit", "find duplicates in a list", "simulate a coin toss",
    "integrate a differential equation", "estimate pi by random sampling", "invert a matrix",
    "compute the mean and variance", "find the roots of a polynomial", "remove spaces from a text",
    "rotate an array", "count the bits of an integer", "generate a random password", "validate an email",
    "implement a stack", "implement a queue", "compute a running average", "filter even numbers",
    "find the median of a list", "encrypt a message with a Caesar cipher", "decode a binary number",
    "list the files in a folder", "compute the distance between two points", "sum the digits of a number",
    "find the longest word", "play rock paper scissors", "build a hash table", "compress a string",
    "compute a dot product", "fit a straight line", "interpolate between points", "count the vowels",
    "solve the eight queens problem", "compute powers of two", "transpose a matrix", "smooth a signal",
    "simulate a random walk", "find the intersection of two lists", "print a multiplication table",
    "compute the Fourier transform", "sort words by length", "check for balanced brackets",
    "convert a number to Roman numerals", "compute compound interest", "find the minimum of a function",
    "model a bank account", "print a calendar", "shuffle a deck of cards",
)  # fmt: skip


def skill(name: str, n: int, seed: int, *, held_out: bool = False) -> list[str]:
    """Return `n` different queries of a skill (`SKILLS`, or `"small talk"`).

    Args:
        name: which.
        n: how many.
        seed: the same seed gives the same queries.
        held_out: from templates (and programming tasks) that the others do not have.
    """
    draw = random.Random(f"{name}/{seed}/{held_out}")
    templates: tuple[str, ...]
    if name == "small talk":
        templates = _SMALL_TALK_HELD_OUT if held_out else _SMALL_TALK
    else:
        templates = (_HELD_OUT if held_out else _FIT)[name]
    tasks = CODE_TASKS[40:] if held_out else CODE_TASKS[:40]
    return _different(lambda: _filled(draw, draw.choice(templates), tasks), n, name)


def sums(n: int, seed: int) -> list[str]:
    """Return `n` texts of solved sums, a dozen lines each."""
    draw = random.Random(f"sums/{seed}")

    def text() -> str:
        lines = []
        for _ in range(12):
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            lines.append(
                draw.choice(
                    (
                        f"{a} + {b} = {a + b}",
                        f"{a + b} - {a} = {b}",
                        f"{a} * {b} = {a * b}",
                        f"The sum of {a} and {b} is {a + b}.",
                        f"If x = {a} and y = {b}, then x + y = {a + b}.",
                    )
                )
            )
        return "\n".join(lines)

    return _different(text, n, "sums")


def _filled(draw: random.Random, template: str, tasks: tuple[str, ...]) -> str:
    a, b = draw.randint(3, 99), draw.randint(3, 99)
    place = draw.choice(CLEAR)
    return template.format(
        a=a,
        b=b,
        c=a + b,
        task=draw.choice(tasks),
        country=place.name,
        capital=place.capital,
        thing=draw.choice(_THINGS),
    )


def _different(make: Callable[[], str], n: int, name: str) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(200 * n + 1000):
        if len(found) == n:
            return list(found)
        found[make()] = None
    raise InputError(f"the templates of {name} make {len(found)} different texts, not {n}")
