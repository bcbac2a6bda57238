"""What features mean: against brute force on a small model, and on codes whose meaning is known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actlas.core.codes import Codes
from actlas.core.direct_logits import direct_logits
from actlas.core.errors import FingerprintError, InputError
from actlas.core.model import Model
from actlas.dictionaries import TopKSAE
from actlas.dictionaries.browser import page
from actlas.dictionaries.feature_atlas import FeatureAtlas, feature_atlas
from actlas.dictionaries.feature_codes import CorpusCodes, read_codes
from actlas.dictionaries.labels import label_features

SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def sae(toy: Model) -> TopKSAE:
    return replace(TopKSAE.create(SITE, 32, 48, k=4, seed=1), fingerprint=toy.fingerprint)


@pytest.fixture(scope="module")
def atlas(toy: Model, sae: TopKSAE, text: list[str]) -> FeatureAtlas:
    return feature_atlas(toy, sae, text, max_tokens=900, context=16, before=3, after=2, name="toy text")


def dense(toy: Model, sae: TopKSAE, text: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all codes, dense, and the window of each token."""
    z, windows, n = [], [], 0
    for trace in toy.stream(text, SITE, context=16, max_tokens=900):
        assert trace.mask is not None
        z.append(sae.encode(trace[SITE]).dense()[trace.mask])
        for row in trace.mask:
            windows += [n] * int(row.sum())
            n += 1
    return torch.cat(z), torch.tensor(windows)


def test_numbers_are_those_of_the_dense_codes(
    toy: Model, sae: TopKSAE, text: list[str], atlas: FeatureAtlas
) -> None:
    z, windows = dense(toy, sae, text)
    assert atlas.about["tokens"] == len(z) == 900 and atlas.about["dead"] == int((z.sum(0) == 0).sum())
    fired = z > 0
    joint = fired.T.double() @ fired.double()
    for f in atlas.features:
        mine = z[:, f.number]
        assert f.firings == int((mine > 0).sum())
        if not f.firings:
            assert f.contexts == () and f.label is None
            continue
        assert f.largest == pytest.approx(float(mine.max()), rel=1e-5)
        assert f.mean == pytest.approx(float(mine[mine > 0].mean()), rel=1e-5)
        assert sum(f.histogram) == f.firings
        best = torch.stack([mine[windows == w].max() for w in windows.unique()]).sort(descending=True).values
        shown = [c.values[c.centre] for c in f.contexts]
        np.testing.assert_allclose(shown, best[: len(shown)].numpy(), atol=1e-3)
        union = fired.sum(0)[f.number] + fired.sum(0) - joint[f.number]
        jaccard = joint[f.number] / union.clamp_min(1)
        for other, value in f.neighbours:
            assert value == pytest.approx(float(jaccard[other]), abs=1e-3) and other != f.number
        jaccard[f.number] = 0
        if f.neighbours:
            assert f.neighbours[0][1] == pytest.approx(float(jaccard.max()), abs=1e-3)


def test_contexts_are_text_of_one_window(text: list[str], atlas: FeatureAtlas) -> None:
    checked = 0
    for f in atlas.features:
        for c in f.contexts:
            words = [t.strip() for t in c.tokens if t.strip()]
            assert " ".join(words) in text[int(c.document)] and len(c.tokens) <= 6
            assert c.values[c.centre] == max(c.values[c.centre], 0) > 0
            checked += 1
    assert checked > 100


def test_raised_tokens_are_the_direct_logits(toy: Model, sae: TopKSAE, atlas: FeatureAtlas) -> None:
    logits = direct_logits(toy, sae.atoms)
    f = atlas.feature(5)
    assert f.raised[0][1] == pytest.approx(float(logits[5].max()), rel=1e-3)
    assert f.lowered[0][1] == pytest.approx(float(logits[5].min()), rel=1e-3)
    assert toy.tokenizer is not None
    assert f.raised[0][0] == toy.tokenizer.decode([int(logits[5].argmax())])


