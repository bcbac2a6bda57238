"""Pairs that a model makes itself, the length of answers, and the rewards of the group policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.core.contrast import Contrast
from actlas.core.edits import Add
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.model import Model
from actlas.measure.answer_length import answer_length, holds_answer, render_prompt, write_answers
from actlas.measure.registry import find_measure
from actlas.steering.self_contrast import (
    Sampled,
    answer_readings,
    pair_answers,
    sample_answers,
    self_contrast,
)
from actlas.training.group_policy import brevity_rewards, group_advantages, group_policy_step
from tests.core.tiny import tiny


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


def sampled(prompt: int, text: str, tokens: int, right: bool = True, ended: bool = True) -> Sampled:
    return Sampled(prompt, f"Q{prompt}: ", text, tokens, ended, right)


# -- pairs --------------------------------------------------------------------------------------


def test_pairs_are_the_shortest_and_longest_right_and_finished_answers() -> None:
    made = [
        sampled(0, "four", 4), sampled(0, "well, it is four", 9), sampled(0, "perhaps it is four", 7),
        sampled(0, "no", 1, right=False), sampled(0, "it goes on and on", 64, ended=False),
        sampled(1, "alone", 5), sampled(1, "wrong and long", 30, right=False),
        sampled(2, "ten", 10), sampled(2, "twelve", 12),
    ]  # fmt: skip
    contrast = pair_answers(made)
    assert contrast.positive == ("Q0: four",) and contrast.negative == ("Q0: well, it is four",)
    assert contrast.prompt == ("Q0: ",) and contrast.y == (5.0,)
    assert len(pair_answers(made, least_gap=0.1)) == 2
    by_letters = pair_answers(made, rank=lambda text, tokens: -float(len(text)))
    assert by_letters.positive[0] == "Q0: perhaps it is four"


def test_no_usable_pair_is_an_error() -> None:
    with pytest.raises(InputError, match="none of 2 prompts"):
        pair_answers([sampled(0, "a", 3), sampled(0, "b", 9, right=False), sampled(1, "c", 3)])
    with pytest.raises(InputError, match="none of 1 prompts"):
        pair_answers([sampled(0, "same", 3), sampled(0, "same", 3)])


def test_sampling_repeats_prompts_and_judges_each_answer(model: Model) -> None:
    made = sample_answers(model, ["One", "Two"], lambda q, a: q == "Two", 3, max_new_tokens=4, seed=1)
    assert [s.prompt for s in made] == [0, 0, 0, 1, 1, 1]
    assert [s.right for s in made] == [False] * 3 + [True] * 3
    assert len({s.text for s in made}) > 1
    again = sample_answers(model, ["One", "Two"], lambda q, a: True, 3, max_new_tokens=4, seed=1)
    assert [s.text for s in again] == [s.text for s in made]
    with pytest.raises(InputError, match="at least 2"):
        self_contrast(model, ["One"], lambda q, a: True, samples=1)
    with pytest.raises(InputError, match="temperature"):
        sample_answers(model, ["One"], lambda q, a: True, 2, temperature=0.0)


def test_answer_readings_are_means_over_the_tokens_of_answers(model: Model) -> None:
    contrast = Contrast(("Say: yes",), ("Say: not at all",), prompt=("Say:",))
    reading = answer_readings(model, contrast, "blocks.1.resid_post")
    whole = model.trace("Say: not at all", ["blocks.1.resid_post"])["blocks.1.resid_post"][0]
    assert torch.allclose(reading.negative[0], whole[4:].mean(0), atol=1e-5)
    assert reading.difference.shape == (1, 32) and reading.reference > 0
    with pytest.raises(InputError, match="does not know its prompts"):
        answer_readings(model, Contrast(("a b",), ("a c",)), "blocks.1.resid_post")


# -- answers ------------------------------------------------------------------------------------


def test_answers_come_in_order_with_their_lengths(model: Model) -> None:
    prompts = ["A somewhat longer question", "Short", "In the middle"]
    written = write_answers(model, prompts, max_new_tokens=5, batch=2)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=5)
        assert written.texts[i] == alone.texts[0] and written.tokens[i] == len(alone.tokens[0])
    assert not written.ended[written.tokens == 5].any() or written.tokens.min() <= 5


def test_answers_that_end_say_so(model: Model) -> None:
    end = Add("logits", 1e4 * torch.eye(67)[model.tokenizer.eos_token_id])
    with model.edit(end):
        written = write_answers(model, ["One", "Two"], max_new_tokens=5)
    assert written.ended.all() and (written.tokens == 1).all() and written.texts == ("", "")
    mixed = write_answers(model, ["One", "Two"], max_new_tokens=5, edits=[end, None], batch=2)
    assert mixed.ended.tolist() == [True, False] and mixed.tokens.tolist() == [1, 5]


def test_answer_length_measures_length_ends_and_rightness(model: Model) -> None:
    right = model.generate("One", max_new_tokens=6).texts[0].strip()
    found = {
        m.name: m for m in answer_length(model, [("One", right), ("Two", "absent answer")], max_new_tokens=6)
    }
    assert set(found) == {"answer-length", "answer-ended", "answer-accuracy"}
    assert found["answer-length"].value == 6 and found["answer-length"].samples is not None
    assert found["answer-accuracy"].value == 0.5
    bare = answer_length(model, ["One", "Two"], max_new_tokens=3)
    assert [m.name for m in bare] == ["answer-length", "answer-ended"]
    assert find_measure("answer-length").data == "task"
    with pytest.raises(InputError, match="item 0"):
        answer_length(model, [3])
    with pytest.raises(InputError, match="no prompts"):
        write_answers(model, [])
    with pytest.raises(InputError, match="empty"):
        render_prompt(model, " ")
    with pytest.raises(ModelError, match="no chat template"):
        render_prompt(model, "Hello", chat=True)


@pytest.mark.parametrize(
    ("text", "answer", "held"),
    [
        ("The sum is 19.", "19", True), ("It is 119", "19", False), ("19.5 in all", "19", False),
        ("1,900 apples", "1900", True), ("twelve of them", " Twelve", True), ("twelves", "twelve", False),
        ("-4 is below", "-4", True),
    ],
)  # fmt: skip
def test_right_answers_are_found_whole(text: str, answer: str, held: bool) -> None:
    assert holds_answer(text, answer) is held


# -- rewards ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=2, max_size=12), st.floats(0.0, 3.0))
def test_rewards_rank_right_above_wrong_and_short_above_long(
    group: list[tuple[int, bool]], beta: float
) -> None:
    lengths, right = [n for n, _ in group], [r for _, r in group]
    rewards = brevity_rewards(lengths, right, beta)
    advantages = group_advantages(rewards)
    assert abs(float(advantages.sum())) < 1e-6
    good = [i for i, r in enumerate(right) if r]
    for i in good:
        assert all(rewards[i] > rewards[j] for j in range(len(group)) if not right[j])
        assert all(rewards[i] >= rewards[j] for j in good if lengths[i] <= lengths[j])
    if len({lengths[i] for i in good}) == 1:
        assert all(float(rewards[i]) == 1.0 for i in good)


def test_equal_lengths_give_no_signal() -> None:
    assert (group_advantages(brevity_rewards([7, 7, 7], [True] * 3)) == 0).all()
    assert (group_advantages(brevity_rewards([7, 9, 5], [False] * 3)) == 0).all()


def test_a_policy_step_prefers_short_right_answers() -> None:
    logits = torch.zeros(3, 4, 5, requires_grad=True)
    tokens = torch.tensor([[1, 2, 0, 0], [1, 2, 3, 4], [4, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    rewards = brevity_rewards([2, 4, 2], [True, True, False])
    log_p = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    loss = group_policy_step(rewards, log_p, mask)
    advantages = group_advantages(rewards)
    expected = -sum(float(a) * float(log_p[i][mask[i]].mean().detach()) for i, a in enumerate(advantages)) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 0, 1]) < 0 < float(logits.grad[2, 0, 4])
    assert float(logits.grad[0, 2].abs().max()) == 0


def test_bad_groups_are_refused() -> None:
    with pytest.raises(InputError, match="as many"):
        brevity_rewards([1], [True, False])
    with pytest.raises(InputError, match="at least 1"):
        brevity_rewards([0], [True])
    with pytest.raises(ShapeError, match="at least 2"):
        group_advantages(torch.ones(1))
    with pytest.raises(ShapeError, match="rewards"):
        group_policy_step(torch.ones(2), torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool))
    mask = torch.tensor([[True], [False]])
    with pytest.raises(InputError, match="answer 1 has no tokens"):
        group_policy_step(torch.ones(2), torch.zeros(2, 1), mask)
    assert np.isfinite(
        float(group_policy_step(torch.ones(2), torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)))
    )
