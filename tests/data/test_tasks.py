"""Tasks: answers are one token, counterfactuals fit, the seed decides everything."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from actlas.core.errors import InputError
from actlas.data import pairs, task, tasks
from actlas.data.facts_table import COUNTRIES
from actlas.data.words import CATEGORIES, COMMON, NAMES, OPPOSITES

from .tokenizers_made_here import KINDS, tokenizer

NAMES_OF_TASKS = tuple(tasks())


def ids(tok: Any, text: str) -> list[int]:
    return tok(text, add_special_tokens=False)["input_ids"]


def test_the_nine_tasks_are_there() -> None:
    assert set(NAMES_OF_TASKS) == {
        "ioi", "capitals", "capitals-counterfactual", "arithmetic", "sentiment", "true-false", "induction",
        "agreement", "multiple-choice",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_answers_are_one_token_after_their_prompt(name: str, kind: str) -> None:
    tok = tokenizer(kind)
    made = task(name, tok, n=24, seed=3)
    assert len(made) == 24 and made.note == ""
    for item in made:
        before = ids(tok, item.prompt)
        assert ids(tok, item.prompt + item.answer) == [*before, item.answer_id]
        assert len(item.wrong) == len(item.wrong_ids) > 0
        for word, token in zip(item.wrong, item.wrong_ids, strict=True):
            assert ids(tok, item.prompt + word) == [*before, token]
        assert len({item.answer_id, *item.wrong_ids}) == 1 + len(item.wrong_ids)
        assert tok.unk_token_id is None or tok.unk_token_id not in (item.answer_id, *item.wrong_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_counterfactuals_have_as_many_tokens_and_flip_the_answer(name: str, kind: str) -> None:
    tok = tokenizer(kind)
    for item in task(name, tok, n=24):
        other = item.counterfactual
        assert other is not None and other.prompt != item.prompt
        assert len(ids(tok, other.prompt)) == len(ids(tok, item.prompt))
        assert other.answer == item.wrong[0]
        assert item.answer in other.wrong


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_the_seed_decides_and_more_items_only_append(name: str) -> None:
    tok = tokenizer("bytes")
    few, many = task(name, tok, n=12, seed=5), task(name, tok, n=40, seed=5)
    assert few.items == many.items[:12]
    assert few.hash == task(name, tok, n=12, seed=5).hash
    assert few.hash != task(name, tok, n=12, seed=6).hash
    prompts = [item.prompt for item in many]
    assert len(set(prompts)) == len({item.id for item in many}) == 40


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_items_carry_the_labels_they_promise_and_slices_are_balanced(name: str) -> None:
    made = task(name, n=80)
    for item in made:
        assert set(item.group) == set(made.info.groups)
    assert all(len(values) >= 2 for values in made.groups.values())
    assert 0.1 < made.chance <= 0.5
    assert made.metric_doc and made.kind in ("completion", "classification", "choice")
    assert len(made[:5]) == 5 and made[:5].items == made.items[:5]


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(NAMES_OF_TASKS), seed=st.integers(0, 2**32), n=st.integers(1, 40))
def test_any_seed_and_size(name: str, seed: int, n: int) -> None:
    made = task(name, n=n, seed=seed)
    assert len(made) == n
    for item in made:
        assert item.answer.startswith(" ") and item.answer not in item.wrong
        assert not item.prompt.endswith(" ") and "{" not in item.prompt and "  " not in item.prompt


def test_ioi_repeats_one_name_and_asks_for_the_other() -> None:
    for item in task("ioi", n=60):
        names = [word for word in re.findall(r"[A-Z][a-z]+", item.prompt) if word in NAMES]
        assert len(names) == 3 and names.count(item.wrong[0].strip()) == 2
        assert names.index(item.answer.strip()) == (0 if item.group["template"] == "ABBA" else 1)


def test_arithmetic_is_right_and_digit_tokenizers_get_short_sums() -> None:
    for item in task("arithmetic", n=120):
        if item.group["format"] != "words":
            line = item.prompt.split("\n")[-1 if item.group["format"] == "examples" else 0]
            assert sum(map(int, re.findall(r"\d+", line))) == int(item.answer)
            assert item.group["size"] == ("2-digit" if re.search(r"\d\d", line) else "1-digit")
    digits = task("arithmetic", tokenizer("bytes-digits"), n=40)
    assert {i.group["size"] for i in digits if i.group["format"] != "words"} == {"1-digit"}
    assert all(item.prompt.endswith(" ") for item in digits if item.group["format"] != "words")


def test_agreement_labels_say_what_stands_between() -> None:
    for item in task("agreement", n=80):
        assert (item.answer in (" are", " were", " have")) == (item.group["subject"] == "plural")
        assert (item.group["attractor"] == "none") == (item.group["structure"] == "simple")


def test_induction_answer_followed_last_time() -> None:
    for item in task("induction", n=60):
        words = [w for w in re.findall(r"\w+", item.prompt) if w not in ("Text", "Copy")]
        length = int(item.group["length"])
        assert words[words.index(words[-1]) + 1] == item.answer.strip()
        assert len(set(words[:length])) == length and len(words) > length


def test_multiple_choice_letter_stands_before_the_right_option() -> None:
    capitals = {c.name: c.capital for c in COUNTRIES}
    for item in task("multiple-choice", n=200):
        options = dict(re.findall(r"^([A-D])[.):] (.+)$", item.prompt, re.MULTILINE))
        right = options[item.answer.strip()]
        question = item.prompt.split("\n")[0]
        if item.group["topic"] == "capital":
            assert capitals[question.split("capital of ")[1].rstrip("?")] == right
        elif item.group["topic"] == "sum":
            first, second = map(int, re.findall(r"\d+", question))
            assert int(right) == first + second
        elif item.group["topic"] == "category":
            kind = question.rstrip("?").split()[-1]
            assert [word for word in options.values() if word in CATEGORIES[kind]] == [right]
        assert len(set(options.values())) == 4


def test_true_statements_are_true() -> None:
    facts = {(c.name, c.capital) for c in COUNTRIES}
    seen = 0
    for item in task("true-false", n=200):
        if found := re.match(r"The capital of (.+) is (.+)\.", item.stimulus):
            seen += 1
            assert (found.groups() in facts) == (item.group["truth"] == "true")
        if found := re.match(r"The opposite of (.+) is (.+)\.", item.stimulus):
            assert (found.groups() in OPPOSITES) == (item.group["truth"] == "true")
    assert seen > 5


def test_counterfactual_capitals_name_a_wrong_one_in_the_context() -> None:
    truth = {c.name: c.capital for c in COUNTRIES}
    for item in task("capitals-counterfactual", n=60):
        country = next(name for name in truth if re.search(rf"\b{name}\b", item.prompt))
        assert truth[country] == item.wrong[0].strip()
        assert item.answer.strip() in item.prompt


def test_pairs_differ_in_what_is_judged() -> None:
    for name, label, value in (("sentiment", "sentiment", "positive"), ("true-false", "truth", "true")):
        made = task(name, n=40)
        found = pairs(made)
        assert len(found) == len({(p.positive, p.negative) for p in found}) >= 30
        by_text = {item.stimulus: item.group[label] == value for item in made}
        for pair in found:
            assert by_text.get(pair.positive, True) and not by_text.get(pair.negative, False)
    first = task("capitals", n=1)
    assert pairs(first)[0].positive == first[0].text
    assert pairs(first)[0].negative == first[0].prompt + first[0].wrong[0]


def test_word_lists_have_no_duplicates() -> None:
    for words in (NAMES, COMMON, [c.name for c in COUNTRIES], [c.capital for c in COUNTRIES]):
        assert len(set(words)) == len(words)
    assert len(COUNTRIES) >= 60


def test_a_bare_tokenizer_of_the_tokenizers_library_will_do() -> None:
    wrapped = tokenizer("bytes")
    assert task("ioi", wrapped.backend_tokenizer, n=10).items == task("ioi", wrapped, n=10).items


def test_a_tokenizer_that_knows_too_few_words_is_refused() -> None:
    characters = Tokenizer(models.WordLevel({chr(k): k for k in range(128)} | {"[UNK]": 128}, "[UNK]"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for name in ("ioi", "capitals", "true-false"):
        with pytest.raises(InputError, match=r"token") as caught:
            task(name, characters, n=16)
        assert "\n" not in str(caught.value)


def test_fewer_items_than_asked_for_are_noted() -> None:
    made = task("capitals", tokenizer("bytes"), n=3000)
    assert 60 < len(made) < 3000 and f"{len(made)} of the 3000" in made.note


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "io"}, "did you mean ioi"),
        ({"name": "ioi", "n": 0}, "at least 1"),
        ({"name": "ioi", "tokenizer": 3}, "not a tokenizer"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        task(**arguments)


@pytest.mark.slow
def test_every_task_can_be_made_for_the_bundled_model() -> None:
    from actlas.core.errors import ActlasError
    from actlas.models import load

    try:
        tok = load("smollm2").tokenizer
    except ActlasError as error:
        pytest.skip(f"the bundled model cannot be had: {error}")
    for name in NAMES_OF_TASKS:
        made = task(name, tok, n=128)
        assert len(made) == 128
        for item in made:
            assert ids(tok, item.prompt + item.answer) == [*ids(tok, item.prompt), item.answer_id]


@pytest.mark.parametrize("kind", KINDS)
def test_ioi_variants_change_one_attribute_and_keep_the_tokens(kind: str) -> None:
    tok = tokenizer(kind)
    for item in task("ioi", tok, n=24, seed=5):
        assert set(item.attributes) == {"IO", "S", "Pos"}
        assert item.answer.strip() == item.attributes["IO"] and item.wrong[0].strip() == item.attributes["S"]
        assert set(item.variants) <= {"IO", "S", "Pos"}
        if not item.prompt.startswith((item.attributes["IO"], item.attributes["S"])):
            assert len(item.variants) == 3  # at the start of a text a name may be several tokens
        for name, other in item.variants.items():
            changed = {a for a, v in item.attributes.items() if other.attributes[a] != v}
            assert changed == {name} and other.prompt != item.prompt
            assert len(ids(tok, other.prompt)) == len(ids(tok, item.prompt))
            assert ids(tok, other.prompt + other.answer) == [*ids(tok, other.prompt), other.answer_id]
        swapped = item.counterfactual
        assert swapped is not None
        assert swapped.attributes["IO"] == item.attributes["S"]
        assert swapped.attributes["Pos"] != item.attributes["Pos"]


def test_words_limits_the_names_and_nothing_else() -> None:
    few = task("ioi", tokenizer("bytes"), n=120, words=6)
    assert len({i.attributes["IO"] for i in few}) == 6
    assert {n for i in few for v in i.variants.values() for n in (v.attributes["IO"], v.attributes["S"])} <= {
        i.attributes["IO"] for i in few
    }
    with pytest.raises(InputError, match="at least 4 words"):
        task("ioi", words=3)
