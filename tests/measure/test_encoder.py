"""Encoder measures against brute force, and on embeddings whose answer is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.measure import encoder
from actlas.measure.encoder import (
    TextPair,
    embed,
    embedding_anisotropy,
    embedding_dimension,
    embedding_separation,
    embedding_similarity,
    encoder_measures,
    text_pairs,
)

from .small_models import bert


def test_pairs_are_what_they_say_and_repeat() -> None:
    made = text_pairs(20, seed=3)
    assert made == text_pairs(20, seed=3) and made != text_pairs(20, seed=4)
    assert {k: sum(p.kind == k for p in made) for k in encoder.KINDS} == dict.fromkeys(encoder.KINDS, 20)
    assert all(p.left != p.right and p.left[0].isupper() and p.right[0].isupper() for p in made)
    true = {(p.left, p.right) for p in text_pairs(1000) if p.kind == "paraphrase"}
    assert not any((p.left, p.right) in true for p in made if p.kind != "paraphrase")
    with pytest.raises(InputError, match="at least 2 pairs"):
        text_pairs(1)


def test_an_embedding_is_the_mean_of_the_real_tokens() -> None:
    model = bert()
    texts = ["The cat sat.", "A dog ran after the cat because it could.", "Mary"]
    found = embed(model, texts, batch=2)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model.module(**model.tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
        mean = states.mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_the_batch_does_not_matter() -> None:
    texts = [p.left for p in text_pairs(8)]
    assert embed(bert(), texts, batch=1) == pytest.approx(embed(bert(), texts, batch=24), abs=1e-5)


def given_embeddings(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]) -> None:
    def fake(model: Any, texts: Any, *, batch: int = 32) -> np.ndarray:
        rows = np.array([table[t] for t in texts], dtype=float)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    monkeypatch.setattr(encoder, "embed", fake)


PAIRS = [
    TextPair("a", "b", "paraphrase"),
    TextPair("c", "d", "paraphrase"),
    TextPair("a", "c", "hard"),
    TextPair("b", "d", "hard"),
    TextPair("a", "e", "unrelated"),
    TextPair("c", "e", "unrelated"),
]


def test_separation_and_similarity_of_known_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"a": [1, 0, 0], "b": [1, 0.1, 0], "c": [1, 1, 0], "d": [0.2, 1, 0], "e": [0, 0, 1]}
    given_embeddings(monkeypatch, table)
    cos = {
        p: np.dot(u := np.array(table[p.left]), v := np.array(table[p.right]))
        / np.linalg.norm(u)
        / np.linalg.norm(v)
        for p in PAIRS
    }
    hard, unrelated = embedding_separation(bert(), PAIRS)
    expected = np.mean([cos[p] > cos[q] for p in PAIRS[:2] for q in PAIRS[2:4]])
    assert (hard.value, hard.group) == (expected, {"against": "hard"})
    assert (unrelated.value, unrelated.group) == (1.0, {"against": "unrelated"})
    assert unrelated.low < 1 and hard.samples.mean() == hard.value
    found = {m.group["pairs"]: m.value for m in embedding_similarity(bert(), PAIRS)}
    assert found["paraphrase"] == pytest.approx((cos[PAIRS[0]] + cos[PAIRS[1]]) / 2)
    assert found["unrelated"] == pytest.approx(0, abs=1e-12)


def test_anisotropy_is_the_mean_cosine_of_different_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(0)
    table = {name: g.normal(size=4) + 1 for name in "abcde"}
    given_embeddings(monkeypatch, table)
    unit = {k: v / np.linalg.norm(v) for k, v in table.items()}
    expected = np.mean([unit[p] @ unit[q] for p, q in itertools.combinations("abcde", 2)])
    found = embedding_anisotropy(bert(), PAIRS)
    assert found.value == pytest.approx(expected) and found.n == 5
    assert found.low < found.value < found.high


def test_anisotropy_of_isotropic_and_of_equal_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(0)
    names = [str(i) for i in range(80)]
    pairs = [TextPair(names[i], names[i + 1], "unrelated") for i in range(0, 80, 2)]
    given_embeddings(monkeypatch, {n: g.normal(size=40) for n in names})
    free = embedding_anisotropy(bert(), pairs)
    assert free.low < 0 < free.high and abs(free.value) < 0.02
    given_embeddings(monkeypatch, {name: [1, 2, 3] for name in names})
    assert embedding_anisotropy(bert(), pairs).value == pytest.approx(1)
    assert embedding_dimension(bert(), pairs).value == 1


def test_dimension_counts_the_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed unit vectors of k axes have a covariance of k equal eigenvalues."""
    k = 5
    table = {f"{sign}{i}": sign * np.eye(12)[i] for i in range(k) for sign in (1, -1)}
    given_embeddings(monkeypatch, table)
    names = list(table)
    pairs = [TextPair(a, b, "unrelated") for a, b in zip(names[::2], names[1::2], strict=True)]
    found = embedding_dimension(bert(), pairs)
    assert found.value == pytest.approx(k) and found.details == {"width": 12}
    assert found.low < found.value < found.high and "at most 9" in found.note


def test_all_measures_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda *a, **k: calls.append(1) or real(*a, **k))
    found = encoder_measures(bert())
    assert len(calls) == 1
    assert [m.name for m in found] == [
        *["embedding-separation"] * 2,
        *["embedding-similarity"] * 3,
        "embedding-anisotropy",
        "embedding-dimension",
    ]
    assert all(math.isfinite(m.value) and m.low is not None for m in found)
    assert embedding_dimension(bert()) == found[-1]


def test_kinds_that_are_missing_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = embedding_separation(bert(), [TextPair("one", "two", "paraphrase")])
    assert all(math.isnan(m.value) and m.note for m in found)


def test_bad_input_is_said() -> None:
    with pytest.raises(InputError, match="no pairs"):
        embedding_anisotropy(bert(), [])
    with pytest.raises(InputError, match="kind 'alike': one of paraphrase"):
        embedding_anisotropy(bert(), [TextPair("a", "b", "alike")])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="text 1 is empty"):
        embed(bert(), ["a", " "])
    with pytest.raises(InputError, match="no texts"):
        embed(bert(), [])
    model = bert()
    with torch.no_grad():
        model.module.embeddings.word_embeddings.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="NaN"):
        embed(model, ["a"])


def test_a_model_without_hidden_states_is_said() -> None:
    model = bert()

    class Head(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, output_hidden_states: bool = False) -> Any:
            return torch.zeros(1)

    model.module = Head()
    with pytest.raises(ModelError, match="returns no hidden states"):
        embed(model, ["a"])
