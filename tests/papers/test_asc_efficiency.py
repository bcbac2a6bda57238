"""The judges and the parts of the reproductions about short answers."""

from __future__ import annotations

import numpy as np
import pytest

from actlas.core.edits import Add
from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, recipe, verdict_of
from actlas.papers.reproductions import asc, efficiency_steering
from actlas.papers.reproductions.answer_runs import AnswerRuns
from actlas.papers.reproductions.asc import AnswerPrice
from actlas.papers.reproductions.style_sums import style_model, sums
from actlas.papers.reproductions.word_sums import plain_sums, solved, word_sums
from tests.core.tiny import tiny


def number(name: str, value: float, half: float = 0.1, **group: str) -> Measurement:
    return Measurement(name, value, "", 10, value - half, value + half, group=group)


def asc_found(
    steered: float = -20.0, random: float = -18.0, right: float = 0.0, small: float = 1.01
) -> Measured:
    return Measured(
        [
            number("tokens, steered minus plain", steered, 5),
            number("tokens, steered minus random", random, 5),
            number("accuracy, steered minus plain", right, 0.05),
            number("answers that end, steered minus plain", 0.2),
            number("measured over closed form", small, 0.01, gamma="0.02"),
            number("measured over closed form", 2.0, 0.1, gamma="0.27"),
        ]
    )


def test_the_judge_of_asc_wants_shorter_answers_than_random_directions_give() -> None:
    assert verdict_of(asc.judge(asc_found())) == "holds"
    assert verdict_of(asc.judge(asc_found(random=-1.0))) == "partly"
    assert verdict_of(asc.judge(asc_found(steered=20.0, random=20.0))) == "does not hold here"
    assert verdict_of(asc.judge(asc_found(right=-0.5))) == "partly"
    assert verdict_of(asc.judge(asc_found(small=1.3))) == "partly"


def efficiency_found(ratio: float = 0.5, chat: float | None = -10.0, right: float = 0.0) -> Measured:
    style, smol = {"model": "trained here"}, {"model": "smollm2"}
    found = [
        number("tokens, steered over plain", ratio, **style),
        number("tokens, steered minus random", -3.0, **style),
        number("accuracy, steered minus plain", right, **style),
        number("tokens, backwards minus plain", 3.0, **style),
        number("questions with a pair", 0.5, **smol),
    ]
    if chat is not None:
        found += [
            number("tokens, steered minus plain", chat, 2, **smol),
            number("tokens, steered minus random", chat, 2, **smol),
            number("accuracy, steered minus plain", 0.0, **smol),
        ]
    return Measured(found)


def test_the_judge_of_efficiency_steering_says_what_could_not_be_tested() -> None:
    judge = efficiency_steering.judge
    assert verdict_of(judge(efficiency_found())) == "holds"
    assert verdict_of(judge(efficiency_found(chat=None))) == "partly"
    assert "not testable" in judge(efficiency_found(chat=None))[-1].said
    assert verdict_of(judge(efficiency_found(ratio=0.9, chat=5.0))) == "partly"
    assert verdict_of(judge(efficiency_found(right=-0.1))) == "partly"


@pytest.mark.parametrize("slug", ["asc", "efficiency-steering"])
def test_both_can_be_run_in_two_sizes(slug: str) -> None:
    made = recipe(slug)
    assert made.quick != made.full and set(made.quick) == set(made.full)
    assert "central" in made.criterion


def test_word_sums_are_right_and_both_solutions_end_alike() -> None:
    made = word_sums(50, seed=3)
    assert [p.question for p in word_sums(20, seed=3)] == [p.question for p in made[:20]]
    assert len({p.question for p in made}) == 50
    for p in made:
        a, sign, b, _, c = p.concise.rstrip(".").split()
        assert (int(a) + int(b) if sign == "+" else int(a) - int(b)) == int(c) == int(p.answer)
        assert p.concise.endswith(f"{p.answer}.") and p.verbose.endswith(f"{p.answer}.")
        assert a in p.question and b in p.question and int(c) > 0
    contrast = solved(tiny(), made[:3])
    assert contrast.prompt is not None and len(contrast) == 3
    assert all(
        str(sum(int(w.strip("?")) for w in q.split() if w.strip("?").isdigit())) == a
        for q, a in plain_sums(9)
    )


def test_runs_are_paired_by_question() -> None:
    model = tiny()
    end = Add("logits", 1e4 * _one(67, model.tokenizer.eos_token_id))
    runs = AnswerRuns(model, ["One", "Two and more"], ["x", "y"], cap=4, seed=0, repeats=2, temperature=0.9)
    runs.write({"plain": None, "steered": end})
    assert runs.tokens("plain").tolist() == [4.0, 4.0] and runs.tokens("steered").tolist() == [1.0, 1.0]
    change = runs.length_change("steered", "plain", label="change")
    assert change.value == -3.0 and change.n == 2
    assert runs.length_ratio("steered", "plain", label="ratio").value == 0.25
    assert runs.ended("steered").tolist() == [1.0, 1.0]
    assert {m.group["run"] for m in runs.measured("plain")} == {"plain"}
    runs.write_asked("brief", "Be brief.")
    assert runs.written["brief"].prompts[0] == "Be brief.\nOne"


def test_the_price_of_an_answer_counts_its_own_tokens() -> None:
    from actlas.core.direction import Direction
    from actlas.measure.answer_length import write_answers

    model = tiny()
    written = write_answers(model, ["Say it", "Nobody"], max_new_tokens=6)
    direction = Direction(site="blocks.1.resid_post", vector=_one(32, 3) + 0.5)
    found = AnswerPrice(model, direction, written).of(direction, 2.0)
    for i, (prompt, text) in enumerate(zip(written.prompts, written.texts, strict=True)):
        start, whole = len(prompt), prompt + text
        p = model.logits(whole)[0].double().log_softmax(-1)
        with model.edit(direction.edit(0, 2.0).at(positions=range(start - 1, len(whole)))):
            q = model.logits(whole)[0].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        assert float(kl[: start - 1].abs().max()) == 0
        assert found[i] == pytest.approx(float(kl[start - 1 :].mean()), rel=1e-4)


def test_the_model_of_two_styles_reads_its_own_sums() -> None:
    model = style_model(0, steps=3, batch=4)
    asked = sums(1)
    assert len(asked) == 49 and asked != sums(2)
    assert all("<pad>" not in model.tokenizer.tokenize(f"{q} {a} .") for q, a in asked)
    assert np.isfinite(model.logits(asked[0][0]).detach().numpy()).all()


def _one(size: int, at: int):  # type: ignore[no-untyped-def]
    import torch

    return torch.eye(size)[at]
