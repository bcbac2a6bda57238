"""Tasks where a text is judged: is a review positive, is a statement true?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from actlas.data.facts_table import CLEAR, COUNTRIES
from actlas.data.single_token import Builder
from actlas.data.task_items import TaskInfo, TaskItem
from actlas.data.words import BLAME, CATEGORIES, NUMBERS, OPPOSITES, PRAISE, REVIEWED, with_articles

_REVIEWS = (
    "The {thing} was {first} and {second}.",
    "I found the {thing} {first}.",
    "What a {first} {thing}! It was simply {second}.",
    "In my opinion the {thing} is {first}, really {second}.",
    "My friends told me that the {thing} was {first}, and I agree: {second}.",
    "Everything about the {thing} felt {first}.",
)
_ASK_SENTIMENT = (
    "Review: {text}\nSentiment:",
    'Text: "{text}" Overall, the writer\'s opinion is',
    "{text}\nIs this review {labels[0]} or {labels[1]}? Answer:",
)


def _sentiment(b: Builder) -> Iterator[TaskItem]:
    """Short reviews; the counterfactual has the opposite adjectives."""
    labels = b.labels((("positive", "negative"), ("good", "bad")))
    for turn in count():
        subject = tuple(REVIEWED)[turn // 2 % len(REVIEWED)]
        thing = b.random.choice(REVIEWED[subject])
        review, ask = b.random.choice(_REVIEWS), b.random.choice(_ASK_SENTIMENT)
        texts = [
            with_articles(review.format(thing=thing, first=first, second=second))
            for first, second in (b.pick(PRAISE, 2), b.pick(BLAME, 2))
        ]
        yield _judged(
            texts, ask, labels, turn % 2, "sentiment", ("positive", "negative"), {"subject": subject}
        )


def _judged(
    texts: list[str],
    ask: str,
    labels: tuple[str, str],
    side: int,
    label: str,
    values: tuple[str, str],
    group: dict[str, str],
) -> TaskItem:
    """Return the item for one of two opposite texts, with the other as its counterfactual.

    Args:
        texts: the positive (or true) text and the negative (or false) one.
        ask: the prompt with slots for `text` and `labels`.
        labels: the answers, in the order of the texts.
        side: which text the item has.
        label, values: the group label that says which text it is.
        group: further labels.
    """
    both = [
        TaskItem(
            id="",
            prompt=ask.format(text=texts[k], labels=labels),
            answer=f" {labels[k]}",
            wrong=(f" {labels[1 - k]}",),
            group={label: values[k], **group},
            stimulus=texts[k],
        )
        for k in (0, 1)
    ]
    return replace(both[side], counterfactual=both[1 - side])


def _statements(b: Builder, topic: str) -> tuple[str, str]:
    """Return a true statement and a false one that differs in a word."""
    if topic == "capital":
        country, elsewhere = b.pick(COUNTRIES, 2)
        text = b.random.choice(("The capital of {0} is {1}.", "{1} is the capital city of {0}."))
        return text.format(country.name, country.capital), text.format(country.name, elsewhere.capital)
    if topic == "continent":
        country = b.random.choice(CLEAR)
        other = b.random.choice(sorted({c.continent for c in COUNTRIES} - {country.continent}))
        text = b.random.choice(("{0} is a country in {1}.", "If you live in {0}, you live in {1}."))
        return text.format(country.name, country.continent), text.format(country.name, other)
    if topic == "size":
        low, high = sorted(b.random.sample(range(1, len(NUMBERS)), 2))
        text = b.random.choice(("The number {0} is larger than {1}.", "{1} is less than {0}."))
        return text.format(NUMBERS[high], NUMBERS[low]), text.format(NUMBERS[low], NUMBERS[high])
    if topic == "opposite":
        pair, unrelated = b.pick(OPPOSITES, 2)
        text = "The opposite of {0} is {1}."
        return text.format(*pair), text.format(pair[0], unrelated[1])
    category, other_category = b.pick(tuple(CATEGORIES), 2)
    word = b.random.choice([w for w in CATEGORIES[category] if w not in CATEGORIES[other_category]])
    text = b.random.choice(("The word {0} names a kind of {1}.", "Among other things, {0} counts as a {1}."))
    return with_articles(text.format(word, category)), with_articles(text.format(word, other_category))


_ASK_TRUTH = (
    "Statement: {text}\nTrue or false? Answer:",
    "{text} Is this statement true or false? It is",
    'Claim: "{text}"\nVerdict:',
)


def _true_false(b: Builder) -> Iterator[TaskItem]:
    """True and false statements after Marks and Tegmark 2023 (arXiv 2310.06824), with more topics."""
    capital = b.labels((("True", "False"), ("true", "false"), ("yes", "no")))
    small = b.labels((("true", "false"), ("True", "False"), ("yes", "no")))
    topics = ("capital", "continent", "size", "opposite", "category")
    for turn in count():
        topic = topics[turn // 2 % len(topics)]
        texts = [text[0].upper() + text[1:] for text in _statements(b, topic)]
        ask = b.random.choice(_ASK_TRUTH)
        labels = small if ask.endswith("It is") else capital
        yield _judged(texts, ask, labels, turn % 2, "truth", ("true", "false"), {"topic": topic})


TASKS = (
    TaskInfo(
        "sentiment",
        "classification",
        "is a short review positive or negative?",
        ("sentiment", "subject"),
        "share of reviews where the right label's logit is above the other's",
        _sentiment,
        contrast=("sentiment", "positive"),
    ),
    TaskInfo(
        "true-false",
        "classification",
        "is a simple statement true or false?",
        ("truth", "topic"),
        "share of statements where the right label's logit is above the other's",
        _true_false,
        contrast=("truth", "true"),
    ),
)
