"""Probes against scikit-learn, on planted directions and on labels that say nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from actlas.core.calibration.massive import massive_rows
from actlas.core.edits import Add
from actlas.core.errors import InputError, NonFiniteError, ShapeError, SiteError
from actlas.core.lens import Lens
from actlas.core.probe import Probe, fit_probe
from actlas.core.probe_data import Examples, gather_examples, parse_items
from actlas.core.probe_quality import Scorer, auc, judge, split
from tests.core.tiny import TEXTS, tiny

SITE = "blocks.1.resid_post"
D = 12


def planted(n: int = 240, gap: float = 1.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows whose class shows along one direction, in channels of very different sizes."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, n)
    scale = np.array([0.01, 100, *([1.0] * (D - 2))])
    direction = np.zeros(D)
    direction[[0, 3, 5]] = 1.0
    x = (generator.normal(size=(n, D)) + np.outer(y - 0.5, direction) * gap) * scale + generator.normal(
        size=D
    )
    return torch.tensor(x), torch.tensor(y)


def parts(x: torch.Tensor, y: torch.Tensor, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    examples = Examples(x.numpy(), y.numpy().astype(float), np.arange(len(y)))
    return split(examples, 0.3, seed)


@pytest.mark.parametrize("regularisation", [0.1, 1.0, 30.0])
def test_logistic_equals_scikit_learn_on_standardised_rows(regularisation: float) -> None:
    x, y = planted()
    fit, test = parts(x, y)
    probe = fit_probe(None, (x, y), SITE, regularisation=regularisation, controls=0)
    scaler = StandardScaler().fit(x[fit])
    reference = LogisticRegression(C=1 / regularisation).fit(scaler.transform(x[fit]), y[fit])
    logits = reference.decision_function(scaler.transform(x))
    np.testing.assert_allclose(probe.score(x).numpy(), logits, rtol=1e-3, atol=2e-3)
    accuracy = next(m for m in probe.measurements if m.name == "probe accuracy")
    assert accuracy.value == pytest.approx(reference.score(scaler.transform(x[test]), y[test]))
    assert accuracy.n == len(test) and accuracy.low < accuracy.value < accuracy.high


def test_means_decide_as_the_nearest_centroid_does() -> None:
    x, y = planted()
    fit, _ = parts(x, y)
    for standardise in (True, False):
        probe = fit_probe(None, (x, y), SITE, method="means", standardise=standardise, controls=0)
        scaler = StandardScaler(with_mean=standardise, with_std=standardise).fit(x[fit])
        reference = NearestCentroid().fit(scaler.transform(x[fit]), y[fit])
        predicted = reference.predict(scaler.transform(x)) == 1
        score = probe.score(x).numpy()
        agree = (score > 0) == predicted
        assert agree[np.abs(score) > 1e-4].all()
    difference = x[fit][y[fit] == 1].mean(0) - x[fit][y[fit] == 0].mean(0)
    torch.testing.assert_close(probe.direction().double(), difference, rtol=1e-5, atol=1e-5)


def test_means_scores_are_log_odds() -> None:
    """One channel, two Gaussians of equal variance: the log-odds are known exactly."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 2
    x = (torch.randn(3000, generator=generator) * 2 + 3 * y).unsqueeze(1).double()
    probe = fit_probe(None, (x, y), SITE, method="means", controls=0)
    points = torch.tensor([[-2.0], [1.5], [4.0]])
    exact = 3 / 4 * (points[:, 0] - 1.5)
    torch.testing.assert_close(probe.score(points), exact, rtol=0.15, atol=0.15)


