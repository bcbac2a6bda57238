"""Prompt pairs: alignment, one-token answers, and a model that must be able to do the task."""

from __future__ import annotations

import json

import pytest
import torch

from actlas.circuits import PromptPairs
from actlas.circuits.metrics import kl, log_prob, logit_difference
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.data.task_items import TaskItem
from tests.circuits.pairs import model_of, pairs_of
from tests.core.tiny import tiny

RECORD = {"clean": "the cat sat", "corrupt": "the dog sat", "answer": "a", "wrong": "b"}


def records(**changes: str) -> list[dict[str, str]]:
    return [{**RECORD, **changes}]


def test_pairs_are_padded_on_the_left_and_measured() -> None:
    model = tiny()
    longer = {"clean": "so the cat sat", "corrupt": "so the dog sat", "answer": "c", "wrong": "d"}
    pairs = PromptPairs.from_task(model, [RECORD, longer], force=True)
    assert len(pairs) == 2 and pairs.width == 14 and pairs.lengths.tolist() == [11, 14]
    assert pairs.clean["attention_mask"][0].tolist() == [0] * 3 + [1] * 11
    assert pairs.clean["position_ids"][0, 3:].tolist() == list(range(11))
    assert pairs.changed.tolist() == [7, 7] and pairs.column("last").tolist() == [13, 13]
    assert [pairs.decode(i) for i in pairs.answer_ids.tolist()] == ["a", "c"]
    for row, record in enumerate((RECORD, longer)):
        logits = model.logits(record["clean"])[0, -1]
        ids = [model.tokenizer.encode(record[k], add_special_tokens=False)[0] for k in ("answer", "wrong")]
        assert float(pairs.difference[row]) == pytest.approx(float(logits[ids[0]] - logits[ids[1]]), abs=1e-5)
    first = pairs.take([0])
    assert first.width == 11 and first.changed.tolist() == [4] and first.texts == (pairs.texts[0],)
    torch.testing.assert_close(first.measured(model).difference, pairs.difference[:1], rtol=0, atol=1e-5)


def test_metrics_are_what_they_say() -> None:
    pairs = pairs_of(model_of())
    logits = torch.randn(4, 67, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(4)
    expected = logits[rows, pairs.answer_ids] - logits[rows, pairs.wrong_ids]
    torch.testing.assert_close(logit_difference(logits, pairs), expected)
    torch.testing.assert_close(log_prob(logits, pairs), logits.log_softmax(-1)[rows, pairs.answer_ids])
    assert float(kl(logits, logits).abs().max()) < 1e-6 < float(kl(logits, logits.flip(1)).min())
    with pytest.raises(ShapeError, match="n=4"):
        logit_difference(logits[:3], pairs)


def test_variants_and_items_with_equal_answers() -> None:
    model = tiny()
    other = TaskItem("o", "the dog sat", "a", ("b",))
    item = TaskItem("i", "the cat sat", "a", ("c", "d"), counterfactual=None, variants={"who": other})
    pairs = PromptPairs.from_task(model, [item], variant="who", force=True)
    assert pairs.decode(int(pairs.answer_ids[0])) == "a" and pairs.decode(int(pairs.wrong_ids[0])) == "c"
    with pytest.raises(InputError, match="no counterfactual"):
        PromptPairs.from_task(model, [item], force=True)
    with pytest.raises(InputError, match="the variants who"):
        PromptPairs.from_task(model, [item], variant="what", force=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (records(corrupt="the bird sat"), "have 11 and 12 tokens"),
        (records(corrupt="the cat sat"), "are the same"),
        (records(answer="ab"), "must be one token after its prompt"),
        (records(wrong="a"), "are both 'a'"),
        (records(wrong=""), "lacks 'wrong'"),
        (records(clean=" "), "empty"),
        ([], "at least one"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(given: list[dict[str, str]], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        PromptPairs.from_task(tiny(), given, force=True)
    assert "\n" not in str(caught.value)


def test_a_model_that_fails_the_task_is_refused_before_anything_else() -> None:
    model = tiny()
    pairs = PromptPairs.from_task(model, [RECORD], force=True)
    swap = pairs.accuracy == 1.0  # turn the pair so that the model is wrong
    wrong = records(answer="b", wrong="a") if swap else records()
    with pytest.raises(InputError, match="is right on 0% of the 1 clean prompts .* no behaviour to explain"):
        PromptPairs.from_task(model, wrong)
    forced = PromptPairs.from_task(model, wrong, force=True)
    assert "right on 0%" in forced.note
    with pytest.raises(InputError, match="wrong on all 1"):
        PromptPairs.from_task(model, wrong, correct_only=True)
    right = records() if swap else records(answer="b", wrong="a")
    kept = PromptPairs.from_task(model, [*wrong, *right], correct_only=True)
    assert len(kept) == 1 and kept.accuracy == 1.0 and "1 of 2" in kept.note


def test_ids_must_match() -> None:
    model = model_of()
    ids, one, two = torch.randint(3, 60, (2, 5)), torch.tensor([1, 2]), torch.tensor([1, 3])
    with pytest.raises(InputError, match=r"\[2, 5\] and \[2, 4\]"):
        PromptPairs.from_ids(model, ids, ids[:, 1:], one, two)
    with pytest.raises(InputError, match="same token"):
        PromptPairs.from_ids(model, ids, ids.flip(0), one, two)
    with pytest.raises(ModelError, match="causal-lm"):
        PromptPairs.from_task(tiny("bert"), [RECORD])


def test_the_command_line_reads_pairs_from_a_file(tmp_path) -> None:
    from actlas.cli.patch import read_task

    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(RECORD) + "\n\n")
    assert read_task(str(path)) == [RECORD] and read_task("ioi") == "ioi"
    for text, said in (("{", "line 1: not JSON"), ("[1]", "give an object"), ("\n", "holds no pair")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            read_task(str(path))
    with pytest.raises(InputError, match="there is no file"):
        read_task(str(tmp_path / "none.jsonl"))