def test_massive_rows_do_not_fire(toy: Model, sae: TopKSAE, text: list[str]) -> None:
    norms = torch.cat([t.rows(SITE).norm(dim=1) for t in toy.stream(text, SITE, context=16, max_tokens=300)])
    limit = float(norms.quantile(0.8))
    read = read_codes(toy, replace(sae, skip_above=limit), text, max_tokens=300, context=16)
    assert read.massive == int((norms > limit).sum()) == int((read.codes.l0 == 0).sum())


def test_known_meanings_are_named() -> None:
    g = np.random.default_rng(0)
    tokens = g.integers(0, 20, 4000)
    before = np.r_[-1, tokens[:-1]]
    z = np.zeros((4000, 5), dtype=np.float32)
    z[:, 0] = (tokens == 7) * 1.0
    z[:, 1] = (before == 3) * (0.5 + g.random(4000))
    z[:, 2] = np.isin(tokens, [4, 9]) * 2.0
    z[:, 3] = (g.random(4000) < 0.05) * 1.0
    z[:, 4] = (tokens == 11) * 1.0 + (tokens == 12) * 0.1  # the weak firings are not strong ones
    read = CorpusCodes(
        Codes.from_dense(torch.tensor(z)), torch.tensor(tokens), torch.arange(4000) // 40,
        torch.arange(4000) % 40, ("d",) * 100, ("",) * 100, 0,
    )  # fmt: skip
    labels = label_features(read, {i: f" t{i}" for i in range(20)})
    assert labels[3] is None
    known = [
        ("token", {" t7"}),
        ("previous token", {" t3"}),
        ("token", {" t4", " t9"}),
        None,
        ("token", {" t11"}),
    ]
    for label, expected in zip(labels, known, strict=True):
        if expected is None:
            continue
        assert label is not None and (label.attribute, set(label.values)) == expected
        assert label.precision > 0.95 and label.recall > 0.95 and label.low <= label.precision <= label.high
    assert str(labels[0]) == "token ' t7'"


def test_names_are_verified_on_other_text() -> None:
    """A feature that follows a token in one half of the text only keeps no label."""
    tokens = np.arange(4000) % 20
    window = np.arange(4000) // 40
    z = ((tokens == 7) & (window % 2 == 0)) * 1.0
    read = CorpusCodes(
        Codes.from_dense(torch.tensor(z[:, None], dtype=torch.float32)), torch.tensor(tokens),
        torch.tensor(window), torch.arange(4000), ("d",) * 100, ("",) * 100, 0,
    )  # fmt: skip
    assert label_features(read, {}) == [None]


def test_page_holds_the_atlas_and_nothing_from_elsewhere(atlas: FeatureAtlas, tmp_path: Path) -> None:
    text = atlas.save_html(tmp_path / "f.html").read_text()
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    shown = [f for f in atlas.features if f.firings]
    assert [f["n"] for f in data["features"]] == [f.number for f in shown]
    first = data["features"][0]
    assert [data["words"][w] for w in first["e"][0][0]] == list(shown[0].contexts[0].tokens)
    assert "@@" not in text and not re.findall(r"(?:src|href)\s*=\s*[\"']https?:", text)


def test_text_cannot_break_the_page(atlas: FeatureAtlas) -> None:
    c = replace(
        atlas.features[0].contexts[0], tokens=("</script><b>",) * len(atlas.features[0].contexts[0].tokens)
    )
    bad = replace(
        atlas, features=(replace(atlas.features[0], contexts=(c,)),), about={**atlas.about, "model": "<m>"}
    )
    text = page(bad)
    assert "</script><b>" not in text and "<m>" not in text and "&lt;m&gt;" in text


def test_bad_input(toy: Model, sae: TopKSAE, atlas: FeatureAtlas) -> None:
    with pytest.raises(InputError, match="no feature 48; there are 0 to 47"):
        atlas.feature(48)
    with pytest.raises(InputError, match="no text"):
        feature_atlas(toy, sae, [])
    other = replace(toy.fingerprint, model_type="other")
    with pytest.raises(FingerprintError):
        feature_atlas(toy, replace(sae, fingerprint=other), ["w1 w2"])
    assert atlas.search("w7") and not atlas.search("nowhere to be found")