def test_ridge_equals_scikit_learn() -> None:
    x, _ = planted()
    y = x[:, 4] * 2 + 0.3 * x[:, 0] * 100 + 1
    fit, _ = parts(x, y)
    for penalty in (None, 3.0):
        probe = fit_probe(None, (x, y), SITE, method="ridge", regularisation=penalty)
        scaler = StandardScaler().fit(x[fit])
        reference = Ridge(alpha=penalty or D).fit(scaler.transform(x[fit]), y[fit])
        np.testing.assert_allclose(
            probe.score(x).numpy(), reference.predict(scaler.transform(x)), rtol=1e-3, atol=1e-2
        )
        r2, control, above = probe.measurements
        assert (r2.name, control.name) == ("probe R2", "probe R2, shuffled labels")
        assert r2.value > 0.9 and control.value < 0.1 and above.low > 0.7
        assert r2.baseline == control
    moved = probe.score(x + probe.direction()) - probe.score(x)
    torch.testing.assert_close(
        moved, torch.full_like(moved, float(np.std(y.numpy()[fit]))), rtol=1e-2, atol=1e-2
    )


def test_measurements_show_the_effect_beside_its_control() -> None:
    x, y = planted()
    probe = fit_probe(None, (x, y), SITE)
    accuracy, control, above, auc = probe.measurements
    assert [m.name for m in probe.measurements] == [
        "probe accuracy",
        "probe accuracy, shuffled labels",
        "probe accuracy above shuffled labels",
        "probe AUC",
    ]
    assert accuracy.value > 0.8 and auc.value > 0.9 and auc.unit == "AUC"
    assert 0.35 < control.value < 0.65 and accuracy.baseline == control
    assert above.value == pytest.approx(accuracy.value - control.value) and above.low > 0.1
    assert accuracy.interval.startswith("wilson") and accuracy.details["fitted on"] == 160
    exact = binomtest(round(accuracy.value * accuracy.n), accuracy.n).proportion_ci(0.95, method="wilson")
    assert (accuracy.low, accuracy.high) == pytest.approx((exact.low, exact.high))
    assert len(fit_probe(None, (x, y), SITE, controls=0).measurements) == 2


def test_labels_that_say_nothing_are_not_above_their_control() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 200, generator=generator)  # more channels than examples: any labels can be fitted
    y = torch.randint(0, 2, (90,), generator=generator)
    probe = fit_probe(None, (x, y), SITE, controls=8)
    accuracy, control, above, _ = probe.measurements
    assert abs(accuracy.value - 0.5) < 0.25 and abs(control.value - 0.5) < 0.15
    assert above.low < 0 < above.high


