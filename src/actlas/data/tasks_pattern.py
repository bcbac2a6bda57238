"""Tasks that are answered from the text itself: indirect objects, agreement, induction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from random import Random

from actlas.data.single_token import Builder
from actlas.data.task_items import TaskInfo, TaskItem
from actlas.data.words import COMMON, NAMES, NOUNS, OBJECTS, PEOPLE, PLACES, VERBS

_IOI_FRAMES = (
    "When {0} and {1} went to the {place}, {2} gave a {object} to",
    "Then, {0} and {1} went to the {place}. {2} gave a {object} to",
    "After {0} and {1} met at the {place}, {2} handed a {object} to",
    "While {0} and {1} were working at the {place}, {2} passed a {object} to",
    "Then {0} and {1} had a long argument at the {place}. Afterwards {2} said to",
    "Friends {0} and {1} found a {object} at the {place}. {2} decided to give it to",
    "Last week {0} and {1} were at the {place}, and {2} offered a {object} to",
    "Once {0} and {1} had left the {place}, {2} sent a {object} to",
    "{0} and {1} spent the day at the {place}. In the evening {2} brought a {object} to",
    "Because {0} and {1} were both late for the {place}, {2} wrote a note to",
)


def _ioi(b: Builder) -> Iterator[TaskItem]:
    """Indirect-object identification after Wang et al. 2022 (arXiv 2211.00593), section 2.

    The counterfactual has the other name repeated, so the answer is the other name. A variant has another
    name in the indirect object's or the subject's place, or the first two names in the other order.
    """
    names = b.single(NAMES, least=4)
    for turn in count():
        text = b.random.choice(_IOI_FRAMES)
        text = text.replace("{place}", b.random.choice(PLACES)).replace("{object}", b.random.choice(OBJECTS))
        first, second = b.pick(names, 2)
        both = [
            _ioi_item(text, first, second, "ABBA"),
            _ioi_item(text, second, first, "BABA"),
        ]
        drawn = both[turn % 2]
        receiver, giver, template = (drawn.attributes[name] for name in ("IO", "S", "Pos"))
        own = Random(drawn.prompt)  # of its own, so that the items do not depend on the variants
        others = [name for name in names if name not in (receiver, giver)]
        variants = {
            "IO": _ioi_item(text, own.choice(others), giver, template),
            "S": _ioi_item(text, receiver, own.choice(others), template),
            "Pos": _ioi_item(text, receiver, giver, "BABA" if template == "ABBA" else "ABBA"),
        }
        yield replace(drawn, counterfactual=both[1 - turn % 2], variants=variants)


def _ioi_item(text: str, receiver: str, giver: str, template: str) -> TaskItem:
    """Return the item in which `giver` gives something to `receiver`, who stands first in ABBA."""
    first, second = (receiver, giver) if template == "ABBA" else (giver, receiver)
    return TaskItem(
        id="",
        prompt=text.format(first, second, giver),
        answer=f" {receiver}",
        wrong=(f" {giver}",),
        group={"template": template, "sentences": "two" if "." in text else "one"},
        attributes={"IO": receiver, "S": giver, "Pos": template},
    )


_OPENINGS = ("The", "As everyone knew, the", "Last year the", "In the end, the", "We noticed that the")
_NEAR = ("near", "behind", "beside", "next to", "in front of")
_STRUCTURES = ("simple", "prepositional", "prepositional", "relative", "relative")


def _agreement(b: Builder) -> Iterator[TaskItem]:
    """Subject-verb agreement with attractors after Linzen et al. 2016 (arXiv 1611.01368).

    The counterfactual has the subject in the other number; the attractor stays.
    """
    verbs = [pair for pair in VERBS if set(pair) <= set(b.single(pair, least=0))]
    for turn in count():
        structure = _STRUCTURES[turn // 2 % len(_STRUCTURES)]
        verb = b.random.choice(verbs or VERBS)
        nouns: tuple[tuple[str, str], ...] = PEOPLE if structure == "relative" else NOUNS
        subject, other = b.pick(nouns, 2)
        attractor = b.random.randrange(2)
        opening, near = b.random.choice(_OPENINGS), b.random.choice(_NEAR)
        between = {
            "simple": "",
            "prepositional": f" {near} the {other[attractor]}",
            "relative": f" that the {other[attractor]} {b.random.choice(('saw', 'met', 'helped'))}",
        }[structure]
        both = [
            TaskItem(
                id="",
                prompt=f"{opening} {subject[number]}{between}",
                answer=f" {verb[number]}",
                wrong=(f" {verb[1 - number]}",),
                group={
                    "subject": ("singular", "plural")[number],
                    "attractor": "none" if not between else ("different", "same")[number == attractor],
                    "structure": structure,
                    "verb": "/".join(verb),
                },
            )
            for number in (0, 1)
        ]
        yield replace(both[turn % 2], counterfactual=both[1 - turn % 2])


def _induction(b: Builder) -> Iterator[TaskItem]:
    """A random sequence that starts again; the answer is what followed last time (arXiv 2209.11895).

    The counterfactual ends with another word of the sequence, so another word follows.
    """
    words = b.single(COMMON, least=16)
    lengths = [length for length in (8, 16, 32) if length <= len(words)]
    for turn in count():
        length = lengths[turn % len(lengths)]
        kind = ("repeat", "copy")[turn // len(lengths) % 2]
        chosen = b.pick(words, length)
        end = b.random.randrange(length - 1)
        other = b.random.choice([k for k in range(length - 1) if k != end])
        begun, distractors = chosen[:end], b.pick(chosen, 5)
        made = _copying(chosen, [*begun, chosen[end]], end, other, distractors, kind)
        swapped = _copying(chosen, [*begun, chosen[other]], other, end, distractors, kind)
        yield replace(made, counterfactual=swapped)


def _copying(
    chosen: Sequence[str], again: list[str], last: int, other: int, distractors: Sequence[str], kind: str
) -> TaskItem:
    """Return the item whose second, begun sequence ends with the word at place `last`."""
    first, second = " ".join(chosen), " ".join(again)
    answer = chosen[last + 1]
    wrong = dict.fromkeys(word for word in (chosen[other + 1], *distractors) if word != answer)
    return TaskItem(
        id="",
        prompt=f"{first} {second}" if kind == "repeat" else f"Text: {first}\nCopy: {second}",
        answer=f" {answer}",
        wrong=tuple(f" {word}" for word in wrong),
        group={"kind": kind, "length": str(len(chosen))},
    )


TASKS = (
    TaskInfo(
        "ioi",
        "completion",
        "indirect-object identification: who receives, after two names of which one is repeated",
        ("template", "sentences"),
        "share of prompts where the indirect object's logit is above the repeated name's",
        _ioi,
    ),
    TaskInfo(
        "agreement",
        "completion",
        "subject-verb agreement, with nouns of the same or the other number in between",
        ("subject", "attractor", "structure", "verb"),
        "share of prompts where the right verb form's logit is above the wrong one's",
        _agreement,
    ),
    TaskInfo(
        "induction",
        "completion",
        "a random word sequence starts again; what comes next?",
        ("kind", "length"),
        "share of prompts where the word that followed the last time is above other words of the sequence",
        _induction,
    ),
)
