"""Output signatures against a brute force in float64, their scores, saving, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actlas.core.errors import ArtifactError, InputError, ModelError, NonFiniteError, ShapeError
from actlas.core.model import Model
from actlas.measure.output_signature import OutputSignature, output_signature, signature_scores
from tests.measure.small_models import bert, gpt2, llama

TEXTS = ["the cat sat on a mat", "and the dog ran after it because they were friends", "the dog"]


@pytest.fixture(scope="module")
def model() -> Model:
    return llama()


def brute(model: Model, ids: list[int], first: int) -> dict[str, np.ndarray]:
    logits = model.logits(torch.tensor([ids]))[0].double()
    log_p = torch.log_softmax(logits, -1)[first - 1 : len(ids) - 1].numpy()
    target = np.array(ids[first:])
    actual = log_p[np.arange(len(target)), target]
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(1)
    return {
        "sorted": -np.sort(-log_p, axis=1),
        "actual": actual,
        "rank": (log_p > actual[:, None]).sum(1),
        "mean": log_p.mean(1),
        "std": log_p.std(1, ddof=1),
        "entropy": entropy,
        "spread": np.sqrt((p * (log_p + entropy[:, None]) ** 2).sum(1)),
    }


@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_is_what_the_model_says(make: object) -> None:
    model = make()  # type: ignore[operator]
    los = output_signature(model, TEXTS, top_k=50, batch=2)
    for i, text in enumerate(TEXTS):
        ids = model.tokenizer(text)["input_ids"]
        wanted = brute(model, ids, 1)
        n = len(ids) - 1
        assert los.mask[i].tolist() == [True] * n + [False] * (los.mask.shape[1] - n)
        for name, x in wanted.items():
            x = x[:, :50] if name == "sorted" else x
            found = getattr(los, name)[i, :n].numpy()
            np.testing.assert_allclose(found, x, rtol=2e-4, atol=2e-4, err_msg=name)
    assert los.top_k == 50 and los.vocabulary == model.vocab_size and len(los) == 3


def test_a_continuation_has_one_row_for_each_of_its_tokens(model: Model) -> None:
    tokenizer = model.tokenizer
    prompt, after = tokenizer("the cat sat")["input_ids"], tokenizer(" on a mat")["input_ids"]
    texts = output_signature(model, [("the cat sat", " on a mat")], top_k=9)
    ids = output_signature(model, [(prompt, after)], top_k=9)
    torch.testing.assert_close(texts.actual, ids.actual)
    assert int(ids.mask.sum()) == len(after)
    np.testing.assert_allclose(
        ids.actual[0], brute(model, [*prompt, *after], len(prompt))["actual"], rtol=2e-4
    )
    made = model.generate(["the cat sat", "the dog"], max_new_tokens=4)
    los = output_signature(model, made, top_k=9)
    assert los.mask.sum(1).tolist() == [len(t) for t in made.tokens]
    assert los.rank[los.mask].eq(0).all()  # greedy: every token was the first guess
    torch.testing.assert_close(los.sorted[..., 0][los.mask], los.actual[los.mask])
    assert output_signature(model, ["the cat sat on a mat"], top_k=9, rows=2).mask.shape == (1, 2)


def test_a_text_that_begins_with_a_special_token_has_a_row_for_its_first_word() -> None:
    model = llama(begin=True)
    plain = model.tokenizer("the dog", add_special_tokens=False)["input_ids"]
    assert int(output_signature(model, ["the dog"], top_k=5).mask.sum()) == len(plain)


def test_ranks_beyond_k_and_ties_are_true_ranks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.tokenizer(TEXTS[0])["input_ids"]
    size = model.vocab_size
    flat = torch.zeros(1, len(ids), size or 0)
    flat[..., :40] = 1.0  # forty tokens tie above all others, which tie among themselves
    monkeypatch.setattr("actlas.measure.output_signature.output_logits", lambda *a, **k: flat)
    monkeypatch.setattr("actlas.measure.output_signature.takes_option", lambda *a: False)
    los = output_signature(model, [TEXTS[0]], top_k=5)
    wanted = [0 if i < 40 else 40 for i in ids[1:]]
    assert los.rank[0].tolist() == wanted and max(wanted) > los.top_k


def test_scores_are_brute_force(model: Model) -> None:
    los = output_signature(model, TEXTS, top_k=20)
    found = signature_scores(los, k=0.3)
    for i, text in enumerate(TEXTS):
        b = brute(model, model.tokenizer(text)["input_ids"], 1)
        least = max(1, int(0.3 * len(b["actual"])))
        wanted = {
            "mean log-prob": b["actual"].mean(),
            "min log-prob": b["actual"].min(),
            "entropy": -b["entropy"].mean(),
            "min-k": np.sort(b["actual"])[:least].mean(),
            "min-k++": np.sort((b["actual"] + b["entropy"]) / b["spread"])[:least].mean(),
            "rank": -np.log1p(b["rank"]).mean(),
            "length": len(b["actual"]),
        }
        for name, value in wanted.items():
            assert found[name][i] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    with pytest.raises(InputError, match="k is 0"):
        signature_scores(los, k=0)


def test_save_and_load_keep_ranks_and_masks(model: Model, tmp_path: Path) -> None:
    los = output_signature(model, TEXTS, top_k=20)
    again = OutputSignature.load(los.save(tmp_path / "los"))
    assert torch.equal(again.rank, los.rank) and torch.equal(again.mask, los.mask)
    assert torch.equal(again.actual, los.actual) and again.vocabulary == los.vocabulary
    torch.testing.assert_close(again.sorted, los.sorted, atol=1e-2, rtol=1e-3)
    part = los.at(slice(0, 2)).cut(3)
    assert len(part) == 2 and part.sorted.shape == (2, 3, 20)
    (tmp_path / "los" / "tensors.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="checksum"):
        OutputSignature.load(tmp_path / "los")


def test_bad_input_is_refused_in_one_line(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"top_k is 99999"):
        output_signature(model, TEXTS, top_k=99_999)
    with pytest.raises(InputError, match="there are no texts"):
        output_signature(model, [])
    with pytest.raises(InputError, match="text 0 has 1 tokens"):
        output_signature(model, ["the"], top_k=5)
    with pytest.raises(InputError, match="context of 128"):
        output_signature(model, ["the cat " * 100], top_k=5)
    with pytest.raises(InputError, match="text 1 is int"):
        output_signature(model, ["the cat", 3], top_k=5)  # type: ignore[list-item]
    with pytest.raises(ModelError, match="kind encoder"):
        output_signature(bert(), TEXTS, top_k=5)
    chat = model.generate(model.encode("the cat"), max_new_tokens=2)
    with pytest.raises(InputError, match="does not know its prompts"):
        output_signature(model, chat, top_k=5)
    los = output_signature(model, TEXTS, top_k=5)
    with pytest.raises(ShapeError, match="rank of shape"):
        OutputSignature(**{**los._tensors(), "rank": los.rank[:1]}, vocabulary=9)
    with pytest.raises(NonFiniteError, match="entropy of the signature"):
        OutputSignature(**{**los._tensors(), "entropy": los.entropy * float("nan")}, vocabulary=9)
    with pytest.raises(InputError, match="text 0 has no row"):
        OutputSignature(**{**los._tensors(), "mask": torch.zeros_like(los.mask)}, vocabulary=9)
    monkeypatch.setattr(
        "actlas.measure.output_signature.output_logits",
        lambda *a, **k: torch.full((1, 9, 1500), float("nan")),
    )
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        output_signature(model, ["the cat sat"], top_k=5)
