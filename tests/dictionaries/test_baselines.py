"""PCA, k-means, NMF and random atoms as dictionaries, against brute force and scikit-learn's own answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens
from actlas.core.model import Model
from actlas.core.pca import fit_pca
from actlas.dictionaries.baselines import (
    KMeansDictionary,
    NMFDictionary,
    fit_kmeans,
    fit_nmf,
    fit_random_dictionary,
    halves,
    pca_dictionary,
)

from .brute import recovery
from .conftest import sparse_rows

SITE = "blocks.1.resid_post"


def unexplained(lens: object) -> float:
    return next(m.value for m in lens.measurements if m.name == "fraction of variance unexplained")  # type: ignore[attr-defined]


def test_kmeans_finds_clusters_and_picks_the_nearest() -> None:
    g = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(6, 8, generator=g)
    rows = centres[torch.randint(0, 6, (3000,), generator=g)] + 0.1 * torch.randn(3000, 8, generator=g)
    lens = fit_kmeans(None, rows, "s", width=6)
    assert float(torch.cdist(centres, lens.centroids).min(1).values.max()) < 0.1
    codes = lens.encode(rows[:40])
    assert torch.equal(codes.indices.squeeze(1), torch.cdist(rows[:40], lens.centroids).argmin(1))
    assert torch.equal(codes.values, torch.ones(40, 1)) and unexplained(lens) < 0.01
    torch.testing.assert_close(lens.reconstruct(rows[:40]), lens.centroids[codes.indices.squeeze(1)])


def test_nmf_codes_are_the_non_negative_least_squares_solution() -> None:
    from scipy.optimize import nnls

    g = torch.Generator().manual_seed(0)
    lens = NMFDictionary(site="s", parts=torch.rand(5, 12, generator=g), iterations=20_000)
    x = torch.randn(6, 6, generator=g)
    z = lens.encode(x).dense()
    for row, found in zip(halves(x), z, strict=True):
        expected, _ = nnls(lens.parts.T.double().numpy(), row.double().numpy())
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=2e-3, rtol=0)
    positive, negative = lens.parts.split(6, dim=1)
    torch.testing.assert_close(lens.reconstruct(x), z @ positive - z @ negative)


def test_nmf_finds_signed_parts() -> None:
    g = torch.Generator().manual_seed(0)
    truth = torch.zeros(4, 12)
    for i in range(4):  # disjoint parts of both signs
        truth[i, 3 * i : 3 * i + 3] = torch.tensor([1.0, -1.0, 0.5])
    z = (torch.rand(2000, 4, generator=g) < 0.5) * torch.rand(2000, 4, generator=g) + 1e-3
    lens = fit_nmf(None, z @ truth, "s", width=4, iterations=100)
    assert recovery(truth, lens.atoms) > 0.98 and unexplained(lens) < 0.05


def test_pca_dictionary_is_the_pca() -> None:
    rows, _ = sparse_rows(500, 12, 20, 3)
    pca = fit_pca(None, rows, "s")
    lens = pca_dictionary(pca, 4)
    expected = pca.mean + (rows - pca.mean) @ pca.components[:4].T @ pca.components[:4]
    torch.testing.assert_close(lens.reconstruct(rows), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lens.encode(rows).dense(), pca.encode(rows)[:, :4], atol=1e-5, rtol=1e-4)
    assert pca_dictionary(pca).features == 12


def test_random_dictionaries_by_brute_force() -> None:
    rows, _ = sparse_rows(400, 12, 20, 3)
    lens = fit_random_dictionary(None, rows, "s", width=30, k=4)
    again = fit_random_dictionary(None, rows, "s", width=30, k=4)
    assert torch.equal(lens.atoms, again.atoms) and lens.atoms.shape == (30, 12)
    assert not torch.equal(fit_random_dictionary(None, rows, "s", width=30, k=4, seed=1).atoms, lens.atoms)
    for x in rows[:5]:
        r = x - lens.offset
        for _ in range(4):
            products = lens.atoms @ r
            j = int(products.abs().argmax())
            r = r - products[j] * lens.atoms[j]
        torch.testing.assert_close(lens.reconstruct(x[None])[0], x - r, atol=1e-5, rtol=1e-4)
    directions = fit_random_dictionary(None, rows, "s", width=30, k=4, kind="directions")
    assert unexplained(lens) < unexplained(directions)


@pytest.mark.parametrize("name", ["kmeans", "nmf", "random"])
def test_fitted_on_a_model_saved_and_substituted(
    name: str, toy: Model, text: list[str], tmp_path: Path
) -> None:
    fit = {"kmeans": fit_kmeans, "nmf": fit_nmf, "random": fit_random_dictionary}[name]
    lens = fit(toy, text, SITE, width=16, **({"k": 3} if name == "random" else {}))
    lens.save(tmp_path / "lens", toy)
    again = Lens.load(tmp_path / "lens", toy)
    x = toy.trace(text[0], SITE)[SITE]
    with toy.edit(again.substitute()):
        after = toy.trace(text[0], SITE)[SITE]
    torch.testing.assert_close(after, torch.where(lens.massive(x)[..., None], x, lens.reconstruct(x)))
    assert lens.measurements and lens.fingerprint == toy.fingerprint


def test_bad_input() -> None:
    rows = torch.randn(50, 4)
    for fit in (fit_kmeans, fit_nmf):
        with pytest.raises(InputError, match=r"width is 60, but there are 45 rows"):
            fit(None, rows, "s", width=60)
    with pytest.raises(InputError, match="kind is 'magic'"):
        fit_random_dictionary(None, rows, "s", kind="magic")
    with pytest.raises(InputError, match="k is 9; it must be between 1 and the width, 8"):
        fit_random_dictionary(None, rows, "s", width=8, k=9)
    with pytest.raises(InputError, match="needs the model"):
        fit_kmeans(None, ["some text"], "s")
    with pytest.raises(InputError, match="k is 5; it must be between 1 and the 4 components"):
        pca_dictionary(fit_pca(None, rows, "s"), 5)
    with pytest.raises(InputError, match="never negative"):
        NMFDictionary(site="s", parts=-torch.rand(3, 8))
    with pytest.raises(ShapeError, match=r"parts \[m, 2 d\], not \[3, 7\]"):
        NMFDictionary(site="s", parts=torch.rand(3, 7))
    with pytest.raises(ShapeError, match=r"centroids \[m, d\]"):
        KMeansDictionary(site="s", centroids=torch.zeros(0, 4))
