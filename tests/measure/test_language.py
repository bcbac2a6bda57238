"""The likelihood engine and its measures against token-by-token brute force in float64."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.core.edits import Add, Scale
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.model import Model
from actlas.data import Corpus, Document
from actlas.measure import likelihood
from actlas.measure.language import (
    divergence_measures,
    kl_to_base,
    language_measures,
    loss_per_byte,
    next_token_accuracy,
    output_entropy,
    perplexity,
    top1_agreement,
)
from actlas.measure.likelihood import nll, select

from .small_models import WORDS, bert, gpt2, llama

TEXTS = [
    "The cat sat on the mat, and the dog ran after it because they were friends since spring.",
    "Été: naïve café – 42 €, 漢字 and emoji 🙂 in one line.",
    "When Mary and John went to the store, John gave a book to Mary. " * 4,
    "xq zw",
]


def corpus() -> Corpus:
    domains = ["prose", "odd", "prose", "odd"]
    return Corpus(
        "test",
        [Document(f"d{i}", t, {"domain": d}) for i, (t, d) in enumerate(zip(TEXTS, domains, strict=True))],
    )


def brute(model: Model, text: str, room: int, stride: int, prefix: list[int]) -> list[dict[str, Any]]:
    """Score every token with its own forward pass over exactly the context it should see."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    out, done = [], 0 if prefix else 1
    for start in range(0, len(ids), stride):
        for t in range(max(done, start + (0 if prefix else 1)), min(start + room, len(ids))):
            with torch.no_grad():
                z = model.module(torch.tensor([prefix + ids[start:t]])).logits[0, -1].double()
            log_p = z.log_softmax(-1)
            out.append(
                {
                    "nll": -float(log_p[ids[t]]),
                    "hit": int(z.argmax()) == ids[t],
                    "entropy": -float((log_p.exp() * log_p).sum()),
                    "id": ids[t],
                    "log_p": log_p,
                }
            )
            done = t + 1
    return out


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("context, stride", [(64, None), (16, None), (16, 5), (16, 1)])
def test_sums_equal_brute_force(begin: bool, context: int, stride: int | None) -> None:
    model = llama(begin)
    found = nll(model, corpus(), context=context, stride=stride)
    room = context - begin
    correct = []
    for i, text in enumerate(TEXTS):
        expected = brute(model, text, room, stride or room, [0] if begin else [])
        assert found.tokens[i] == len(expected)
        assert found.nll[i] == pytest.approx(sum(e["nll"] for e in expected), rel=1e-4)
        assert found.entropy[i] == pytest.approx(sum(e["entropy"] for e in expected), rel=1e-4)
        assert found.hits[i] == sum(e["hit"] for e in expected)
        correct += [e["hit"] for e in expected]
    assert list(found.correct) == correct
    assert found.ids == ("d0", "d1", "d2", "d3")


def test_absolute_positions_are_padded_on_the_right() -> None:
    model = gpt2()
    found = nll(model, corpus(), context=64)
    for i, text in enumerate(TEXTS):
        assert found.nll[i] == pytest.approx(sum(e["nll"] for e in brute(model, text, 64, 64, [])), rel=1e-4)


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("begin", [False, True])
def test_bytes_are_those_of_the_tokens_that_were_scored(begin: bool, stride: int | None) -> None:
    model = llama(begin)
    found = nll(model, [TEXTS[0]], context=16, stride=stride)
    whole = brute(model, TEXTS[0], 16 - begin, stride or 16 - begin, [0] if begin else [])
    spelled = "".join(model.tokenizer.decode([e["id"]]) for e in whole)
    assert found.bytes[0] == len(spelled.encode())


def test_every_byte_counts_when_every_token_is_scored() -> None:
    found = nll(llama(begin=True), TEXTS, context=16)
    assert list(found.bytes) == [len(t.encode()) for t in TEXTS]


