"""Tasks that are answered from knowledge: capitals, capitals against the context, sums, multiple choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from actlas.data.facts_table import CLEAR, COUNTRIES, Country
from actlas.data.single_token import Builder
from actlas.data.task_items import TaskInfo, TaskItem
from actlas.data.words import CATEGORIES, NUMBERS, OPPOSITES, with_articles

_CAPITAL_FRAMES = (
    "The capital of {} is",
    "The capital city of {} is",
    "{}'s capital is the city of",
    "Q: What is the capital of {}?\nA:",
    "As every traveller knows, the capital of {} is",
    "The government of {} has its seat in the capital,",
    "If you fly to the capital of {}, you land in",
    "Country: {}\nCapital:",
    "Question: {}'s capital is which city?\nAnswer:",
)


def _form(frame: str) -> str:
    """Return what a prompt looks like: a question, labelled fields or a statement."""
    return "question" if "?" in frame else "fields" if frame.startswith("Country:") else "statement"


def _known(b: Builder, least: int = 6) -> list[Country]:
    """Return the countries whose capital is one token."""
    capitals = set(b.single((c.capital for c in COUNTRIES if " " not in c.capital), least))
    return [c for c in COUNTRIES if c.capital in capitals]


def _others(b: Builder, countries: list[Country], country: Country, n: int) -> list[str]:
    """Return up to `n` other capitals, those of the same continent first."""
    rest = [c for c in countries if c.capital != country.capital]
    b.random.shuffle(rest)
    rest.sort(key=lambda c: c.continent != country.continent)
    return [c.capital for c in rest[:n]]


def _spaced(words: list[str]) -> tuple[str, ...]:
    return tuple(f" {word}" for word in dict.fromkeys(words))


def _capitals(b: Builder) -> Iterator[TaskItem]:
    """Country and capital; the counterfactual asks for a country whose name has as many tokens."""
    countries = _known(b)
    lengths = {c.name: len(b.tokens.ids(f"of {c.name}")) for c in countries}
    for _ in count():
        frame = b.random.choice(_CAPITAL_FRAMES)
        country = b.random.choice(countries)
        alike = [c for c in countries if c != country and lengths[c.name] == lengths[country.name]]
        other = b.random.choice(alike or [c for c in countries if c != country])
        made, swapped = (
            TaskItem(
                id="",
                prompt=frame.format(asked.name),
                answer=f" {asked.capital}",
                wrong=_spaced([tempting.capital, *_others(b, countries, asked, 4)]),
                group={"continent": asked.continent, "form": _form(frame)},
            )
            for asked, tempting in ((country, other), (other, country))
        )
        yield replace(made, counterfactual=swapped)


_CONTEXT_FRAMES = (
    "The capital of {0} is {1}. Q: What is the capital of {0}? A:",
    "The capital of {0} is {1}. The capital of {0} is",
    "Context: the capital of {0} was moved to {1}.\nQuestion: What is the capital of {0}?\nAnswer:",
    "In this story, {1} is the capital of {0}. So the capital of {0} is",
    "Since last year the capital of {0} is {1}. Today, the capital city of {0} is",
    "According to the text, {0} has the capital {1}. According to the text, the capital of {0} is",
)


def _capitals_counterfactual(b: Builder) -> Iterator[TaskItem]:
    """The context names a wrong capital (knowledge conflict, after Minder et al. 2024, arXiv 2411.07404).

    The counterfactual's context names the true one.
    """
    countries = _known(b)
    for _ in count():
        frame = b.random.choice(_CONTEXT_FRAMES)
        country, stranger = b.pick(countries, 2)
        made, true = (
            TaskItem(
                id="",
                prompt=frame.format(country.name, said),
                answer=f" {said}",
                wrong=(f" {unsaid}",),
                group={"continent": country.continent, "form": _form(frame)},
            )
            for said, unsaid in ((stranger.capital, country.capital), (country.capital, stranger.capital))
        )
        yield replace(made, counterfactual=true)


_SUM_FRAMES = {
    "symbols": "{} =",
    "sentence": "The sum {} is equal to",
    "question": "Q: What is {}?\nA:",
    "examples": "1 + 2 = 3\n4 + 1 = 5\n{} =",
}


def _arithmetic(b: Builder) -> Iterator[TaskItem]:
    long = any(b.tokens.one(*parts) is not None for parts in (("3 + 9 =", " 12"), ("3 + 9 = ", "12")))
    long = long or not b.tokens.known
    shapes = (("1-digit", 2), ("2-digit", 2), ("1-digit", 3))
    for turn in count():
        size, terms = shapes[turn // 2 % len(shapes)]
        frame = "words" if turn % 2 else b.random.choice(tuple(_SUM_FRAMES))
        top = len(NUMBERS) - 1 if frame == "words" else 198 if long else 9
        for _ in range(50):
            first = b.random.randint(10, 99) if size == "2-digit" else b.random.randint(1, 9)
            wide = size == "2-digit" and b.random.random() < 0.5
            rest = [b.random.randint(10, 99) if wide else b.random.randint(1, 9) for _ in range(terms - 1)]
            last = b.random.randint(10, 99) if wide else b.random.randint(1, 9)
            if first + sum(rest) <= top and first + sum(rest[:-1]) + last <= top and last != rest[-1]:
                yield _sum([first, *rest], [first, *rest[:-1], last], frame, size)
                break


def _sum(numbers: list[int], other: list[int], frame: str, size: str) -> TaskItem:
    """Return one sum whose counterfactual has another last operand."""
    made = _addition(numbers, sum(other), frame, size)
    return replace(made, counterfactual=_addition(other, sum(numbers), frame, size))


def _addition(operands: list[int], tempting: int, frame: str, size: str) -> TaskItem:
    total = sum(operands)
    written = NUMBERS if frame == "words" else [str(value) for value in range(max(total, tempting) + 11)]
    near = [tempting, total + 1, total - 1, total + 10, total - 10, operands[0]]
    if frame == "words":
        prompt = f"{' plus '.join(written[n] for n in operands)} equals"
    else:
        prompt = _SUM_FRAMES[frame].format(" + ".join(written[n] for n in operands))
    carry = any(sum(n % 10**k for n in operands) >= 10**k for k in (1, 2))
    return TaskItem(
        id="",
        prompt=prompt,
        answer=f" {written[total]}",
        wrong=_spaced([written[v] for v in near if 0 <= v < len(written) and v != total]),
        group={
            "size": size,
            "terms": str(len(operands)),
            "carry": "yes" if carry else "no",
            "format": frame,
        },
    )


_LETTERS = "ABCD"
_LAYOUTS = (("{}. {}", "Answer:"), ("{}) {}", "Answer:"), ("{}: {}", "The right answer is"))


def _questions(b: Builder, topic: str) -> tuple[str, str, list[str]]:
    """Return a question, its right answer and three wrong ones."""
    if topic in ("capital", "continent"):
        country = b.random.choice(COUNTRIES if topic == "capital" else CLEAR)
        if topic == "capital":
            question = f"What is the capital of {country.name}?"
            return question, country.capital, _others(b, list(COUNTRIES), country, 3)
        places = sorted({c.continent for c in COUNTRIES} - {country.continent})
        return f"On which continent is {country.name}?", country.continent, b.pick(places, 3)
    if topic == "sum":
        first, second = b.random.randint(2, 49), b.random.randint(2, 49)
        near = [first + second + d for d in (-10, -2, -1, 1, 2, 10) if first + second + d > 0]
        return f"What is {first} + {second}?", str(first + second), [str(v) for v in b.pick(near, 3)]
    if topic == "opposite":
        pair, *others = b.pick(OPPOSITES, 4)
        asked = b.random.randrange(2)
        question = f"Which word means the opposite of {pair[asked]!r}?"
        return question, pair[1 - asked], [b.random.choice(other) for other in others]
    category, *rest = b.pick(tuple(CATEGORIES), 4)
    right = b.random.choice(CATEGORIES[category])
    wrong = [b.random.choice([w for w in CATEGORIES[k] if w not in CATEGORIES[category]]) for k in rest]
    return with_articles(f"Which of these is a {category}?"), right, wrong


def _multiple_choice(b: Builder) -> Iterator[TaskItem]:
    """Four lettered options; in the counterfactual the right one has changed places with a wrong one."""
    topics = ("capital", "continent", "sum", "opposite", "category")
    for turn in count():
        topic = topics[turn % len(topics)]
        question, right, wrong = _questions(b, topic)
        line, ending = b.random.choice(_LAYOUTS)
        place = turn // len(topics) % 4
        other = b.random.choice([k for k in range(4) if k != place])
        if len({right, *wrong}) < 4:
            continue
        options = [*wrong[:place], right, *wrong[place:]]
        exchanged = list(options)
        exchanged[place], exchanged[other] = options[other], options[place]
        made, swapped = (
            TaskItem(
                id="",
                prompt=f"Question: {question}\n{_listed(line, order)}\n{ending}",
                answer=f" {_LETTERS[at]}",
                wrong=_spaced([_LETTERS[tempting], *(c for c in _LETTERS if c != _LETTERS[at])]),
                group={"topic": topic, "letter": _LETTERS[at]},
            )
            for order, at, tempting in ((options, place, other), (exchanged, other, place))
        )
        yield replace(made, counterfactual=swapped)


def _listed(line: str, options: list[str]) -> str:
    return "\n".join(line.format(letter, option) for letter, option in zip(_LETTERS, options, strict=True))


TASKS = (
    TaskInfo(
        "capitals",
        "completion",
        "the capital of a country",
        ("continent", "form"),
        "share of prompts where the capital's logit is above five other capitals'",
        _capitals,
    ),
    TaskInfo(
        "capitals-counterfactual",
        "completion",
        "the context names a wrong capital: does the model follow the context (right) or its memory?",
        ("continent", "form"),
        "share of prompts where the capital that the context names is above the true one",
        _capitals_counterfactual,
    ),
    TaskInfo(
        "arithmetic",
        "completion",
        "sums with one-token results",
        ("size", "terms", "carry", "format"),
        "share of prompts where the sum's logit is above near misses'",
        _arithmetic,
    ),
    TaskInfo(
        "multiple-choice",
        "choice",
        "questions with four lettered options",
        ("topic", "letter"),
        "share of questions where the right letter's logit is the highest of the four",
        _multiple_choice,
    ),
)
