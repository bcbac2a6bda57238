"""Choosing by activations: scores by brute force, which tokens count, what is shared with the target."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.select import SampleCodes, by_activation, sample_codes, sample_rows
from actlas.select.by_activation import scores_of
from tests.core.tiny import TEXTS as LONG
from tests.core.tiny import tiny

SITE = "blocks.1.resid_post"
TEXTS = [t[:50] for t in LONG]


@dataclass(kw_only=True, eq=False)
class SignedCoordinates(Dictionary):
    """The k coordinates of largest magnitude along some directions."""

    directions: Tensor
    k: int = 3

    @property
    def channels(self) -> int:
        return self.directions.shape[1]

    @property
    def features(self) -> int:
        return len(self.directions)

    @property
    def atoms(self) -> Tensor:
        return self.directions

    def encode_rows(self, x: Tensor) -> Codes:
        return Codes.from_dense(x @ self.directions.T, self.k)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def lens() -> SignedCoordinates:
    g = torch.Generator().manual_seed(1)
    return SignedCoordinates(site=SITE, directions=torch.randn(20, 32, generator=g))


def brute(model: Model, lens: SignedCoordinates, text: str, pool: str = "mean") -> np.ndarray:
    """The vector of one text, alone and dense."""
    trace = model.trace(text, SITE)
    ids = trace.tokens[0].tolist()
    z = lens.encode(trace[SITE][0]).dense().double().numpy()
    keep = [i for i, t in enumerate(ids) if t not in model.tokenizer.all_special_ids]
    halves = np.concatenate([np.maximum(z, 0), np.maximum(-z, 0)], axis=1)[keep]
    return halves.mean(0) if pool == "mean" else halves.max(0)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("batch_tokens", [40, 4000])
def test_a_sample_is_the_mean_or_maximum_of_its_tokens_codes(model, lens, pool, batch_tokens) -> None:
    texts = [TEXTS[0] + "</s>", *TEXTS[1:]]
    found = sample_codes(model, lens, texts, pool=pool, batch_tokens=batch_tokens)
    assert found.site == SITE and found.features == 20 and found.vectors.shape == (6, 40)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(found.vectors[i].toarray()[0], brute(model, lens, text, pool), atol=1e-4)
    assert found.tokens.tolist() == [len(t) for t in TEXTS]
    rows = sample_rows(model, texts, site=SITE)
    again = sample_codes(None, lens, rows, pool=pool)
    np.testing.assert_allclose(again.vectors.toarray(), found.vectors.toarray(), atol=1e-4)
    assert found.latent(3) == (3, 1) and found.latent(23) == (3, -1)


def test_long_texts_are_read_in_windows_and_count_every_token(model, lens) -> None:
    text = " ".join(LONG)[:150]
    found = sample_codes(model, lens, [text, TEXTS[0]], context=20)
    assert found.tokens.tolist() == [150, len(TEXTS[0])]


def test_raw_activations_are_the_ablation(model) -> None:
    found = sample_codes(model, None, TEXTS, site=SITE)
    x = model.trace(TEXTS[2], SITE)[SITE][0]
    np.testing.assert_allclose(found.vectors[2].toarray()[0], x.mean(0).numpy(), atol=1e-4)
    absolute = sample_codes(model, None, TEXTS, site=SITE, absolute=True)
    np.testing.assert_allclose(absolute.vectors[2].toarray()[0], x.abs().mean(0).numpy(), atol=1e-4)
    assert sample_codes(model, None, TEXTS).site == "blocks.1.resid_post"  # the last block but one, of three


@pytest.mark.parametrize("similarity", ["jaccard", "cosine", "euclidean"])
def test_scores_by_brute_force(model, lens, similarity) -> None:
    source, target = TEXTS[:4], TEXTS[4:]
    chosen = by_activation(model, lens, source, target, ratio=0.5, similarity=similarity)
    p = np.mean([brute(model, lens, t) for t in target], axis=0)
    for i, text in enumerate(source):
        z = brute(model, lens, text)
        wanted = {
            "jaccard": np.minimum(z, p).sum() / np.maximum(z, p).sum(),
            "cosine": z @ p / (np.linalg.norm(z) * np.linalg.norm(p)),
            "euclidean": -np.linalg.norm(z - p),
        }[similarity]
        assert math.isclose(chosen.scores[i], wanted, rel_tol=1e-4, abs_tol=1e-4)
    assert chosen.indices == np.argsort(-chosen.scores)[:2].tolist() and len(chosen) == 2
    best = brute(model, lens, source[chosen.indices[0]])
    common = np.minimum(best, p)
    first = chosen.top_shared_latents[0][0]
    place = int(common.argmax())
    assert (first.latent, first.sign) == (place % 20, 1 if place < 20 else -1)
    assert math.isclose(first.share, common.max() / common.sum(), rel_tol=1e-3)
    assert all(len(shared) <= 5 for shared in chosen.top_shared_latents)


def test_a_choice_is_measured_against_random_ones(model, lens) -> None:
    chosen = by_activation(model, lens, TEXTS, [TEXTS[2]], ratio=0.2)
    assert chosen.indices == [2] and math.isclose(chosen.scores[2], 1.0, rel_tol=1e-6)
    best, random = chosen.measurements
    assert math.isclose(best.value, 1.0, rel_tol=1e-6) and random.value < 0.9
    assert random.group["choice"] == "random" and random.low < random.value < random.high


def test_a_sample_without_a_token_that_counts_scores_nothing(model, lens) -> None:
    source = ["</s></s>", "", TEXTS[0]]
    chosen = by_activation(model, lens, source, [TEXTS[1]], ratio=1.0)
    assert chosen.scores[:2].tolist() == [0.0, 0.0] and chosen.indices[0] == 2
    assert chosen.top_shared_latents[chosen.indices.index(0)] == []
    with pytest.raises(InputError, match="no sample has a token that counts"):
        by_activation(model, lens, source, ["</s>"], ratio=1.0)


def test_rows_above_the_norm_of_the_fit_do_not_count(model) -> None:
    x = model.trace(TEXTS[0], SITE)[SITE][0]
    norms = x.norm(dim=1)
    bound = float(norms.sort().values[-3])
    lens = SignedCoordinates(site=SITE, directions=torch.eye(32), k=32, skip_above=bound)
    found = sample_codes(model, lens, [TEXTS[0]])
    assert found.tokens[0] == len(TEXTS[0]) - 2
    kept = x[norms <= bound].mean(0).double().numpy()
    signed = found.vectors.toarray()[0]
    assert np.abs(signed[:32] - signed[32:] - kept).max() < 1e-3


def test_near_copies_are_skipped_on_request(model, lens) -> None:
    long = "the river had risen and the papers were full of it for days and days"
    source = [long, long + " again", TEXTS[1], long.upper()]
    plain = by_activation(model, lens, source, [long], ratio=0.5)
    assert plain.indices == [0, 1]
    once = by_activation(model, lens, source, [long], ratio=0.5, duplicates=0.7)
    assert once.indices[0] == 0 and once.indices[1] == 2


def test_chunks_give_the_same_scores(monkeypatch) -> None:
    from scipy.sparse import random as sparse

    z = sparse(50, 30, 0.2, format="csr", random_state=0)
    p = np.asarray(z[:4].mean(0)).ravel()
    whole = [scores_of(z, p, s) for s in ("jaccard", "cosine", "euclidean")]
    monkeypatch.setattr(importlib.import_module("actlas.select.by_activation"), "_CHUNK", 7)
    for one, s in zip(whole, ("jaccard", "cosine", "euclidean"), strict=True):
        np.testing.assert_array_equal(scores_of(z, p, s), one)


def test_bad_input(model, lens) -> None:
    source, target = TEXTS[:3], TEXTS[3:]
    for options, said in (
        ({"ratio": 0.0}, "ratio is 0"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"similarity": "dot"}, "must be one of jaccard"),
        ({"pool": "sum"}, "'mean' or 'max'"),
        ({"site": "blocks.0.resid_post"}, "the lens reads blocks.1.resid_post"),
        ({"duplicates": 2.0}, "between 0 and 1"),
    ):
        with pytest.raises(InputError, match=said):
            by_activation(model, lens, source, target, **options)
    with pytest.raises(InputError, match="names 3"):
        by_activation(model, None, source, target, site="blocks.*.resid_post")
    with pytest.raises(InputError, match="no text among 2"):
        by_activation(model, lens, ["", " "], target)
    with pytest.raises(InputError, match="need a model"):
        by_activation(None, lens, source, target)
    codes = sample_codes(model, lens, source)
    with pytest.raises(InputError, match="do not belong together"):
        by_activation(model, None, codes, target, site=SITE)
    with pytest.raises(InputError, match="give the pool as texts"):
        by_activation(model, lens, codes, target, duplicates=0.5)
    raw = sample_codes(model, None, source, site=SITE)
    with pytest.raises(InputError, match="not negative"):
        by_activation(None, None, raw, raw)
    with pytest.raises(InputError, match="these rows are of"):
        sample_codes(None, lens, sample_rows(model, source, site="blocks.0.resid_post"))
    assert isinstance(codes[[0, 2]], SampleCodes) and len(codes[[0, 2]]) == 2
