"""ITDA: Algorithm 1 against a float64 brute force, planted data, labels, and what is refused."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.data.documents import Corpus, Document
from actlas.dictionaries.itda import ITDA, fit_itda
from actlas.dictionaries.itda_growth import Growing
from actlas.dictionaries.itda_quality import FVU, GAP, RandomRows
from actlas.dictionaries.labelled_rows import BEFORE, labelled_rows
from actlas.measure.similarity import jaccard
from tests.dictionaries.conftest import sparse_rows

SITE = "blocks.1.resid_post"


def pursuit(x: np.ndarray, atoms: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Matching pursuit of one row, with the residual written out."""
    r, codes = x.copy(), np.zeros(len(atoms))
    for _ in range(k):
        scores = atoms @ r
        j = int(np.abs(scores).argmax())
        codes[j] += scores[j]
        r -= scores[j] * atoms[j]
    return codes, x - r


def brute(x: Tensor, k: int, tau: float, batch: int, most: int = 10**9) -> list[int]:
    """Algorithm 1 with the first d distinct rows as seeds; returns which rows became atoms."""
    rows = x.double().numpy()
    d = rows.shape[1]
    picked: list[int] = []
    for start in range(0, len(rows), batch):
        part = range(start, min(start + batch, len(rows)))
        if len(picked) < d:
            picked += list(part)[: d - len(picked)]
        atoms = rows[picked] / np.linalg.norm(rows[picked], axis=1, keepdims=True)
        for i in part:
            rebuilt = pursuit(rows[i], atoms, min(k, len(atoms)))[1]
            unit = rows[i] / np.linalg.norm(rows[i]) - rebuilt / np.linalg.norm(rebuilt)
            if (unit**2).mean() > tau and len(picked) < most:
                picked.append(i)
    return picked


@pytest.mark.parametrize("batch", [7, 32, 1000])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_walk_is_algorithm_1(k: int, batch: int) -> None:
    x = torch.randn(160, 8, generator=torch.Generator().manual_seed(k))
    tau = 0.02
    lens = fit_itda(
        None,
        x,
        SITE,
        k=k,
        tau=tau,
        seed_atoms="first",
        batch=batch,
        tokens=None,
        held_out=0,
        duplicate_cos=None,
    )
    assert lens.labels[:, 1].tolist() == brute(x, k, tau, batch)
    torch.testing.assert_close(lens.atoms, torch.nn.functional.normalize(x[lens.labels[:, 1]], dim=1))
    assert lens.seeded == 8 and lens.features > 8 and lens.rows == 160


def test_codes_are_those_of_matching_pursuit_and_scale_with_the_row() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    lens = fit_itda(None, x, SITE, k=4, cos_min=0.9, tokens=None, held_out=0)
    y = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    codes = lens.encode(y)
    for row, dense in zip(y.double().numpy(), codes.dense().double().numpy(), strict=True):
        np.testing.assert_allclose(dense, pursuit(row, lens.atoms.double().numpy(), 4)[0], atol=1e-5)
    torch.testing.assert_close(lens.encode(8 * y).dense(), 8 * codes.dense())
    assert bool((codes.values < 0).any())


def test_orthogonal_pursuit_projects_on_the_atoms_it_took() -> None:
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    lens = fit_itda(None, x, SITE, k=3, cos_min=0.9, tokens=None, held_out=0, pursuit="orthogonal")
    plain = fit_itda(None, x, SITE, k=3, cos_min=0.9, tokens=None, held_out=0)
    assert lens.pursuit == "orthogonal" and lens.features <= plain.features
    y = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    codes = lens.encode(y)
    for row, indices, rebuilt in zip(y, codes.indices, lens.decode(codes), strict=True):
        atoms = lens.atoms[indices]
        torch.testing.assert_close(atoms @ (row - rebuilt), torch.zeros(3), atol=1e-4, rtol=0)