@given(
    st.lists(st.text("ab cdé", min_size=2, max_size=40).filter(str.strip), min_size=1, max_size=4),
    st.integers(3, 9),
)
@settings(max_examples=15, deadline=None)
def test_overlapping_windows_score_each_token_but_the_first_once(texts: list[str], context: int) -> None:
    model = llama()
    lengths = [len(model.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    if max(lengths) < 2:
        return
    for stride in (1, context - 1):
        chosen = select(model, texts, context=context, stride=stride)
        scored = {
            d: [t for w in chosen.windows if w.document == d for t in range(w.scored, w.stop)]
            for d in range(len(chosen.ids))
        }
        assert list(scored.values()) == [list(range(1, n)) for n in lengths if n > 1]


def test_batches_and_order_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    whole = nll(model, corpus(), context=16)
    monkeypatch.setattr(likelihood, "LOGIT_BYTES", 1)
    monkeypatch.setattr(likelihood, "_CHUNK_BYTES", 1)
    one_by_one = nll(model, list(corpus())[::-1], context=16)
    assert whole.nll == pytest.approx(one_by_one.nll[::-1], rel=1e-5)
    assert whole.entropy == pytest.approx(one_by_one.entropy[::-1], rel=1e-5)


def test_the_logits_of_a_batch_stay_under_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(likelihood, "LOGIT_BYTES", 40 * 4 * model.vocab_size)
    sizes = []
    forward = model.forward

    def watched(inputs: Any, **options: Any) -> Any:
        sizes.append(inputs["input_ids"].numel())
        return forward(inputs, **options)

    monkeypatch.setattr(model, "forward", watched)
    nll(model, corpus(), context=16)
    assert len(sizes) > 2 and max(sizes) <= 40


def test_measures_are_ratios_of_sums() -> None:
    model = llama()
    losses = nll(model, corpus())
    found = {m.name: m for m in language_measures(model, corpus(), groups=False)}
    total = losses.tokens.sum()
    assert found["perplexity"].value == pytest.approx(math.exp(losses.nll.sum() / total))
    assert found["loss-per-byte"].value == pytest.approx(losses.nll.sum() / losses.bytes.sum() / math.log(2))
    assert found["next-token-accuracy"].value == pytest.approx(losses.hits.sum() / total)
    assert found["output-entropy"].value == pytest.approx(losses.entropy.sum() / total)
    singles = (perplexity, loss_per_byte, next_token_accuracy, output_entropy)
    assert [f(model, corpus()) for f in singles] == list(found.values())
    for m in found.values():
        assert m.n == 4 and m.low is not None and m.low <= m.value <= m.high
        assert m.interval == "bootstrap over documents" and m.seed == 0 and not m.under


def test_groups_add_up_to_the_whole() -> None:
    found = language_measures(llama(), corpus())
    assert len(found) == 12
    for name in ("next-token-accuracy", "output-entropy"):
        whole, *parts = [m for m in found if m.name == name]
        assert [dict(p.group) for p in parts] == [{"domain": "odd"}, {"domain": "prose"}]
        assert sum(p.n for p in parts) == whole.n
        tokens = [p.details["tokens"] for p in parts]
        assert np.dot([p.value for p in parts], tokens) / sum(tokens) == pytest.approx(whole.value)


def test_tokens_limit_what_is_read_and_spread_it_over_documents() -> None:
    model = llama()
    long = [WORDS * 60 for _ in range(8)]
    found = nll(model, long, tokens=256, context=64)
    assert found.tokens.sum() <= 256 and len(found.ids) == 4
    everything = nll(model, long[:2], context=64)
    assert everything.tokens.sum() > 1000
    assert len(nll(model, long, tokens=256, context=64, per_document=32).ids) == 8


def test_short_documents_are_counted_and_left_out() -> None:
    found = nll(llama(), ["a", TEXTS[0], "b"])
    assert found.skipped == 2 and "2 documents with fewer than two tokens" in found.note
    assert perplexity(llama(), ["a", TEXTS[0]]).n == 1


def test_an_edit_is_measured_and_named() -> None:
    model = llama()
    edit = Scale("blocks.0.mlp.out", 3.0)
    before = perplexity(model, corpus())
    with model.edit(edit):
        after = perplexity(model, corpus())
    assert after.value != before.value and after.under == (edit.describe(),)
    assert perplexity(model, corpus()) == before


def test_kl_and_agreement_by_brute_force() -> None:
    model = llama()
    edit = Add("blocks.0.resid_post", torch.full((32,), 0.7))
    base = [e for t in TEXTS for e in brute(model, t, 128, 128, [])]
    with model.edit(edit):
        edited = [e for t in TEXTS for e in brute(model, t, 128, 128, [])]
        kl = kl_to_base(model, corpus())
        agreement = top1_agreement(model, corpus())
        assert model.installed == (edit,)
    expected = [
        float((b["log_p"].exp() * (b["log_p"] - e["log_p"])).sum()) for b, e in zip(base, edited, strict=True)
    ]
    same = [int(b["log_p"].argmax()) == int(e["log_p"].argmax()) for b, e in zip(base, edited, strict=True)]
    assert kl.value == pytest.approx(np.mean(expected), rel=1e-3) and kl.value > 0.01
    assert agreement.value == pytest.approx(np.mean(same)) and agreement.value < 1
    assert kl.under == (edit.describe(),)


@pytest.mark.filterwarnings("ignore:Scale at")
def test_an_edit_that_changes_nothing_has_no_divergence() -> None:
    model = llama()
    with model.edit(Scale("blocks.0.mlp.out", 1.0)):
        kl, agreement = divergence_measures(model, corpus(), groups=False)
    assert kl.value == 0 and agreement.value == 1


def test_without_edits_the_divergence_is_zero_and_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    kl, agreement = divergence_measures(model, corpus())
    assert (kl.value, agreement.value) == (0, 1) and "own base" in kl.note


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "corpus is empty"),
        (["a"], "none of the 1 documents has the two tokens"),
        (iter([]), "corpus is empty"),
    ],
)
def test_no_text_is_said(texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        perplexity(llama(), texts)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 1}, "tokens must be at least 2, not 1"),
        ({"context": 1}, "context must be at least 2, not 1"),
        ({"context": 16, "stride": 17}, "stride must lie between 1 and 16 tokens for context 16, not 17"),
        ({"stride": 0}, "not 0"),
    ],
)
def test_bad_windows_are_said(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        perplexity(llama(), TEXTS, **options)


def test_the_context_is_cut_to_what_the_model_takes() -> None:
    assert nll(llama(context=24), [WORDS * 5], context=512).context == 24


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_said(value: float) -> None:
    model = llama()
    with torch.no_grad():
        model.module.lm_head.weight[3, 0] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity at token 1 of a window of document 'd"):
        perplexity(model, corpus())


def test_another_kind_of_model_is_said() -> None:
    with pytest.raises(ModelError, match="kind encoder; a causal-lm is needed"):
        perplexity(bert(), TEXTS)
    model = llama()
    model.tokenizer = None
    with pytest.raises(ModelError, match="no tokenizer"):
        perplexity(model, TEXTS)


def test_a_tokenizer_without_offsets_has_no_loss_per_byte() -> None:
    model = llama()
    fast = model.tokenizer

    class Slow:
        is_fast, bos_token_id, pad_token_id = False, None, None

        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            return {"input_ids": fast(text, add_special_tokens=False)["input_ids"]}

    model.tokenizer = Slow()
    found = {m.name: m for m in language_measures(model, TEXTS, groups=False)}
    assert math.isnan(found["loss-per-byte"].value) and "offsets" in found["loss-per-byte"].note
    assert found["perplexity"].value == pytest.approx(perplexity(llama(), TEXTS).value, rel=1e-5)


def test_a_plain_module_that_returns_logits_is_measured() -> None:
    inner = llama()

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner.module

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    model = Model(Plain(), inner.tokenizer, kind="causal-lm")
    assert perplexity(model, TEXTS).value == pytest.approx(perplexity(inner, TEXTS).value, rel=1e-6)


def test_documents_of_any_make_are_read() -> None:
    rows = [SimpleNamespace(text=t, id=i, group={}) for i, t in enumerate(TEXTS)]
    found = perplexity(llama(), (r for r in rows))
    assert found.value == perplexity(llama(), TEXTS).value
    assert list(itertools.chain(nll(llama(), rows).ids)) == ["0", "1", "2", "3"]
