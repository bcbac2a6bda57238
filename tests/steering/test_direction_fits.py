"""Fits of directions against brute force in float64, their identities, and unfit data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from actlas.core.contrast import Contrast, Readings, read_contrast
from actlas.core.direction import Direction
from actlas.core.edits import Add
from actlas.core.errors import InputError, NonFiniteError, SiteError
from actlas.core.lens import Lens
from actlas.core.pca import PCA as PcaLens
from actlas.steering.directions import fit_direction, fit_directions, fit_readings
from actlas.steering.features import best_feature
from actlas.steering.fits import fits
from tests.core.tiny import tiny

SITE = "blocks.1.resid_post"
PAIRS = [(f"the {a} film was {p}", f"the {a} film was {n}") for a, p, n in (
    ("old", "good", "bad"), ("new", "great", "poor"), ("long", "fine", "sad"),
    ("short", "nice", "dull"), ("loud", "kind", "cruel"), ("last", "warm", "cold"),
)]  # fmt: skip


def planted(n: int = 40, d: int = 12, seed: int = 0, noise: float = 0.3) -> tuple[torch.Tensor, ...]:
    """Return two sides that differ along a known direction, in noise that is larger along another."""
    generator = torch.Generator().manual_seed(seed)
    direction, loud = torch.randn(d, generator=generator), torch.randn(d, generator=generator)
    base = torch.randn(n, d, generator=generator)
    size = 1 + 0.5 * torch.rand(n, 1, generator=generator)
    apart = noise * (
        torch.randn(n, d, generator=generator) + 4 * torch.randn(n, 1, generator=generator) * loud
    )
    return (base + size * direction + apart).float(), base.float(), direction, loud


def readings(p: torch.Tensor, n: torch.Tensor) -> Readings:
    return Readings(SITE, p, n, 5.0)


def fitted(method: str, **options: object) -> torch.Tensor:
    p, n, *_ = planted()
    return fit_readings(readings(p, n), method=method, **options).vector.double()


def test_means() -> None:
    p, n, *_ = planted()
    np.testing.assert_allclose(fitted("mean"), p.double().numpy().mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        fitted("mean_diff"),
        sum(p.double().numpy()[i] - n.double().numpy()[i] for i in range(40)) / 40,
        rtol=1e-5,
    )


def test_pca_of_differences_is_the_top_eigenvector_with_the_sign_of_the_mean() -> None:
    p, n, *_ = planted()
    difference = (p - n).double().numpy()
    mean = difference.mean(0)
    for centre in (False, True):
        rows = difference - mean if centre else difference
        _, vectors = np.linalg.eigh(rows.T @ rows)
        top = vectors[:, -1] * np.sign(vectors[:, -1] @ mean)
        np.testing.assert_allclose(fitted("pca_diff", centre=centre), top * np.linalg.norm(mean), rtol=1e-4)
    library = PCA(1).fit(difference).components_[0]
    centred = fitted("pca_diff", centre=True).numpy()
    assert abs(library @ centred) / np.linalg.norm(centred) == pytest.approx(1, abs=1e-6)
    unit, along = fitted("pca_diff", rescale="unit"), fitted("pca_diff", rescale="projection")
    assert float(unit.norm()) == pytest.approx(1)
    assert float(along.norm()) == pytest.approx(abs(float(unit @ torch.from_numpy(mean))), rel=1e-5)
    with pytest.raises(InputError, match="rescale is 'big'"):
        fitted("pca_diff", rescale="big")


def test_centring_loses_what_all_differences_share() -> None:
    """Differences that share a long vector and vary along another: only the uncentred one finds the first."""
    generator = torch.Generator().manual_seed(1)
    shared, other = torch.zeros(8), torch.zeros(8)
    shared[0], other[3] = 5.0, 1.0
    n = torch.randn(30, 8, generator=generator)
    p = n + shared + 2 * torch.randn(30, 1, generator=generator) * other
    plain, centred = (fit_readings(readings(p, n), method="pca_diff", centre=c) for c in (False, True))
    assert plain.cosine(shared) > 0.99
    assert abs(centred.cosine(shared)) < 0.3 and abs(centred.cosine(other)) > 0.99


def test_pooled_pca_is_scikit_learns() -> None:
    p, n, *_ = planted()
    rows = torch.cat([p, n]).double().numpy()
    library = PCA(1).fit(rows).components_[0]
    mean = (p - n).double().mean(0).numpy()
    found = fitted("pca_pooled").numpy()
    np.testing.assert_allclose(
        found, library * np.sign(library @ mean) * np.linalg.norm(mean), rtol=1e-4, atol=1e-6
    )
    shuffled = Readings(SITE, p[torch.randperm(40)], n, 5.0)
    np.testing.assert_allclose(
        fit_readings(shuffled, method="pca_pooled").vector, found, rtol=1e-4, atol=1e-5
    )


def test_probe_directions_are_scikit_learns_and_cover_the_mean_difference() -> None:
    p, n, *_ = planted()
    x = torch.cat([p, n]).double().numpy()
    y = np.repeat([1, 0], 40)
    scaler = StandardScaler().fit(x)
    mean = x[:40].mean(0) - x[40:].mean(0)
    references = {
        "logistic": LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(x), y).coef_[0],
        "ridge": Ridge(alpha=12.0).fit(scaler.transform(x), y).coef_,
    }
    for method, coefficients in references.items():
        w = coefficients / scaler.scale_
        found = fitted(method).numpy()
        np.testing.assert_allclose(found, w * (w @ mean) / (w @ w), rtol=2e-3, atol=1e-4)
        assert found @ w == pytest.approx(mean @ w, rel=1e-4)  # the score moves from mean to mean


def test_lda_is_the_whitened_mean_difference() -> None:
    p, n, *_ = planted(200, noise=0.5)
    x = [s.double().numpy() for s in (p, n)]
    within = np.concatenate([s - s.mean(0) for s in x])
    mean = x[0].mean(0) - x[1].mean(0)
    shrunk, _ = ledoit_wolf(within, assume_centered=True)
    covariances = {
        None: shrunk,
        0.0: within.T @ within / 400,
        1.0: np.eye(12),
    }
    for shrinkage, covariance in covariances.items():
        w = np.linalg.solve(covariance, mean)
        found = fit_readings(readings(p, n), method="lda", shrinkage=shrinkage).vector.double().numpy()
        np.testing.assert_allclose(found, w * (w @ mean) / (w @ w), rtol=1e-4, atol=1e-6)
    plain = fit_readings(readings(p, n), method="mean_diff")
    assert plain.cosine(fit_readings(readings(p, n), method="lda", shrinkage=1.0)) == pytest.approx(1)


def test_whitening_reads_better_where_noise_is_loud() -> None:
    """Held-out rows whose noise hides the difference: the whitened direction tells them apart."""
    p, n, *_ = planted(300, noise=1.0)
    test_p, test_n, *_ = planted(300, noise=1.0)  # same directions
    accuracy = {}
    for method in ("mean_diff", "lda"):
        d = fit_readings(readings(p[:150], n[:150]), method=method)
        right = torch.cat([d.score(test_p[150:]) > 0, d.score(test_n[150:]) < 0])
        accuracy[method] = float(right.float().mean())
    assert accuracy["lda"] > accuracy["mean_diff"] + 0.05


def test_lda_without_shrinkage_needs_enough_texts() -> None:
    p, n, *_ = planted(3)
    with pytest.raises(InputError, match="do not span 12 channels"):
        fit_readings(readings(p, n), method="lda", shrinkage=0.0)
    with pytest.raises(InputError, match="at least two texts a side"):
        fit_readings(readings(p[:1], n[:1]), method="lda")
    with pytest.raises(InputError, match="shrinkage is 2"):
        fit_readings(readings(p, n), method="lda", shrinkage=2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.1, 4))
def test_label_weighted_mean_is_the_covariance(seed: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64) * 3
    y = torch.rand(20, generator=generator, dtype=torch.float64)
    cov = fits()["cov"].function
    found = cov(x, y)
    brute = sum(float(y[i]) * (x[i] - x.mean(0)) for i in range(20)) / float(y.sum())
    torch.testing.assert_close(found, brute)
    numpy_cov = np.cov(x.numpy().T, y.numpy(), bias=True)[-1, :-1]
    np.testing.assert_allclose(found * float(y.sum()) / 20, numpy_cov, rtol=1e-7, atol=1e-10)
    moved = cov(x, y * scale + shift)  # a constant changes only the length
    cosine = torch.nn.functional.cosine_similarity(found, moved, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-9)


def test_label_weighted_mean_of_two_classes_is_half_their_difference() -> None:
    p, n, *_ = planted()
    found = fit_readings(readings(p, n), method="cov").vector
    torch.testing.assert_close(found, fitted("mean_diff").float() / 2)


def test_label_weighted_mean_within_episodes() -> None:
    x = torch.tensor([[0.0, 1], [2, 1], [10, 5], [14, 7]], dtype=torch.float64)
    y = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    cov = fits()["cov"].function
    found = cov(x, y, group=["a", "a", "b", "b"])
    means = torch.tensor([[1.0, 1], [1, 1], [12, 6], [12, 6]], dtype=torch.float64)
    torch.testing.assert_close(found, ((x - means) * y.unsqueeze(1)).sum(0) / 10)
    with pytest.raises(InputError, match="4 texts but 3 groups"):
        cov(x, y, group=["a", "a", "b"])
    with pytest.raises(InputError, match="every number is 2"):
        cov(x, torch.full((4,), 2.0))


def test_ridge_of_numbers_moves_the_prediction_by_one_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = 3 * x[:, 2] + 0.1 * torch.randn(60, generator=generator, dtype=torch.float64)
    vector = fits()["ridge"].function(x, y, regularisation=1.0)
    scaler = StandardScaler().fit(x)
    w = Ridge(alpha=1.0).fit(scaler.transform(x), y).coef_ / scaler.scale_
    assert float(vector.numpy() @ w) == pytest.approx(float(y.std(correction=0)), rel=1e-6)


def test_a_feature_is_found_and_its_displacement_is_the_gap_of_its_codes() -> None:
    p, n, direction, _ = planted()
    basis = torch.linalg.qr(torch.cat([direction.unsqueeze(1), torch.randn(12, 5)], 1)).Q.T
    lens = PcaLens(
        site=SITE,
        mean=torch.zeros(12),
        components=basis[[3, 0, 1]],
        variance=torch.ones(3),
        total=3.0,
        count=9,
    )
    found = fit_readings(readings(p, n), method="feature", lens=lens)
    assert best_feature(lens.encode(p).double(), lens.encode(n).double()) == 1
    gap = (lens.encode(p).mean(0) - lens.encode(n).mean(0))[1]
    torch.testing.assert_close(found.vector, gap * basis[0], rtol=1e-4, atol=1e-5)
    named = fit_readings(readings(p, n), method="feature", lens=lens, feature=2)
    assert abs(named.cosine(basis[1])) > 0.999
    with pytest.raises(InputError, match="has no feature 7"):
        fit_readings(readings(p, n), method="feature", lens=lens, feature=7)
    with pytest.raises(InputError, match="needs the option 'lens'"):
        fit_readings(readings(p, n), method="feature")


@pytest.mark.parametrize("method", [name for name in fits() if name != "feature"])
def test_every_fit_of_a_model_gives_a_direction_that_saves_scores_and_steers(method: str, tmp_path) -> None:
    model = tiny()
    found = fit_directions(model, PAIRS, "blocks.0-1.resid_post", method=method)
    assert list(found) == ["blocks.0.resid_post", SITE]
    d = found[SITE]
    alone = fit_direction(model, PAIRS, SITE, method=method)
    torch.testing.assert_close(alone.vector, d.vector, rtol=1e-3, atol=1e-5)
    assert d.method == method and d.n == len(PAIRS) and d.data == Contrast.of(PAIRS).hash
    read = read_contrast(model, Contrast.of(PAIRS), SITE)[SITE]
    assert float(d.score(read.positive).mean()) > float(d.score(read.negative).mean())
    again = Lens.load(d.save(tmp_path / "d"), model)
    assert isinstance(again, Direction) and torch.equal(again.vector, d.vector)
    edit = d.steer(0.0)
    plain = model.logits("a film")
    with model.edit(edit):
        torch.testing.assert_close(model.logits("a film"), plain, rtol=0, atol=0)
    with model.edit(d.steer(0.5)):
        assert not torch.allclose(model.logits("a film"), plain)


def test_texts_with_labels_and_with_numbers() -> None:
    model = tiny()
    texts = [t for pair in PAIRS for t in pair]
    labels = [1, 0] * len(PAIRS)
    from_pairs = fit_direction(model, PAIRS, SITE)
    from_labels = fit_direction(model, list(zip(texts, labels, strict=True)), SITE)
    torch.testing.assert_close(from_labels.vector, from_pairs.vector, rtol=1e-4, atol=1e-5)
    records = [{"text": t, "label": bool(y)} for t, y in zip(texts, labels, strict=True)]
    torch.testing.assert_close(fit_direction(model, records, SITE).vector, from_labels.vector)
    y = [float(len(t)) for t in texts]
    weighted = fit_direction(model, texts, SITE, method="cov", y=y)
    trace = torch.stack([model.trace(t, SITE).last(SITE)[0] for t in texts]).double()
    numbers = torch.tensor(y, dtype=torch.float64)
    brute = ((trace - trace.mean(0)) * numbers.unsqueeze(1)).sum(0) / numbers.sum()
    torch.testing.assert_close(weighted.vector.double(), brute, rtol=1e-3, atol=1e-5)
    assert weighted.n == len(texts)
    lengths = Contrast(*zip(*PAIRS, strict=True), y=tuple(y[::2]))
    by_pair = fit_direction(model, lengths, SITE, method="cov")
    difference = trace[::2] - trace[1::2]
    number = numbers[::2]
    brute = ((difference - difference.mean(0)) * number.unsqueeze(1)).sum(0) / number.sum()
    torch.testing.assert_close(by_pair.vector.double(), brute, rtol=1e-3, atol=1e-5)


def test_a_site_with_heads() -> None:
    model = tiny()
    d = fit_direction(model, PAIRS, "blocks.1.attn.z")
    assert d.heads == 4 and d.vector.shape == (32,)
    edit = d.steer(0.2)
    assert isinstance(edit, Add) and tuple(edit.vector.shape) == (4, 8)
    with model.edit(edit):
        model.logits("a film")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (PAIRS, {"method": "mean_dif"}, "no direction fit 'mean_dif'; did you mean mean_diff"),
        (PAIRS, {"center": True, "method": "pca_diff"}, "no option 'center'; did you mean centre"),
        ([("good", "")], {}, "pair 0 has no negative side"),
        ([{"positive": "good"}], {}, "pair 0 has no negative side"),
        ([("good", "good")], {}, "the same text on both sides"),
        ([], {}, "at least one pair"),
        ("good", {}, "not str"),
        ([("a", 1), ("b", 1)], {}, "every label is 1"),
        ([("a", 0.3), ("b", 1.7)], {}, "needs labels 0 and 1"),
        ([("a", 0), ("b", 1)], {"method": "pca_diff"}, "needs pairs of texts"),
        (["a", "b"], {}, "a number each in y; there are none"),
        (["a", "b"], {"y": [1.0]}, "a number each in y; there are 1"),
        ([("a", 0), ("b", 1)], {"y": [1.0, 2.0]}, "given twice"),
        (PAIRS, {"y": [1.0]}, "needs 6 values of y"),
        (PAIRS[:1], {"method": "pca_diff", "centre": True}, "do not vary"),
        ([("good film", "bad film")] * 4, {"position": 40}, "position 40 does not exist"),
        ([("go now", "no now")], {"position": "middle"}, "position is 'middle'"),
    ],
)
def test_unfit_data_gives_one_line(data: object, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        fit_direction(tiny(), data, SITE, **options)
    assert "\n" not in str(error.value)


def test_unfit_sites_and_sides() -> None:
    model = tiny()
    with pytest.raises(SiteError, match="did you mean"):
        fit_direction(model, PAIRS, "blocks.1.resid_pots")
    with pytest.raises(InputError, match="names 3; give one"):
        fit_direction(model, PAIRS, "blocks.*.resid_post")
    same = readings(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(InputError, match=r"blocks.1.resid_post: the direction has length 0"):
        fit_readings(same)
    with pytest.raises(NonFiniteError):
        Contrast(("a",), ("b",), y=(float("nan"),))
