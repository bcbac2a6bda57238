"""The contexts in which a feature is largest, against a brute force over all rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import FingerprintError, InputError, ShapeError, SiteError
from actlas.core.lens import Lens
from actlas.core.pca import PCA
from actlas.store import Store, contexts
from tests.core.tiny import tiny

from .made import OTHER, SITE, small


@dataclass(kw_only=True, eq=False)
class ThreeLargest(Lens):
    """Keeps the three largest projections."""

    basis: Tensor

    @property
    def channels(self) -> int:
        return self.basis.shape[1]

    @property
    def features(self) -> int:
        return len(self.basis)

    def encode(self, x: Tensor) -> Codes:  # type: ignore[override]
        return Codes.from_dense((x @ self.basis.T).relu(), k=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small(tmp_path_factory.mktemp("stores") / "acts")


@pytest.fixture
def lens() -> ThreeLargest:
    generator = torch.Generator().manual_seed(0)
    return ThreeLargest(site=SITE, basis=torch.randn(10, 32, generator=generator))


def brute(store: Store, lens: ThreeLargest, feature: int, n: int, width: int) -> list[tuple[int, float]]:
    values = lens.encode(store.read(SITE, range(store.rows))).dense()[:, feature]
    table = store.tokens.to_pydict()
    taken: list[tuple[int, float]] = []
    covered: set[int] = set()
    for row in values.argsort(descending=True, stable=True).tolist():
        if values[row] <= 0 or len(taken) == n:
            break
        span = [
            r
            for r in range(max(row - width, 0), min(row + width + 1, store.rows))
            if table["document"][r] == table["document"][row]
        ]
        if covered.isdisjoint(span):
            covered.update(span)
            taken.append((row, float(values[row])))
    return taken


def test_top_is_the_largest_places_that_do_not_overlap(
    store: Store, lens: ThreeLargest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "_BLOCK", 64)
    for feature in range(4):
        found = store.top(lens, feature, n=5, context=2)
        wanted = brute(store, lens, feature, 5, 2)
        assert [c.row for c in found] == [row for row, _ in wanted] and len(found) >= 3
        assert [c.value for c in found] == pytest.approx([value for _, value in wanted], rel=1e-5)
        for context in found:
            assert context.activations[context.index] == pytest.approx(context.value, rel=1e-5)
            assert len(context.activations) == len(context.pieces) <= 5
            rows = [context.row - context.index + i for i in range(len(context.pieces))]
            values = lens.encode(store.read(SITE, rows)).of(feature)
            assert list(context.activations) == pytest.approx(values.tolist(), rel=1e-5, abs=1e-6)
            assert "".join(context.pieces) in store.text(context.document)
            assert context.to_json()["value"] == context.value
    assert store.tops(lens, [2, 0], 5, context=2) == {f: store.top(lens, f, 5, context=2) for f in (2, 0)}


def test_top_under_a_condition_and_with_a_dense_lens(store: Store, lens: ThreeLargest) -> None:
    found = store.top(lens, 1, n=50, context=0, where="document = '3'")
    assert found and {c.document for c in found} == {"3"}
    pca = PCA(
        site=SITE,
        mean=torch.zeros(32),
        components=torch.eye(32)[:4],
        variance=torch.ones(4),
        total=4.0,
        count=9,
    )
    best = store.top(pca, 3, n=1)[0]
    assert best.value == pytest.approx(float(store.read(SITE, range(store.rows))[:, 3].max()), rel=1e-5)


def test_a_lens_for_something_else_is_refused(store: Store, lens: ThreeLargest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no feature 10; it has 0 to 9"):
        store.top(lens, 10)
    with pytest.raises(SiteError, match="holds no activations of 'blocks.2.resid_post'"):
        store.top(ThreeLargest(site="blocks.2.resid_post", basis=lens.basis), 0)
    with pytest.raises(ShapeError, match="reads 16 channels"):
        store.top(ThreeLargest(site=OTHER, basis=torch.ones(2, 16)), 0)
    with pytest.raises(FingerprintError, match="another model"):
        store.top(ThreeLargest(site=SITE, basis=lens.basis, fingerprint=tiny("gpt2").fingerprint), 0)
    with pytest.raises(InputError, match="n must be at least 1"):
        store.top(lens, 0, n=0)