def test_tau_and_cos_min_are_one_threshold() -> None:
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(3))
    one = fit_itda(None, x, SITE, k=3, cos_min=0.8, tokens=None, held_out=0)
    other = fit_itda(None, x, SITE, k=3, tau=2 * (1 - 0.8) / 10, tokens=None, held_out=0)
    assert torch.equal(one.labels, other.labels) and math.isclose(one.cos_min, other.cos_min)
    assert math.isclose(one.tau, 0.04) and (one.max_atoms, one.seed_atoms) == (8192, "frequent")
    with pytest.warns(UserWarning, match="2/d = 0.2"):
        none = fit_itda(None, x, SITE, k=3, tau=0.2, tokens=None, held_out=0)
    assert none.features == none.seeded == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_itda(None, x, SITE, k=3, tau=0.1, tokens=None, held_out=0)


def test_planted_atoms_are_found_and_rebuild_everything() -> None:
    rows, directions = sparse_rows(1500, 24, features=12, active=1)
    lens = fit_itda(None, rows, SITE, k=1, cos_min=0.999, seed_atoms=None, tokens=None)
    assert lens.features == 12
    cosine = (lens.atoms @ directions.T).abs().max(0).values
    assert bool((cosine > 0.9999).all())
    assert lens.measurements[0].value < 1e-6
    assert lens.measurements[1].value > 0.01  # twelve rows at random miss some of the twelve directions


def test_the_most_frequent_rows_are_seeds_and_copies_are_no_atoms() -> None:
    g = torch.Generator().manual_seed(5)
    distinct = torch.randn(12, 4, generator=g)
    x = distinct[torch.tensor([0, 1, 2, 2, 3, 3, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 11, 11, 11])]
    lens = fit_itda(None, x, SITE, k=1, cos_min=0.99999, tokens=None, held_out=0)
    assert lens.labels[:4, 1].tolist() == [15, 4, 2, 8]  # where 11, 3, 2 and 5 stood first
    assert lens.features == 12
    kept = fit_itda(None, torch.cat([x, x]), SITE, k=1, cos_min=0.99999, tokens=None, held_out=0)
    assert kept.features == 12
    loose = fit_itda(
        None, x, SITE, k=1, cos_min=0.99999, tokens=None, held_out=0, seed_atoms=None, duplicate_cos=None
    )
    assert loose.features >= 12


def test_a_frozen_dictionary_admits_copies_only_when_they_are_kept() -> None:
    x = torch.eye(3).repeat_interleave(4, 0)
    options = {"k": 1, "cos_min": 0.9, "seed_atoms": "first", "tokens": None, "held_out": 0, "batch": 100}
    more = torch.tensor([[1.0, 1, 1]]).repeat(5, 1) * torch.arange(1, 6).unsqueeze(1)
    once = fit_itda(None, torch.cat([x, more]), SITE, **options)
    every = fit_itda(None, torch.cat([x, more]), SITE, **options, duplicate_cos=None)
    assert (once.features, every.features) == (4, 8)


def test_the_gram_matrix_grows_with_the_atoms() -> None:
    x = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    grown = Growing(4, 2, 0.9999, 300, None, "matching")
    for i, part in enumerate(labelled_rows(None, x, SITE, batch=50)):
        grown.walk(part, "first")
        atoms = grown.atoms[: grown.n]
        torch.testing.assert_close(grown.gram[: grown.n, : grown.n], atoms @ atoms.T)
        assert grown.n <= 300 and (i or grown.seeded == 4)
    assert grown.n == 300 and sum(map(len, grown.kept)) == 300


def test_max_atoms_stops_the_walk() -> None:
    x = torch.randn(2000, 5, generator=torch.Generator().manual_seed(2))
    lens = fit_itda(None, x, SITE, k=1, cos_min=0.999, max_atoms=40, batch=50, tokens=None)
    assert lens.features == 40 and lens.rows < 400 and lens.measurements[0].details["tokens"] == 3 * 64
    assert "stopped at max_atoms" in lens.measurements[0].note


