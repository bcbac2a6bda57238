"""Probing, removal and the first-letter task on planted features, where the right answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.dictionaries.evaluation import UnitDirections, first_letter
from actlas.dictionaries.evaluation.differences import over_controls
from actlas.dictionaries.evaluation.first_letter import (
    absorption,
    letter_measurements,
    letter_scores,
)
from actlas.dictionaries.evaluation.letter_words import Words, read_words
from actlas.dictionaries.evaluation.probing import balanced, by_mean_difference, probing_of, sparse_probing
from actlas.dictionaries.evaluation.removal import scr_of, switch_off, targeted_probe_perturbation, tpp_of
from actlas.dictionaries.evaluation.texts import Pooled, default_sets, pool_texts, review_corners
from tests.core.tiny import TEXTS, tiny
from tests.measure import small_models

D, M = 24, 12
BASIS = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q[:M]
LENS = UnitDirections(site="s", directions=BASIS, centre=torch.zeros(D), k=M)


def planted(labels: np.ndarray, codes: np.ndarray, noise: float = 0.1) -> Pooled:
    g = np.random.default_rng(1)
    x = codes @ BASIS.numpy() + noise * g.normal(size=(len(codes), D))
    return Pooled(x.astype(np.float32), {"own": codes.astype(np.float32)}, labels)


def three_classes(n: int = 120) -> Pooled:
    """Class c is feature c; the other features are noise."""
    label = np.array(["a", "b", "c"])[np.arange(n) % 3]
    codes = np.abs(np.random.default_rng(0).normal(size=(n, M))) * 1.5
    for j, c in enumerate("abc"):
        codes[:, j] = (label == c) * 2.0
    return planted(label, codes)


def by_name(found, **group):
    return {m.name: m for m in found if all(m.group.get(k) == v for k, v in group.items())}


def test_one_planted_feature_is_enough_where_one_channel_is_not():
    found = by_name(probing_of(three_classes(), ks=(1, 5)))
    assert found["sae_top_1_test_accuracy"].value == 1
    assert found["llm_test_accuracy"].value > 0.95 and found["llm_top_1_test_accuracy"].value < 0.9
    assert found["llm_top_1_test_accuracy"].n > 20  # texts, not (text, label) pairs
    low, high = found["llm_top_1_test_accuracy"].low, found["llm_top_1_test_accuracy"].high
    assert low < found["llm_top_1_test_accuracy"].value < high


def test_balanced_halves_are_disjoint_and_balanced():
    y = np.arange(100) % 4 == 0
    train, test = balanced(y, seed=3)
    assert not set(train) & set(test) and y[train].mean() == y[test].mean() == 0.5
    assert len(train) + len(test) == 50
    x = np.zeros((100, 3))
    x[y, 1], x[~y, 2] = 3, 1
    assert by_mean_difference(x, y, 2).tolist() == [1, 2]


def test_switching_off_pooled_codes_is_switching_them_off_at_every_token():
    model = tiny()
    site = "blocks.1.resid_post"
    unit = F.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    lens = UnitDirections(site=site, directions=unit, centre=torch.zeros(32), k=4)
    texts = [(t, "x") for t in TEXTS]
    pooled = pool_texts(model, texts, {"own": lens}, tokens=64)
    off = np.array([2, 7, 11])
    new = switch_off(pooled, "own", lens.atoms.numpy(), off)
    for i, (text, _) in enumerate(texts):
        x = model.trace(text[:64], site).rows(site)
        codes = lens.encode(x)
        edited = x - lens.decode(codes) + lens.decode(codes.without(off.tolist()))
        np.testing.assert_allclose(pooled.x[i], x.mean(0).numpy(), atol=1e-5)
        np.testing.assert_allclose(pooled.codes["own"][i], codes.dense().mean(0).numpy(), atol=1e-5)
        np.testing.assert_allclose(new[i], edited.mean(0).numpy(), atol=1e-5)


def test_removing_a_class_hits_its_probe_and_no_other():
    found = tpp_of(three_classes(), {"own": LENS}, thresholds=(1, 4))
    own, random = by_name(found, dictionary="own"), by_name(found, dictionary="random features")
    intended = own["tpp_threshold_1_intended_diff_only"].value
    unintended = own["tpp_threshold_1_unintended_diff_only"].value
    assert intended > 0.3 and abs(unintended) < 0.1
    assert own["tpp_threshold_1_total_metric"].value == pytest.approx(intended - unintended)
    assert own["tpp_threshold_1_total_metric"].low > 0.2
    assert abs(random["tpp_threshold_1_total_metric"].value) < 0.25
    assert own["tpp_threshold_4_total_metric"].value > random["tpp_threshold_4_total_metric"].value + 0.2


def test_removing_the_spurious_attribute_frees_the_wanted_one():
    g = np.random.default_rng(0)
    first, second = np.arange(160) % 2, np.arange(160) // 2 % 2
    codes = np.abs(g.normal(size=(160, M))) * 0.1
    for value in (0, 1):  # a feature for each value of each attribute; the first attribute is louder
        codes[:, value], codes[:, 2 + value] = (first == value) * 3.0, (second == value) * 1.0
    pooled = planted(np.array(["n", "p"])[first], codes, noise=0.02)
    found = scr_of(pooled, np.array(["food", "film"])[second].tolist(), {"own": LENS}, thresholds=(2,))
    own, random = by_name(found, dictionary="own"), by_name(found, dictionary="random features")
    # Without the loud attribute's two features the probe reads the quiet one: direction 1, the worse one.
    assert own["scr_dir1_threshold_2"].value > 0.5
    assert own["scr_metric_threshold_2"].value == own["scr_dir1_threshold_2"].value
    assert random["scr_dir1_threshold_2"].value < 0.3
    gap = over_controls(found, "own")
    assert [m.name for m in gap] == ["scr_metric_threshold_2 over random features"] and gap[0].low > 0.2


@pytest.mark.parametrize(
    ("projection", "z", "cosines", "whole", "expected"),
    [
        ([5.0, 0, 0], [5.0, 0, 0], [0.9, 0.5, 0.5], 5.0, (0.0, False)),  # the letter's feature does it all
        ([0.0, 4.0, 0], [0.0, 8.0, 0], [0.9, 0.5, 0.5], 5.0, (1.0, True)),  # another one does
        ([1.0, 4.0, 0], [1.0, 8.0, 0], [0.9, 0.5, 0.5], 5.0, (4 / 5, False)),  # both: partly absorbed
        ([1.0, 9.0, 0], [1.0, 8.0, 0], [0.9, 0.5, 0.5], 5.0, (4 / 5, False)),  # no more than what was missing
        ([0.0, 1.0, 0], [0.0, 8.0, 0], [0.9, 0.5, 0.5], 5.0, (0.0, False)),  # too little to count
        ([0.0, 4.0, 0], [0.0, 80.0, 0], [0.9, 0.05, 0.5], 5.0, (0.0, True)),  # aligned enough for full only
        ([0.0, 4.0, 0], [0.0, 8.0, 0], [0.9, 0.5, 0.5], -1.0, (0.0, False)),  # the probe itself says no
    ],
)
def test_absorption_by_cases(projection, z, cosines, whole, expected):
    made = absorption(np.array(projection), np.array(z), np.array(cosines), whole, [0])
    assert made == (pytest.approx(expected[0]), expected[1])


def words(absorbed: bool = False, split: bool = False) -> tuple[Words, UnitDirections]:
    """Two letters, 40 words each; letter b is feature 1 (or 1 and 2), unless another feature absorbs it."""
    n = 80
    letter = np.arange(n) % 2
    codes = torch.zeros(n, M)
    codes[letter == 0, 0] = 2.0
    own = np.flatnonzero(letter == 1)
    codes[own, 1] = 2.0
    if split:
        codes[own[::2], 1], codes[own[::2], 2] = 0.0, 2.0
    directions = BASIS.clone()
    if absorbed:  # these words have a feature of their own, which carries the letter's direction
        directions[3] = F.normalize(BASIS[1] + 0.5 * BASIS[3], dim=0)
        codes[own[::4], 1], codes[own[::4], 3] = 0.0, 2.2
    codes[:, 5] = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 0.2
    lens = UnitDirections(site="s", directions=directions, centre=torch.zeros(D), k=2)
    train = np.random.default_rng(0).permutation(n) < 50
    return Words(codes @ directions, letter, train, tuple(map(str, range(n)))), lens


def measured(most: int = 4, **kind):
    from actlas.dictionaries.evaluation.first_letter import _probes

    read, lens = words(**kind)
    scores = letter_scores(lens, read, _probes(read), most=most)
    return scores, by_name(letter_measurements(scores, {}))


def test_a_feature_for_each_letter_is_neither_split_nor_absorbed():
    scores, found = measured()
    assert [s.letter for s in scores] == ["a", "b"] and all(s.probe_f1 == 1 for s in scores)
    assert found["mean_absorption_fraction_score"].value == 0
    assert found["mean_full_absorption_score"].value == 0
    assert found["mean_num_split_features"].value == 1 and found["first_letter_top_1_f1"].value == 1
    assert {s.features[0] for s in scores} == {0, 1}


def test_two_features_that_share_a_letter_are_a_split():
    scores, _ = measured(split=True)
    assert len(scores[0].features) == 1 and set(scores[1].features) == {1, 2}


def test_an_absorbing_feature_is_found():
    scores, found = measured(most=1, absorbed=True)
    a, b = scores
    assert a.features == (0,) and b.features == (1,)
    assert not any(a.full) and not any(a.fractions)
    assert 0.1 < np.mean(b.full) < 0.5 and b.fractions == tuple(float(f) for f in b.full)
    assert found["mean_full_absorption_score"].value == pytest.approx(np.mean(b.full) / 2)


def test_no_letter_known_is_said_and_not_a_number():
    scores, _ = measured()
    bad = [type(s)(s.letter, 0.2, s.sparse_f1, s.features, s.fractions, s.full) for s in scores]
    found = by_name(letter_measurements(bad, {}))
    assert math.isnan(found["mean_absorption_fraction_score"].value)
    assert "0 of 2 letters" in found["mean_absorption_fraction_score"].note


def test_words_are_read_where_they_stand():
    model = small_models.llama()
    site = "blocks.1.resid_post"
    read = read_words(model, site, per_letter=9, examples=1, seed=2)
    assert len(set(read.letter.tolist())) >= 2 and 0.5 < read.train.mean() < 0.9
    prompt = " apple has the first letter: A\n"
    for i in (0, len(read.words) - 1):
        ids = [*model.tokenizer(prompt)["input_ids"], *model.tokenizer(f" {read.words[i]}")["input_ids"]]
        row = model.trace(torch.tensor([ids]), site)[site][0, -1]
        torch.testing.assert_close(read.x[i], row, atol=1e-4, rtol=1e-4)
    unit = F.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    lens = UnitDirections(site=site, directions=unit, centre=torch.zeros(32), k=4)
    found = by_name(first_letter(model, {"own": lens}, per_letter=9, examples=1), dictionary="own")
    assert found["first_letter_probe_f1"].n == len(set(read.letter.tolist()))
    again = read_words(model, site, per_letter=9, examples=1, seed=2)
    assert again.words == read.words and torch.equal(again.x, read.x)


def test_labelled_sets_at_hand():
    from actlas.data import corpus

    model = small_models.llama()
    sets = default_sets(model, corpus("mixed").take(60), per_class=12)
    assert {label for _, label in sets["domain"]} == {"prose", "code", "docs"} and len(sets["domain"]) == 36
    corners = review_corners(model, per_corner=10)
    assert len({(a, b) for _, a, b in corners}) == 4 and len(corners) == 40
    unit = F.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    lens = UnitDirections(site="blocks.1.resid_post", directions=unit, centre=torch.zeros(32), k=4)
    found = sparse_probing(model, sets["domain"], {"own": lens}, dataset="domain")
    names = {m.name for m in found}
    assert {"sae_top_1_test_accuracy", "llm_top_5_test_accuracy", "llm_test_accuracy"} <= names
    assert all(0 <= m.value <= 1 and m.group["dataset"] == "domain" for m in found)
    removed = targeted_probe_perturbation(model, sets["domain"], {"own": lens}, thresholds=(2,))
    assert {m.group["dictionary"] for m in removed} == {"own", "random features"}


def test_bad_input():
    pooled = three_classes()
    alone = Pooled(pooled.x, pooled.codes, np.array(["a"] * len(pooled)))
    with pytest.raises(InputError, match="every text is labelled 'a'"):
        probing_of(alone)
    with pytest.raises(InputError, match="k must be between 1 and 24"):
        probing_of(pooled, ks=(30,))
    with pytest.raises(InputError, match="three labels or more, not 1"):
        tpp_of(alone, {"own": LENS})
    few = Pooled(pooled.x[:21], {"own": pooled.codes["own"][:21]}, pooled.label[:21])
    with pytest.raises(InputError, match="7 texts are too few"):
        probing_of(few)
    with pytest.raises(InputError, match="two values"):
        scr_of(pooled, ["x"] * len(pooled), {"own": LENS})
    with pytest.raises(InputError, match="no labelled texts"):
        pool_texts(tiny(), [], {"own": LENS})
    with pytest.raises(ModelError, match="no tokenizer"):
        read_words(Model(tiny().module), "blocks.1.resid_post")
    with pytest.raises(InputError, match="0 letters"):
        read_words(tiny(), "blocks.1.resid_post")
