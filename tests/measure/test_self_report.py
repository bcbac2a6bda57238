"""Self-report: balanced over orders, immune to a liking for a letter, beside control questions."""

from __future__ import annotations

import pytest
import torch

from actlas.core.edits import Add
from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.core.weight_edit import WeightEdit
from actlas.data.questionnaires import (
    Question,
    as_questions,
    questionnaire,
    records_kind,
    risk_questionnaire,
    shared_words,
)
from actlas.measure import measure
from actlas.measure.runner import _chosen, by_kind
from actlas.measure.self_report import Asked, self_report, self_report_shift, shifts
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
QUESTIONS = [
    Question("Are you", ("so", "no"), "self", "one"),
    Question("You are", ("so", "no"), "self", "one"),
    Question("Be", ("red", "fat"), "self", "two"),
    Question("Why", ("tea", "pie"), "control"),
    Question("How", ("sea", "sky"), "control"),
    Question("Pick", ("a lot", "a bit"), "behaviour"),
]


def model(chat: bool = True) -> Model:
    """Return a small model with room for the questions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=67, max_position_embeddings=256, **sizes)).eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.mul_(5)
    tokenizer = tiny().tokenizer
    if chat:
        tokenizer.chat_template = TEMPLATE
    return Model(module, tokenizer, name="small")


def by_name(found: list[Measurement]) -> dict[str, Measurement]:
    return {m.name: m for m in found}


@pytest.mark.parametrize("chat", [True, False])
def test_choices_are_the_log_odds_of_the_letters_averaged_over_both_orders(chat: bool) -> None:
    small = model(chat)
    found = Asked(small, QUESTIONS).choices()
    a, b = (small.tokenizer.convert_tokens_to_ids(x) for x in "AB")
    for i, q in enumerate(QUESTIONS):
        lead, mass = [], []
        for flipped in (False, True):
            text = q.text(flipped) + "!" if chat else f"Question: {q.text(flipped)}\nAnswer: "
            prompt = text if chat else text.rstrip()
            z = small.logits(prompt)[0, -1].double()
            lead.append(float(z[a] - z[b]))
            mass.append(float(z.softmax(-1)[[a, b]].sum()))
        trait = torch.sigmoid(torch.tensor((lead[0] - lead[1]) / 2))
        assert found.trait[i] == pytest.approx(float(trait), abs=1e-5)
        assert found.mass[i] == pytest.approx(sum(mass) / 2, abs=1e-6)
        assert found.first[i] == pytest.approx(float(torch.sigmoid(torch.tensor(lead)).mean()), abs=1e-5)
    assert found.trait.std() > 0


def test_a_liking_for_a_letter_cancels_and_is_reported() -> None:
    small = model()
    before = Asked(small, QUESTIONS).choices()
    site = "logits"
    push = torch.zeros(67)
    push[small.tokenizer.convert_tokens_to_ids("A")] = 3.0
    with small.edit(Add(site, push)):
        after = Asked(small, QUESTIONS).choices()
        found = by_name(self_report(small, QUESTIONS))
    assert after.trait == pytest.approx(before.trait, abs=1e-5)
    assert (after.first > before.first + 0.2).all()
    assert found["self-report-letter-bias"].value == pytest.approx(float(after.first.mean()) - 0.5)
    assert found["self-report"].under and found["self-report"].n == 2
    assert found["self-report-control"].n == 2 and found["self-report-behaviour"].n == 1


def test_the_suffix_gives_what_the_whole_model_gives() -> None:
    small = model()
    edit = Add("blocks.2.mlp.out", torch.randn(32, generator=torch.Generator().manual_seed(0)))
    whole, suffix = Asked(small, QUESTIONS), Asked(small, QUESTIONS, block=2, batch=5)
    for installed in ([], [edit]):
        with small.edit(*installed):
            assert suffix.choices().trait == pytest.approx(whole.choices().trait, abs=1e-5)


def test_a_shift_is_paired_and_the_excess_is_over_the_controls() -> None:
    small = model()
    name = "model.layers.2.mlp.down_proj.weight"
    delta = torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    edit = WeightEdit({name: delta})
    found = by_name(self_report_shift(small, edit, -1.0 * edit, QUESTIONS))
    with small.edit(edit):
        high = Asked(small, QUESTIONS).choices()
    with small.edit(-edit):
        low = Asked(small, QUESTIONS).choices()
    moved = high.trait - low.trait
    own = (moved[:2].mean() + moved[2]) / 2
    assert found["self-report-shift"].value == pytest.approx(moved[:3].mean())
    assert found["self-report-shift-control"].value == pytest.approx(moved[3:5].mean())
    excess = found["self-report-excess"]
    assert excess.value == pytest.approx(own - moved[3:5].mean())
    expected = (
        torch.tensor([moved[:2].mean(), moved[2]]).var() / 2 + torch.tensor(moved[3:5]).var() / 2
    ).sqrt()
    assert excess.details["standard_error"] == pytest.approx(float(expected), rel=1e-5)
    assert excess.low <= excess.value <= excess.high
    again = by_name(shifts(QUESTIONS, high, low))
    assert again["self-report-shift"].value == found["self-report-shift"].value
    none = by_name(self_report_shift(small, edit, edit, QUESTIONS))
    assert none["self-report-shift"].value == 0 and none["self-report-excess"].value == 0
    base = by_name(self_report_shift(small, edit, None, QUESTIONS))
    assert base["self-report-shift"].value == pytest.approx(
        float((high.trait - Asked(small, QUESTIONS).choices().trait)[:3].mean())
    )


def test_it_is_a_measure_with_a_questionnaire_of_its_own_or_the_users(tmp_path) -> None:
    small = model()
    own = by_name(measure(small, ["self-report"]))
    assert own["self-report"].n == len({q.topic for q in risk_questionnaire() if q.kind == "self"})
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": "Are you", "options": ["so", "no"]}\n{"question": "Is it", "options": ["a", "b"]}\n',
        encoding="utf-8",
    )
    assert records_kind(str(file)) == "questions" and records_kind("ioi") is None
    found = by_name(measure(small, ["self-report"], questionnaire(file)))
    assert (
        found["self-report"].n == 2
        and found["self-report-control"].value != found["self-report-control"].value
    )
    without = {info.name for info in _chosen(small, None, {})}
    assert not {"self-report", "editing"} & without and "perplexity" in without
    assert "self-report" in {info.name for info in _chosen(small, None, by_kind(questionnaire(file)))}


def test_the_built_in_questionnaire_is_balanced_in_kind() -> None:
    asked = risk_questionnaire()
    assert {q.kind for q in asked} == {"self", "control"}
    assert len({q.text(False) for q in asked} | {q.text(True) for q in asked}) == 2 * len(asked)
    assert shared_words(["Take the daring option", "a hawk in the sky"], asked) == ["daring", "hawk"]
    assert shared_words(["Which option would you prefer?"], asked) == []


def test_bad_input_says_what_would_be_right() -> None:
    with pytest.raises(InputError, match="two different options"):
        Question("Are you", ("so", "so"))
    with pytest.raises(InputError, match="must be self, control or behaviour"):
        Question("Are you", ("so", "no"), "other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no field 'option'; did you mean options"):
        Question.of({"question": "x", "option": ["a", "b"]})
    with pytest.raises(InputError, match="no questions"):
        as_questions([])
    with pytest.raises(InputError, match="no question of kind 'control'"):
        self_report_shift(model(), Add("logits", torch.ones(67)), None, QUESTIONS[:3])
    with pytest.raises(InputError, match="no question of kind 'self'"):
        self_report(model(), QUESTIONS[3:])
    with pytest.raises(ModelError, match="causal-lm"):
        self_report(BY_NAME["bert"].model(), QUESTIONS)