def test_measured_against_as_many_random_atoms() -> None:
    rows, _ = sparse_rows(2000, 16, features=40, active=2, seed=1)
    lens = fit_itda(None, rows, SITE, k=4, cos_min=0.95, tokens=None, seed=3)
    own, random, gap = lens.measurements
    assert own.name == random.name == FVU and gap.name == GAP
    assert own.group["atoms"] == "selected" and random.group["atoms"] == "random"
    assert random.note == f"control: {lens.features:,} random rows as atoms"
    assert math.isclose(gap.value, random.value - own.value, rel_tol=1e-9)
    held = torch.cat([p.x[p.held] for p in labelled_rows(None, rows, SITE, batch=2000)])
    wanted = (held - lens.reconstruct(held)).pow(2).sum() / (held - held.mean(0)).pow(2).sum()
    assert math.isclose(own.value, float(wanted), rel_tol=1e-5)
    fitted = {tuple(r.tolist()) for p in labelled_rows(None, rows, SITE, batch=2000) for r in p.x[~p.held]}
    assert {tuple(r.tolist()) for r in rows[lens.labels[:, 1]]} <= fitted
    again = fit_itda(None, rows, SITE, k=4, cos_min=0.95, tokens=None, seed=3)
    assert [m.to_json() for m in again.measurements] == [m.to_json() for m in lens.measurements]


def test_random_rows_are_a_uniform_sample() -> None:
    counts = torch.zeros(40)
    for seed in range(300):
        sample = RandomRows(5, seed)
        for part in torch.arange(40.0).unsqueeze(1).split(7):
            sample.add(part)
        taken = sample.take(5).squeeze(1).long()
        assert len(set(taken.tolist())) == 5
        counts[taken] += 1
    assert counts.min() > 15 and counts.max() < 65  # 37.5 expected


def test_a_corpus_gives_labels_that_can_be_read(toy, text, tmp_path) -> None:
    corpus = Corpus("toy", [Document(f"d{i}", t if i % 2 else t[: 30 + i]) for i, t in enumerate(text)])
    lens = fit_itda(toy, corpus, SITE, k=4, cos_min=0.8, batch=64, context=16)
    words = {d.id: toy.tokenizer(d.text)["input_ids"] for d in corpus}
    for (document, position, token), said in zip(lens.labels.tolist(), lens.texts, strict=True):
        ids = words[lens.documents[document]]
        assert ids[position] == token  # never padding, and the place is right
        start = max(position - BEFORE + 1, position - position % 16)
        ahead = toy.tokenizer.decode(ids[start:position])
        assert said == f"{ahead}«{toy.tokenizer.decode([token])}»"
    assert lens.label(0).startswith(f"{lens.documents[lens.labels[0, 0]]} @ ")
    x = toy.trace(text[:3], SITE).rows(SITE)
    assert lens.encode(x).shape == (len(x),) and lens.skip_above is not None
    lens.save(tmp_path / "itda")
    loaded = ITDA.load(tmp_path / "itda", toy)
    assert torch.equal(loaded.reconstruct(x), lens.reconstruct(x))
    assert loaded.atom_labels == lens.atom_labels and loaded.texts == lens.texts
    assert loaded.data == corpus.hash and loaded.batch == 64


def test_edits_of_a_model(toy, text) -> None:
    lens = fit_itda(toy, text, SITE, k=4, cos_min=0.8)
    plain = toy.trace(text[:2], "logits", stop=False)["logits"]
    for nothing in (lens.substitute(keep_error=True), lens.edit(3, 0.0), lens.edit({3: ("scale", 1.0)})):
        with toy.edit(nothing), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(toy.trace(text[:2], "logits", stop=False)["logits"], plain)
    before = toy.trace(text[:2], SITE)[SITE]
    with toy.edit(lens.edit(3, 5.0)):
        moved = toy.trace(text[:2], SITE)[SITE]
    torch.testing.assert_close(moved - before, (5 * lens.atoms[3]).expand_as(before), atol=1e-4, rtol=1e-4)
    with toy.edit(lens.substitute()):
        rebuilt = toy.trace(text[:2], SITE)[SITE]
    torch.testing.assert_close(rebuilt, lens.reconstruct(before), atol=1e-4, rtol=1e-4)


