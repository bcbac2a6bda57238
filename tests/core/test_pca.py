"""PCA against scikit-learn, from rows, from a calibration and from a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as Reference

from actlas.core.calibration import calibrate
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.lens import Lens
from actlas.core.pca import PCA, fit_pca
from tests.core.tiny import TEXTS, tiny

SITE = "blocks.1.resid_post"


def compare(lens: PCA, x: np.ndarray, k: int, atol: float = 1e-4) -> None:
    reference = Reference(k, svd_solver="full").fit(x)
    n = len(x)
    np.testing.assert_allclose(
        lens.variance.numpy(), reference.explained_variance_ * (n - 1) / n, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        lens.explained.numpy(), reference.explained_variance_ratio_, rtol=1e-4, atol=1e-6
    )
    sign = np.sign((lens.components.numpy() * reference.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(lens.components.numpy(), sign * reference.components_, atol=atol)
    codes = lens.encode(torch.tensor(x, dtype=torch.float32))
    scale = np.abs(x).max()
    np.testing.assert_allclose(codes.numpy(), reference.transform(x) * sign.T, atol=atol * scale)
    restored = reference.inverse_transform(reference.transform(x))
    np.testing.assert_allclose(lens.decode(codes).numpy(), restored, atol=atol * scale)


def test_rows_give_what_scikit_learn_gives() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 10)) * np.arange(1, 11) + generator.normal(size=10) * 5
    compare(fit_pca(None, torch.tensor(x), SITE, components=4), x, 4)
    whole = fit_pca(None, torch.tensor(x), SITE)
    assert whole.features == 10 and float(whole.explained.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(
        whole.decode(whole.encode(torch.tensor(x).float())), torch.tensor(x).float(), rtol=1e-4, atol=1e-3
    )


def test_a_corpus_and_a_calibration_give_the_same(tmp_path: Path) -> None:
    model = tiny()
    x = torch.cat([t.rows(SITE) for t in model.stream(TEXTS, SITE)]).double().numpy()
    lens = fit_pca(model, TEXTS, SITE, components=5)
    compare(lens, x, 5, atol=2e-3)
    calibration = calibrate(model, TEXTS, SITE, ("moments", "hessian"))
    again = fit_pca(None, calibration, SITE, components=5)
    assert torch.equal(lens.components, again.components) and again.fingerprint == model.fingerprint
    lens.save(tmp_path / "p")
    loaded = Lens.load(tmp_path / "p", model)
    assert isinstance(loaded, PCA) and torch.equal(loaded.variance, lens.variance)
    assert lens.measurements[0].value == pytest.approx(float(lens.explained.sum()), abs=1e-5)


def test_substituting_all_components_changes_nothing_much_and_few_change_the_rest() -> None:
    model = tiny()
    plain = model.logits("hello there")
    with model.edit(fit_pca(model, TEXTS, SITE).substitute()):
        torch.testing.assert_close(model.logits("hello there"), plain, rtol=1e-3, atol=1e-3)
    few = fit_pca(model, TEXTS, SITE, components=2)
    with model.edit(few.substitute()):
        assert not torch.allclose(model.logits("hello there"), plain, atol=1e-2)
        x = model.trace("hello there", SITE)[SITE][0] - few.mean
    assert torch.linalg.matrix_rank(x, rtol=1e-4) == 2


def test_heads_are_flattened() -> None:
    model = tiny()
    lens = fit_pca(model, TEXTS, "blocks.1.attn.z", components=3)
    assert lens.heads == 4 and lens.channels == 32
    with model.edit(lens.substitute() + lens.edit(0, 2.0)):
        model.logits("hello")


def test_bad_input_is_named() -> None:
    x = torch.randn(20, 6)
    with pytest.raises(InputError, match="components is 7"):
        fit_pca(None, x, SITE, components=7)
    with pytest.raises(InputError, match="at least 2 rows"):
        fit_pca(None, x[:1], SITE)
    with pytest.raises(ShapeError):
        fit_pca(None, x[0], SITE)
    with pytest.raises(NonFiniteError):
        fit_pca(None, x / 0, SITE)
    with pytest.raises(InputError, match="needs a model"):
        fit_pca(None, TEXTS, SITE)
    model = tiny()
    with pytest.raises(InputError, match="one site"):
        fit_pca(model, TEXTS, "blocks.*.resid_post")
    with pytest.raises(InputError, match="was not collected"):
        fit_pca(model, calibrate(model, TEXTS, SITE, "moments"), SITE)
    assert fit_pca(None, x[:4], SITE).features == 3
