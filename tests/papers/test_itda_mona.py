"""Activations as dictionaries, and choosing data by them: what decides each verdict, and tiny runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actlas.papers import reproduce
from actlas.papers.reproduction import Measured, recipe, verdict_of
from actlas.papers.reproductions import itda as itda_module
from actlas.papers.reproductions import mona_data_selection as mona
from actlas.papers.reproductions.byte_models import byte_model, byte_tokenizer
from actlas.papers.reproductions.itda_layers import OVER_CKA
from actlas.papers.reproductions.mona_pool import DOMAINS, Tuner, draw_pool, split
from tests.papers.test_judges import m, replaced

ITDA = [
    m(itda_module.OVER_RANDOM, -0.01, -0.02, -0.005, cos_min="0.85"),
    m(itda_module.OVER_RANDOM, 0.01, 0.005, 0.02, cos_min="0.92"),
    m(itda_module.OVER_SAE, 0.05, 0.04, 0.06, cos_min="0.92"),
    m(OVER_CKA, 0.2, 0.1, 0.3),
    m("seconds to fit", 1.0, of="ITDA", cos_min="0.92"),
    m("seconds to fit", 30.0, of="TopK autoencoder", cos_min="0.92"),
]
MONA = [
    m(mona.GAIN, 0.1, 0.05, 0.15, other=mona.RAW, domains="near"),
    m(mona.GAIN, 0.5, 0.4, 0.6, other="random", domains="all"),
    m(mona.GAIN, -0.02, -0.04, 0.0, other="sentence embeddings", domains="easy"),
    m(mona.GAIN, 0.1, 0.05, 0.15, other=mona.CODES_COSINE, domains="all"),
    m(mona.SAVED, 0.02, 0.01, 0.03, other=mona.RAW),
    m(mona.SAVED, 0.2, 0.1, 0.3, other="random"),
]


def judged(slug, measured):
    checks = recipe(slug).judge(Measured(measured))
    return verdict_of(checks), {c.name: c.passed for c in checks}


@pytest.mark.parametrize(
    ("name", "new", "group", "verdict"),
    [
        (OVER_CKA, m(OVER_CKA, 0.2, 0.1, 0.3), {}, "holds"),
        (OVER_CKA, m(OVER_CKA, -0.2, -0.3, -0.1), {}, "partly"),
        (OVER_CKA, m(OVER_CKA, 0.0, -0.3, 0.3), {}, "partly"),
        (itda_module.OVER_SAE, m(itda_module.OVER_SAE, -0.1, -0.2, -0.05, cos_min="0.92"), {}, "partly"),
        (
            itda_module.OVER_RANDOM,
            m(itda_module.OVER_RANDOM, -0.01, -0.02, -0.005, cos_min="0.92"),
            {"cos_min": "0.92"},
            "partly",
        ),
        ("seconds to fit", m("seconds to fit", 5.0, of="ITDA", cos_min="0.92"), {"of": "ITDA"}, "partly"),
    ],
)
def test_itda_criterion(name, new, group, verdict):
    assert judged("itda", replaced(ITDA, name, [new], **group))[0] == verdict


def test_itda_does_not_hold_if_both_central_checks_fail():
    bad = replaced(ITDA, OVER_CKA, [m(OVER_CKA, -0.2, -0.3, -0.1)])
    bad = replaced(bad, itda_module.OVER_SAE, [m(itda_module.OVER_SAE, -0.1, -0.2, -0.05, cos_min="0.92")])
    assert judged("itda", bad)[0] == "does not hold here"
    only = [x for x in ITDA if x.name == OVER_CKA]
    verdict, checks = judged("itda", only)
    assert verdict == "partly" and checks["selected atoms beat as many random ones"] is None


@pytest.mark.parametrize(
    ("name", "group", "value", "verdict"),
    [
        (mona.GAIN, {"other": mona.RAW, "domains": "near"}, (0.1, 0.05, 0.15), "holds"),
        (mona.GAIN, {"other": mona.RAW, "domains": "near"}, (-0.1, -0.2, -0.05), "partly"),
        (mona.SAVED, {"other": mona.RAW}, (-0.1, -0.2, -0.05), "partly"),
        (mona.SAVED, {"other": "random"}, (-0.1, -0.2, -0.05), "partly"),
        (mona.GAIN, {"other": "sentence embeddings", "domains": "easy"}, (-0.1, -0.2, -0.05), "partly"),
        (mona.GAIN, {"other": mona.CODES_COSINE, "domains": "all"}, (0.0, -0.1, 0.1), "partly"),
    ],
)
def test_mona_criterion(name, group, value, verdict):
    assert (
        judged("mona-data-selection", replaced(MONA, name, [m(name, *value, **group)], **group))[0] == verdict
    )


def test_mona_does_not_hold_if_raw_activations_win_on_both_metrics():
    bad = replaced(MONA, mona.SAVED, [m(mona.SAVED, -0.1, -0.2, -0.05, other=mona.RAW)], other=mona.RAW)
    near = {"other": mona.RAW, "domains": "near"}
    bad = replaced(bad, mona.GAIN, [m(mona.GAIN, -0.1, -0.2, -0.05, **near)], **near)
    assert judged("mona-data-selection", bad)[0] == "does not hold here"


def small_model(*_, **__):
    return byte_model("silu", 0, width=32, layers=4)


def test_a_tiny_run_of_itda(monkeypatch):
    import actlas.models

    monkeypatch.setattr(actlas.models, "load", small_model)
    sizes = {
        "tokens": 1536,
        "held_out": 512,
        "cos_mins": (0.8, 0.9),
        "random_draws": 2,
        "sae_rows": 2048,
        "sae_steps": 3,
        "models": 3,
        "train_steps": 1,
        "shared_tokens": 384,
    }
    result = reproduce("itda", settings=sizes)
    found = Measured(result.measured)
    assert {x.group["by"] for x in found.every("layer matching")} >= {"ITDA", "ITDA, seeds kept", "CKA"}
    assert len(found.every(itda_module.WHAT)) == 1 + 2 * 2 + 1
    assert found[itda_module.OVER_ORTHOGONAL].value > 0
    assert found[OVER_CKA].n == 2 * 2 * 5 and len(result.checks) == 4


def test_a_tiny_run_of_mona(monkeypatch):
    import actlas.models

    monkeypatch.setattr(actlas.models, "load", small_model)
    sizes = {
        "per_domain": 14,
        "examples": 4,
        "test": 3,
        "seeds": 2,
        "features": 64,
        "k": 8,
        "sae_steps": 3,
        "tuned": ("docs",),
        "tune_steps": 2,
        "tune_seeds": 1,
        "embeddings": False,
    }
    found = Measured(reproduce("mona-data-selection", settings=sizes).measured)
    assert found.get(mona.PRECISION, by=mona.MONA, domains="all").n == 2 * 5
    assert {x.group["by"] for x in found.every(mona.LOSS)} == {"untuned", mona.MONA, mona.RAW, "random"}


def test_the_pool_has_chunks_of_every_domain_and_splits_do_not_overlap():
    texts, domains = draw_pool(byte_tokenizer(), 9, 1)
    assert len(set(texts)) == 45 and [domains.count(d) for d in DOMAINS] == [9] * 5
    assert all(len(t.encode()) <= 60 for t in texts)
    parts = split(domains, "code", 0, examples=3, test=2)
    assert len(parts.target) == 3 and len(parts.test) == 2 and len(parts.pool) == 20
    assert {domains[i] for i in parts.target + parts.test} == {"code"}
    assert not set(parts.target + parts.test) & set(parts.pool)
    assert parts != split(domains, "code", 1, examples=3, test=2)


def test_tuning_lowers_the_loss_and_leaves_no_trace():
    model = small_model()
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    text = ["abcabcabcabcabcabcabc", "bcabcabcabcabc"]
    tuner = Tuner(model, steps=8, lr=3e-3, batch=1)
    plain, tuned = tuner.losses([], text, 0), tuner.losses(text, text, 0)
    assert (tuned < plain - 0.1).all()
    ids = model.encode(text[:1])["input_ids"]
    loss = model.module(input_ids=ids, labels=ids).loss.item()
    np.testing.assert_allclose(plain[0], loss, rtol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    np.testing.assert_array_equal(tuner.losses(text, text, 0), tuned)