def test_heads_are_joined_and_steered_along_as_heads(toy, text) -> None:
    lens = fit_itda(toy, text, "blocks.1.attn.z", k=4, cos_min=0.8)
    x = toy.trace(text[:1], lens.site)[lens.site]
    assert lens.heads == x.shape[2] == 4 and lens.channels == 32
    with toy.edit(lens.edit(0, 2.0)):
        moved = toy.trace(text[:1], lens.site)[lens.site] - x
    torch.testing.assert_close(moved, (2 * lens.atoms[0]).reshape(4, 8).expand_as(x), atol=1e-5, rtol=1e-4)


def test_a_store_gives_the_rows_it_holds(toy, text, tmp_path) -> None:
    from actlas.store import harvest

    store = harvest(toy, text, SITE, tmp_path / "acts", dtype="float32", context=16, progress=False)
    lens = fit_itda(None, store, SITE, k=4, cos_min=0.8, batch=100, seed=1)
    assert lens.fingerprint == toy.fingerprint
    table = store.tokens.to_pylist()
    where = {(r["document"], r["position"]): r for r in table}
    for atom, (document, position, token) in zip(lens.atoms, lens.labels.tolist(), strict=True):
        row = where[lens.documents[document], position]
        assert row["token"] == token
        x = store.read(SITE, [row["row"]])[0]
        torch.testing.assert_close(atom, x / x.norm(), atol=1e-5, rtol=1e-4)


def test_two_dictionaries_of_one_text_share_labels(toy, text) -> None:
    one = fit_itda(toy, text, SITE, k=4, cos_min=0.8)
    other = fit_itda(toy, text, "blocks.0.resid_post", k=4, cos_min=0.8)
    assert jaccard(one, one) == 1.0 and 0 <= jaccard(one, other) < 1
    assert jaccard(one, other, exclude_seed=False) > jaccard(one, other)
    with pytest.raises(InputError, match="different texts"):
        jaccard(one, fit_itda(toy, text[::-1], SITE, k=4, cos_min=0.8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 50, "max_atoms": 10}, "max_atoms is 10"),
        ({"cos_min": 1.0}, "between 0 and 1"),
        ({"tau": 0.0}, "above 0"),
        ({"pursuit": "basis"}, "'matching' or 'orthogonal'"),
        ({"seed_atoms": "best"}, "'frequent', 'first' or None"),
        ({"batch": 0}, "at least 1 row"),
        ({"k": 30, "cos_min": 0.1}, "k is 30, but 20 rows gave"),
        ({"labels": torch.zeros(19, 2, dtype=torch.int64)}, r"labels must be whole numbers \[20, 2 or 3\]"),
    ],
)
def test_bad_options(options: dict, said: str) -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=said):
        fit_itda(None, x, SITE, **{"k": 2, "tokens": None, "held_out": 0, **options})


def test_bad_rows_are_named(toy) -> None:
    x = torch.randn(20, 4)
    labels = torch.stack([torch.full((20,), 3), torch.arange(20) + 100], 1)
    for value, kind, said in ((math.nan, NonFiniteError, "NaN or infinity"), (0.0, InputError, "all zeros")):
        bad = x.clone()
        bad[7] = value
        with pytest.raises(kind, match=f"{said} at document '3', position 107"):
            fit_itda(None, bad, SITE, k=2, labels=labels)
    with pytest.raises(InputError, match="no rows"):
        fit_itda(None, torch.zeros(0, 4), SITE)
    with pytest.raises(ShapeError, match=r"\[n, d\]"):
        fit_itda(None, torch.zeros(3, 4, 2), SITE)
    with pytest.raises(InputError, match="needs a model"):
        fit_itda(None, ["text"], SITE)
    with pytest.raises(InputError, match="names 3"):
        fit_itda(toy, ["w1 w2"], "blocks.*.resid_post")
    with pytest.raises(InputError, match="1 to 2"):
        ITDA(
            site=SITE,
            directions=torch.eye(2),
            labels=torch.zeros(2, 3).long(),
            documents=(),
            k=3,
            cos_min=0.9,
            batch=1,
        )
