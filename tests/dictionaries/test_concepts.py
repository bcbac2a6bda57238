"""Concepts: planted features get their names, the judgement is that of brute force, ablations are exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import ArtifactError, InputError
from actlas.dictionaries.concepts import ConceptDictionary, concepts
from actlas.dictionaries.feature_ablation import ablation_effect

N = 600
GENRES = ("jazz", "blues", "rock", "folk", "opera", "tango")


@dataclass(kw_only=True, eq=False)
class PlainConceptDictionary(Dictionary):
    """z = ReLU(x W^T), atoms W."""

    W: Tensor

    @property
    def channels(self) -> int:
        return self.W.shape[1]

    @property
    def features(self) -> int:
        return self.W.shape[0]

    @property
    def atoms(self) -> Tensor:
        return self.W

    def encode_rows(self, x: Tensor) -> Codes:
        return Codes.from_dense((x @ self.W.T).relu())


def planted(seed=0):
    """Feature 0: jazz; 1: blues or rock; 2: noise; 3: country 'no'; 4: nearly always on; 5: never; rest noise."""
    g = np.random.default_rng(seed)
    genre = g.choice(GENRES, N)
    country = g.choice(["no", "it", None], N)
    z = np.zeros((N, 9))
    z[:, 0] = genre == "jazz"
    z[:, 1] = np.isin(genre, ["blues", "rock"]) ^ (g.random(N) < 0.03)
    z[:, 2] = g.random(N) < 0.2
    z[:, 3] = 2.0 * (country == "no")
    z[:, 4] = g.random(N) < 0.97
    z[:, 6:] = g.random((N, 3)) < 0.1
    return torch.tensor(z), {"genre": list(genre), "country": list(country)}


def test_planted_concepts_are_named_and_judged():
    z, metadata = planted()
    book = concepts(z, metadata)
    found = {c.feature: c for c in book.concepts}
    assert (found[0].attribute, found[0].values, found[0].confidence) == ("genre", ("jazz",), 1.0)
    assert found[1].attribute == "genre" and set(found[1].values) == {"blues", "rock"}
    assert 0.85 < found[1].confidence < 1 and found[1].precision_interval[0] < found[1].precision
    assert (found[3].attribute, found[3].values) == ("country", ("no",)) and found[3].confidence == 1.0
    assert all(found[j].confidence < 0.6 for j in (2, 6, 7, 8))
    assert 5 not in found and book.live == 8 and book.features == 9
    assert found[4].share <= 0.6 and found[4].confidence < 0.8  # "nearly everything" is no name
    assert {c.feature for c in book.named()} == {0, 1, 3}
    assert [c.feature for c in book.of("genre", "rock")][:1] != [0]
    assert book[0].name == "genre: jazz" and "precision 1.00" in str(book[0])
    with pytest.raises(InputError, match="feature 5 has no concept"):
        book[5]
    measured = book.measurements[0]
    assert measured.value == pytest.approx(3 / 8) and measured.baseline.value == 0.0 and measured.low > 0


def test_precision_and_recall_are_of_the_rows_that_did_not_name():
    z, metadata = planted(1)
    book = concepts(z, metadata, seed=3)
    from actlas.dictionaries.concepts import _split

    judging = _split(None, N, 0.5, 3)
    assert judging.sum() == N // 2
    for concept in book.concepts:
        holds = np.isin(np.array(metadata[concept.attribute], dtype=object), concept.values)
        fires = (z[:, concept.feature] > 0).numpy()
        for rows, f1 in ((judging, concept.confidence), (~judging, concept.named_f1)):
            hits = int((holds & fires)[rows].sum())
            assert f1 == pytest.approx(2 * hits / (holds[rows].sum() + fires[rows].sum()))
        assert concept.precision == pytest.approx((holds & fires)[judging].sum() / fires[judging].sum())
        assert concept.recall == pytest.approx((holds & fires)[judging].sum() / holds[judging].sum())
        assert concept.firings == fires[judging].sum()
        assert concept.share == pytest.approx(holds[judging].mean())


def test_single_values_only_and_whole_groups():
    z, metadata = planted()
    book = concepts(z, metadata, most=1)
    assert all(len(c.values) == 1 for c in book.concepts)
    assert 1 not in {c.feature for c in book.named()}
    users = np.repeat(np.arange(N // 4), 4)
    from actlas.dictionaries.concepts import _split

    judging = _split(users, N, 0.3, 0)
    assert all(len(set(judging[users == u])) == 1 for u in range(5))
    assert concepts(z, metadata, groups=users).named()


def test_lens_codes_and_dense_codes_agree():
    g = torch.Generator().manual_seed(0)
    lens = PlainConceptDictionary(site="module:x", W=torch.randn(5, 4, generator=g))
    x = torch.randn(N, 4, generator=g)
    metadata = {"first": ["up" if v > 0 else "down" for v in x[:, 0]]}
    a, b, c = (
        concepts(lens, metadata, rows=x),
        concepts(lens.encode(x), metadata),
        concepts(lens.encode(x).dense(), metadata),
    )
    assert a.concepts == b.concepts == c.concepts and len(a) == 5


def test_a_namer_of_ones_own_is_judged_in_the_same_way():
    z, metadata = planted()
    seen = []

    def namer(feature, values, labels):
        seen.append((feature, len(values), len(labels["genre"])))
        return None if feature == 3 else ("genre", ["jazz"])

    book = concepts(z, metadata, namer=namer)
    assert len(seen) == 8 and {s[1:] for s in seen} == {(N // 2, N // 2)}
    assert {c.feature for c in book.named()} == {0} and 3 not in {c.feature for c in book.concepts}
    with pytest.raises(InputError, match="the namer says 'genra' of feature 0.*did you mean genre"):
        concepts(z, metadata, namer=lambda *a: ("genra", ["jazz"]))


def test_save_and_load(tmp_path):
    z, metadata = planted()
    book = concepts(z, metadata)
    book.save(tmp_path / "book")
    again = ConceptDictionary.load(tmp_path / "book")
    assert again == book and again.measurements[0].value == book.measurements[0].value
    PlainConceptDictionary(site="module:x", W=torch.eye(2))
    (tmp_path / "book" / "manifest.json").write_text('{"kind": "concepts", "format": 1, "files": {}}')
    with pytest.raises(ArtifactError, match="incomplete concept dictionary"):
        ConceptDictionary.load(tmp_path / "book")


def test_bad_input():
    z, metadata = planted()
    lens = PlainConceptDictionary(site="module:x", W=torch.eye(2))
    for call, message in (
        (lambda: concepts(z, {}), "no metadata was given"),
        (lambda: concepts(z, {"genre": ["jazz"]}), "'genre' has 1 values for 600 rows"),
        (lambda: concepts(lens, metadata), "give rows="),
        (lambda: concepts(z, metadata, rows=z), "codes were given already"),
        (lambda: concepts(z, metadata, namer="llm"), "must be 'attribute' or a function"),
        (lambda: concepts(z, metadata, groups=[0] * N), "leaves none to name"),
        (lambda: concepts(z, metadata, groups=[0]), "600 rows but 1 groups"),
        (lambda: concepts(z, {"genre": [None] * N}), "no attribute has a known value"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# -- ablation ---------------------------------------------------------------------------------------


def test_ablation_takes_out_exactly_the_features_part():
    g = torch.Generator().manual_seed(0)
    lens = PlainConceptDictionary(site="module:x", W=torch.randn(6, 5, generator=g))
    x = torch.randn(200, 5, generator=g)
    read = torch.randn(5, generator=g)
    found = ablation_effect(lens, x, 2, lambda rows: rows @ read, controls=3, exclude=[4])
    part = (x @ lens.W[2]).relu() * (lens.W[2] @ read)
    assert found.effect.value == pytest.approx(float(part.mean()), rel=1e-4)
    mean = (x @ lens.W.T).relu().mean(0)
    nearest = sorted((j for j in range(6) if j not in (2, 4)), key=lambda j: abs(float(mean[j] - mean[2])))[
        :3
    ]
    assert list(found.controls) == nearest
    control = torch.stack([(x @ lens.W[j]).relu() * (lens.W[j] @ read) for j in nearest]).mean()
    assert found.control.value == pytest.approx(float(control), rel=1e-4, abs=1e-6)
    assert found.difference.value == pytest.approx(found.effect.value - found.control.value, abs=1e-6)
    assert found.difference.low < found.difference.value < found.difference.high
    assert found.effect.baseline == found.control
    edited = x + (lens.edit({2: 0.0}).rows(x, lens.encode(x)) - x)  # the same as the edit does in a model
    direct = ablation_effect(lens, x, 2, lambda rows: (rows - edited).norm(dim=1), controls=1)
    part = (x @ lens.W[2]).relu() * lens.W[2].norm()
    assert direct.effect.value == pytest.approx(float(part.mean()), rel=1e-4)


def test_ablation_refuses_what_it_cannot_compare():
    lens = PlainConceptDictionary(site="module:x", W=torch.eye(3))
    x = torch.tensor([[1.0, -1.0, -1.0]] * 4)
    with pytest.raises(InputError, match="no other feature fires"):
        ablation_effect(lens, x, 0, lambda rows: rows.sum(1))
    with pytest.raises(InputError, match="no feature 3"):
        ablation_effect(lens, x.abs(), 3, lambda rows: rows.sum(1))
    with pytest.raises(InputError, match="one number a row"):
        ablation_effect(lens, x.abs(), 0, lambda rows: rows)