def test_auc_equals_scikit_learn_with_ties_and_weights() -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 50).astype(float)
    scores = np.round(generator.normal(size=50) + y, 1)
    weights = generator.integers(0, 4, (6, 50)).astype(float)
    expected = [roc_auc_score(y, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(auc(y, scores, weights), expected, rtol=1e-12)
    assert np.isnan(auc(y, scores, y[None])).all()


def test_the_control_repeats_fit_and_test_with_shuffled_labels() -> None:
    y = np.arange(80) % 2.0
    examples = Examples(np.stack([y - 0.5, np.arange(80.0)], 1), y, np.arange(80))
    parts = split(examples, 0.3, 0)
    seen: list[np.ndarray] = []

    def fit(given: Examples) -> Scorer:
        seen.append(given.y)
        return lambda x: x[:, 0]  # knows the true labels, whatever it was shown

    _, (accuracy, control, _, _) = judge(
        fit, examples, parts, classify=True, controls=3, seed=0, about={}, group={}
    )
    assert accuracy.value == 1.0 and 0.3 < control.value < 0.7
    assert np.array_equal(seen[0], y[parts[0]]) and len(seen) == 4
    for shown in seen[1:]:
        assert shown.sum() == seen[0].sum() and not np.array_equal(shown, seen[0])


def test_the_same_seed_gives_the_same_probe() -> None:
    data = planted()
    a, b, c = (fit_probe(None, data, SITE, seed=s) for s in (3, 3, 4))
    assert torch.equal(a.weight, b.weight) and a.measurements == b.measurements
    assert not torch.equal(a.weight, c.weight)


def test_strength_one_moves_from_one_class_mean_to_the_other() -> None:
    x, y = planted()
    fit, _ = parts(x, y)
    for method in ("means", "logistic"):
        probe = fit_probe(None, (x, y), SITE, method=method, controls=0)
        gap = probe.score(x[fit][y[fit] == 1]).mean() - probe.score(x[fit][y[fit] == 0]).mean()
        moved = probe.score(x + probe.direction()) - probe.score(x)
        torch.testing.assert_close(moved, gap.expand_as(moved), rtol=1e-3, atol=1e-3)


# -- from text ----------------------------------------------------------------------------------------


@dataclass
class Pair:
    id: str
    positive: str
    negative: str


PAIRS = [
    (f"the {w} is up!", f"the {w} is down.")
    for w in ["cat", "dog", "sun", "moon", "tree", "lake", "road", "hill", "bird", "king"]
]


@pytest.mark.parametrize("site", [SITE, "blocks.0.attn.z", "blocks.2.mlp.act"])
@pytest.mark.parametrize("method", ["means", "logistic"])
def test_a_probe_reads_pairs_of_texts_and_steers(site: str, method: str, tmp_path: Path) -> None:
    model = tiny()
    probe = fit_probe(model, PAIRS, site, method=method)
    assert probe.measurements[0].value == 1.0  # the last characters differ
    # The two texts of a pair are not independent: 4 pairs are held out, not 8 texts.
    assert probe.measurements[0].n == 8
    assert probe.measurements[0].low == pytest.approx(1 / (1 + 1.96**2 / 4), abs=1e-3)
    trace = model.trace([p for p, _ in PAIRS], site)
    assert (probe.score(trace.last(site)) > 0).all()
    probe.save(tmp_path / "p")
    loaded = Lens.load(tmp_path / "p", model)
    assert isinstance(loaded, Probe) and loaded.measurements == probe.measurements
    assert torch.equal(loaded.score(trace[site]), probe.score(trace[site]))
    negative = model.trace([n for _, n in PAIRS], site)
    with model.edit(loaded.edit(strength=2.0)):
        steered = model.trace([n for _, n in PAIRS], site)
    assert (probe.score(steered.last(site)) > 0).all() and (probe.score(negative.last(site)) < 0).all()


def test_a_probe_gates_an_edit() -> None:
    model = tiny()
    probe = fit_probe(model, PAIRS, SITE, controls=0)
    out = "blocks.2.mlp.out"
    edit = Add(out, torch.ones(32)).when(probe, per="sequence")
    texts = [PAIRS[0][0], PAIRS[0][1]]
    plain = model.trace(texts, out)
    with model.edit(edit):
        found = model.trace(texts, out)
    moved = [float((found[out][i] - plain[out][i])[plain.mask[i]].abs().max()) for i in (0, 1)]
    assert moved[0] == pytest.approx(1.0, abs=1e-4) and moved[1] == 0.0


def test_forms_of_data_that_mean_the_same() -> None:
    forms = [
        PAIRS,
        [list(p) for p in PAIRS],
        [{"positive": p, "negative": n} for p, n in PAIRS],
        [Pair(str(i), *p) for i, p in enumerate(PAIRS)],
    ]
    expected = parse_items(PAIRS)
    assert all(parse_items(form) == expected for form in forms)
    assert expected[3] and expected[2][:4] == [0, 0, 1, 1]
    labelled = [("a b", True), ("c d", 0), ("a b", 1.0), ("e", False)]
    texts, labels, groups, paired = parse_items(labelled)
    assert (labels, groups, paired) == ([1.0, 0.0, 1.0, 0.0], [0, 1, 0, 2], False)
    assert parse_items([{"text": t, "label": y} for t, y in labelled]) == (texts, labels, groups, False)


@pytest.mark.parametrize("position", ["last", "first", "mean", 2, -3])
def test_positions(position: str | int) -> None:
    model = tiny()
    model.module.model.embed_tokens.weight.data[model.tokenizer.convert_tokens_to_ids("W"), 7] = -700.0
    site = model.resolve("blocks.0.resid_pre")[0]
    texts = [t[:64] for t in TEXTS if len(t) > 4] + ["What is this?", "Was it you, Will?", "W W WW"]
    examples = gather_examples(model, [(t, i % 2) for i, t in enumerate(texts)], site, position)
    for i, text in enumerate(texts):
        x = model.trace(text, site)[site.name][0].double()
        kept = x[~massive_rows(x)]
        expected = {"last": x[-1], "first": x[0], "mean": kept.mean(0), 2: x[2], -3: x[-3]}[position]
        np.testing.assert_allclose(examples.x[i], expected.numpy(), rtol=1e-5, atol=1e-5)


def test_pairs_and_repeated_texts_stay_on_one_side_of_the_split() -> None:
    x = np.random.default_rng(0).normal(size=(60, 3))
    group = np.repeat(np.arange(20), 3)
    examples = Examples(x, (np.arange(60) % 2).astype(float), group)
    fit, test = split(examples, 0.3, 0)
    assert not set(group[fit]) & set(group[test]) and len(fit) + len(test) == 60
    assert 0.2 < len(test) / 60 < 0.45


def test_shuffled_pairs_stay_pairs() -> None:
    y = np.tile([1.0, 0.0], 30)
    examples = Examples(np.zeros((60, 1)), y, np.repeat(np.arange(30), 2), paired=True)
    lied = examples.shuffled(np.random.default_rng(0))
    assert (lied.y.reshape(30, 2).sum(1) == 1).all()
    assert 5 < int((lied.y != y).sum()) / 2 < 25


def test_bad_input_is_named() -> None:
    x, y = planted(40)
    model = tiny()
    with pytest.raises(InputError, match="method is 'svm'"):
        fit_probe(None, (x, y), SITE, method="svm")
    with pytest.raises(InputError, match="method='ridge'"):
        fit_probe(None, (x, y * 3), SITE)
    with pytest.raises(InputError, match="every label is 1"):
        fit_probe(None, (x, torch.ones(40)), SITE)
    with pytest.raises(InputError, match="at least 8"):
        fit_probe(None, (x[:5], y[:5]), SITE)
    with pytest.raises(InputError, match="regularisation is -1"):
        fit_probe(None, (x, y), SITE, regularisation=-1)
    with pytest.raises(InputError, match="held-out fraction"):
        fit_probe(None, (x, y), SITE, held_out=0.9)
    with pytest.raises(ShapeError, match=r"\[40, 12\] and \[39\]"):
        fit_probe(None, (x, y[1:]), SITE)
    with pytest.raises(NonFiniteError):
        fit_probe(None, (x * float("nan"), y), SITE)
    with pytest.raises(InputError, match="one site"):
        fit_probe(model, PAIRS, "blocks.*.resid_post")
    with pytest.raises(SiteError):
        fit_probe(model, PAIRS, "blocks.1.attn.pattern")
    with pytest.raises(InputError, match="item 1 is labelled"):
        fit_probe(model, [PAIRS[0], ("a", 1)], SITE)
    with pytest.raises(InputError, match="label of item 0 is 'yes'"):
        fit_probe(model, [{"text": "a", "label": "yes"}] * 9, SITE)
    with pytest.raises(InputError, match="text 1 of the labelled data is empty"):
        fit_probe(model, [("a", " ")] * 9, SITE)
    with pytest.raises(InputError, match="item 0 of the labelled data is int"):
        fit_probe(model, [3] * 9, SITE)
    with pytest.raises(InputError, match="position 50 does not exist"):
        fit_probe(model, PAIRS, SITE, position=50)
    with pytest.raises(InputError, match="'last', 'first', 'mean'"):
        fit_probe(model, PAIRS, SITE, position="middle")
    with pytest.raises(InputError, match="texts need a model"):
        fit_probe(None, PAIRS, SITE)
