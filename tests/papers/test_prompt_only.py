"""The prompt-only baseline: how a wish reaches the model, and what is made of the numbers."""

from __future__ import annotations

import numpy as np
import pytest

from actlas.core.measurement import Measurement
from actlas.papers import papers
from actlas.papers.prompt_only_page import prompt_only_page
from actlas.papers.reproduction import stored
from actlas.papers.reproductions.prompt_only import (
    ASKED,
    LINE,
    NONE,
    OVER,
    WISHES,
    ask,
    before,
    in_words,
    said,
    without,
)


class Chat:
    """A tokenizer that shows its messages."""

    chat_template = "some"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


class Stub:
    def __init__(self, tokenizer):
        self.tokenizer, self.name = tokenizer, "stub"


def test_a_wish_is_a_system_prompt_or_a_line_of_the_question():
    model = Stub(Chat())
    assert ask(model, "Why?", "Be brief.", "system prompt") == "[system]Be brief.[user]Why?[assistant]"
    assert ask(model, "Why?", "Be brief.", "question") == "[user]Be brief.\nWhy?[assistant]"


def test_a_model_without_a_template_reads_a_line_before():
    plain = Stub(type("T", (), {"chat_template": None})())
    for way in ("system prompt", "question"):
        assert ask(plain, "Why?", "Be brief.", way) == before("Be brief.", "Why?") == "Be brief.\nWhy?"


def test_the_difference_is_paired_and_method_minus_words():
    words = np.random.default_rng(0).normal(0, 100, 40)  # differs wildly between items, cancels in pairs
    asked, over = in_words("tokens", "tokens", words + 1, words, asked=LINE, seed=0, on="sums")
    assert asked.name == ASKED and asked.value == pytest.approx(words.mean())
    assert over.name == OVER and over.value == pytest.approx(1.0)
    assert over.low == pytest.approx(1.0) and over.high == pytest.approx(1.0)
    assert asked.group == over.group == {"quantity": "tokens", "asked": LINE, "on": "sums"}
    text = said([asked, over])
    assert "not judged" in text and "tokens (a line before, sums)" in text and "1 [1, 1]" in text
    assert said([]) == ""


def test_clusters_are_drawn_whole():
    rows = np.repeat([0.0, 1.0], 20)
    apart = in_words("p", "fraction", rows, rows * 0, asked=LINE, seed=0)[1]
    whole = in_words("p", "fraction", rows, rows * 0, asked=LINE, seed=0, clusters=[0] * 20 + [1] * 20)[1]
    assert whole.n == 2 and apart.n == 40
    assert whole.high - whole.low > apart.high - apart.low


def test_every_steering_paper_is_asked_or_says_why_not():
    known = {p.slug for p in papers()}
    asked = {w.split(",")[0] for w in WISHES}
    assert set(NONE) <= known and asked <= known and not asked & set(NONE)
    page = prompt_only_page()
    shown = {slug for slug in asked | {"asc", "efficiency-steering"} if f"[{slug}](papers/{slug}.md)" in page}
    for slug in known:
        result = stored(slug)
        if result is not None and any(m.name == OVER for m in result.measured):
            assert slug in shown, slug
    assert len(shown) >= 10
    assert all(f"[{slug}](papers/{slug}.md)" in page for slug in NONE)
    assert "cannot be asked" in without("recoding-rnn")


def test_an_old_measurement_has_no_sentence():
    assert said([Measurement("tokens", 1.0, "tokens", 3)]) == ""
