"""The core metrics against their definitions, substitution against whole forward passes, controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.edits import Zero
from actlas.core.errors import FingerprintError, InputError, ShapeError
from actlas.dictionaries.dark_matter import error_decomposition
from actlas.dictionaries.evaluation import (
    PARTS,
    Offset,
    Sample,
    UnitDirections,
    control_dictionaries,
    dictionary_similarity,
    evaluate,
    max_cosine,
    one_to_one,
    read_sample,
)
from actlas.dictionaries.evaluation.reconstruction import reconstruction_measurements
from actlas.dictionaries.evaluation.substitution import substitution_measurements, variant_losses
from actlas.measure.likelihood import nll
from tests.core.tiny import tiny
from tests.measure.letter_models import TEXTS, trained

SITE = "blocks.1.resid_post"


def unit(m: int, d: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(m, d, generator=g), dim=1)


def lens_of(m: int = 24, d: int = 16, k: int = 3, site: str = SITE, seed: int = 0, **more) -> UnitDirections:
    return UnitDirections(site=site, directions=unit(m, d, seed), centre=torch.full((d,), 0.1), k=k, **more)


def sample(n: int = 200, d: int = 16, documents: int = 8) -> Sample:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(2)) + 1
    return Sample(x, np.arange(n) * documents // n, torch.zeros(n).long(), torch.arange(n))


def values(found, **group):
    return {m.name: m for m in found if all(m.group.get(k) == v for k, v in group.items())}


def test_core_metrics_are_their_definitions():
    lens, s = lens_of(), sample()
    found = values(reconstruction_measurements(lens, s, seed=1))
    x, out, z = s.x.double(), lens.reconstruct(s.x).double(), lens.encode(s.x).dense().double()
    error, spread = (x - out).square().sum(1), (x - x.mean(0)).square().sum(1)
    density = (z != 0).double().mean(0)
    cosine = F.normalize(lens.atoms, dim=1) @ F.normalize(lens.atoms, dim=1).T - 3 * torch.eye(24)
    expected = {
        "l0": (z != 0).sum(1).double().mean(),
        "l1": z.abs().sum(1).mean(),
        "fvu": error.sum() / spread.sum(),
        "explained_variance": 1 - error.sum() / spread.sum(),
        "mse": error.mean(),
        "normalized_mse": (error / x.square().sum(1)).mean(),
        "cossim": F.cosine_similarity(x, out).mean(),
        "l2_ratio": (out.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": out.square().sum(1).mean() / (x * out).sum(1).mean(),
        "frac_alive": (density > 0).double().mean(),
        "dead_fraction": (density == 0).double().mean(),
        "freq_over_1_percent": (density > 0.01).double().mean(),
        "freq_over_10_percent": (density > 0.1).double().mean(),
        "normalized_freq_over_1_percent": density[density > 0.01].sum() / density.sum(),
        "normalized_freq_over_10_percent": density[density > 0.1].sum() / density.sum(),
        "average_max_decoder_cosine_sim": cosine.max(1).values.mean(),
    }
    assert set(expected) | {"feature_density"} == set(found)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(float(value), abs=1e-5), name
    for name in ("l1", "explained_variance", "cossim", "freq_over_10_percent"):
        m = found[name]
        assert m.low < m.value < m.high and m.n == 8 and m.seed == 1, name
    for m in found.values():
        assert m.low is None or m.low - 1e-12 <= m.value <= m.high + 1e-12, m.name
    histogram = found["feature_density"].details
    assert sum(histogram["features"]) + histogram["silent"] == 24
    assert found["feature_density"].value == pytest.approx(float(np.median(density[density > 0].numpy())))


def test_a_silent_dictionary_is_all_dead():
    found = values(reconstruction_measurements(Offset(site=SITE, centre=sample().x.mean(0)), sample()))
    assert found["dead_fraction"].value == 1 and found["l0"].value == 0
    assert found["explained_variance"].value == pytest.approx(0, abs=1e-6)


def test_variants_are_scored_as_by_whole_forward_passes():
    model = trained()
    edits = {"zero": Zero(SITE), "some": lens_of().substitute()}
    found = variant_losses(model, TEXTS, SITE, edits, tokens=150, context=32)
    base = nll(model, TEXTS, tokens=150, context=32)
    np.testing.assert_allclose(found.nll["original"], base.nll, rtol=1e-6)
    np.testing.assert_array_equal(found.tokens, base.tokens)
    for name, edit in edits.items():
        with model.edit(edit):
            whole = nll(model, TEXTS, tokens=150, context=32, against_base=True)
        np.testing.assert_allclose(found.nll[name], whole.nll, rtol=1e-5)
        np.testing.assert_allclose(found.divergence[name], whole.divergence, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="rename it"):
        variant_losses(model, TEXTS, SITE, {"original": Zero(SITE)}, tokens=100)


def test_a_site_inside_a_block_is_scored_too():
    model = trained()
    edit = Zero("blocks.1.attn.z")
    found = variant_losses(model, TEXTS, "blocks.1.attn.z", {"zero": edit}, tokens=100, context=32)
    with model.edit(edit):
        whole = nll(model, TEXTS, tokens=100, context=32)
    np.testing.assert_allclose(found.nll["zero"], whole.nll, rtol=1e-5)


def test_a_perfect_dictionary_recovers_all_and_the_mean_recovers_nothing():
    model = trained()
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    perfect = UnitDirections(site=SITE, directions=basis, centre=torch.zeros(16), k=16)
    mean = Offset(site=SITE, centre=torch.zeros(16)).substitute()
    variants = {
        "perfect": perfect.substitute(),
        "mean": mean,
        "zero ablation": Zero(SITE),
        "mean ablation": mean,
    }
    losses = variant_losses(model, TEXTS, SITE, variants, tokens=150, context=32)
    for ablation in ("zero", "mean"):
        best = values(substitution_measurements(losses, "perfect"), ablation=ablation)
        assert best["ce_loss_score"].value == pytest.approx(1, abs=1e-3)
        assert best["kl_div_score"].value == pytest.approx(1, abs=1e-3)
    none = values(substitution_measurements(losses, "mean"), ablation="mean")
    assert none["ce_loss_score"].value == 0 and none["kl_div_score"].value == 0
    assert (
        none["ce_loss_with_ablation"].value
        > values(substitution_measurements(losses, "mean"))["ce_loss_without_sae"].value
    )


def test_controls_have_equal_size_and_k_and_come_from_the_rows():
    lens, rows = lens_of(m=40, skip_above=50.0), sample().x
    made = control_dictionaries(lens, rows, 2.6, seed=4)
    assert list(made) == ["random atoms", "random directions"]
    for one in made.values():
        assert (one.features, one.k, one.skip_above, one.site) == (40, 3, 50.0, SITE)
        assert int(one.encode(rows).l0.max()) <= 3
        torch.testing.assert_close(one.atoms.norm(dim=1), torch.ones(40))
    centred = F.normalize(rows - rows.mean(0), dim=1)
    assert (max_cosine(made["random atoms"].atoms, centred).values > 1 - 1e-5).all()
    assert (max_cosine(made["random directions"].atoms, centred).values < 0.99).all()
    again = control_dictionaries(lens, rows, 2.6, seed=4)["random atoms"]
    assert torch.equal(again.atoms, made["random atoms"].atoms)


def test_evaluate_shows_every_number_beside_the_controls():
    model = tiny()
    found = evaluate(model, lens_of(d=32), tiny_texts(), tokens=300, context=32, behaviour_tokens=200)
    by = {name: values(found, dictionary=name) for name in ("evaluated", "random atoms", "random directions")}
    assert len({frozenset(v) for v in by.values()}) == 1
    assert {"explained_variance", "l0", "ce_loss_score", "kl_div_with_sae"} <= set(by["evaluated"])
    gap = next(m for m in found if m.name == "explained_variance over random atoms")
    own = by["evaluated"]["explained_variance"].value - by["random atoms"]["explained_variance"].value
    assert gap.value == pytest.approx(own) and gap.low < gap.value < gap.high
    keys = [(m.name, tuple(sorted(m.group.items()))) for m in found]
    assert len(set(keys)) == len(keys)
    again = evaluate(model, lens_of(d=32), tiny_texts(), tokens=300, context=32, behaviour_tokens=200)
    assert [m.to_json() for m in again] == [m.to_json() for m in found]


def tiny_texts() -> list[str]:
    words = ["the", "bridge", "was", "raining", "over", "papers", "and", "nobody", "agreed", "when"]
    g = np.random.default_rng(0)
    return [" ".join(g.permutation(words)) + "." for _ in range(12)]


def test_evaluate_on_rows_needs_no_model():
    rows = torch.randn(400, 16, generator=torch.Generator().manual_seed(3))
    found = values(evaluate(None, lens_of(), rows, parts=["core"], tokens=200), dictionary="evaluated")
    assert found["l0"].value == pytest.approx(3, abs=0.01) and found["l0"].n >= 6
    with pytest.raises(InputError, match="only the parts core and error"):
        evaluate(None, lens_of(), rows)


def test_the_error_part_is_the_decomposition() -> None:
    rows = torch.randn(900, 16, generator=torch.Generator().manual_seed(3))
    found = evaluate(None, lens_of(), rows, parts=["error"], tokens=400)
    own = values(found, dictionary="evaluated")
    sample, _ = read_sample(None, rows, lens_of(), tokens=800).split(400)
    assert own["vector_r2"].value == error_decomposition(lens_of(), sample)["vector_r2"].value
    assert {m.group["dictionary"] for m in found} == {"evaluated", "random atoms", "random directions"}
    few = values(evaluate(None, lens_of(), rows, parts=["error"], tokens=20), dictionary="evaluated")
    assert np.isnan(few["vector_r2"].value) and "cannot fix a map of 16 x 16" in few["vector_r2"].note


def test_massive_rows_are_left_out():
    rows = torch.randn(200, 16)
    rows[7] = 5000.0
    lens = lens_of()
    plain = read_sample(None, rows, lens, tokens=200)
    assert plain.left_out == 1 and len(plain) == 199
    lens.skip_above = 4.0
    assert len(read_sample(None, rows, lens, tokens=200)) == int((rows.norm(dim=1) <= 4).sum())
    lens.skip_above = 1e-3
    with pytest.raises(InputError, match="massive"):
        read_sample(None, rows, lens, tokens=200)


def test_samples_split_by_document():
    s = sample(100, documents=5)
    first, rest = s.split(50)
    assert first.documents + rest.documents == 5 and len(first) + len(rest) == 100
    assert torch.equal(torch.cat([first.x, rest.x]), s.x)
    np.testing.assert_allclose(s.sums(s.x[:, 0])[2], float(s.x[40:60, 0].double().sum()))
    lone = Sample(s.x, np.zeros(100, dtype=np.int64), s.token, s.position)
    assert [len(p) for p in lone.split(30)] == [30, 70]


def test_similarity_of_dictionaries():
    a = lens_of(m=20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    b = UnitDirections(site=SITE, directions=a.atoms[order], centre=torch.zeros(16), k=3)
    same = values(dictionary_similarity(a, b, matching=True), direction="a in b")
    found = dictionary_similarity(a, b, matching=True)
    mmcs = [m for m in found if m.name == "mmcs" and m.group["against"] == "the other dictionary"]
    assert [m.value for m in mmcs] == pytest.approx([1, 1], abs=1e-6)
    assert torch.equal(order[one_to_one(a.atoms, b.atoms).indices], torch.arange(20))
    assert same["shared_features"].value == 1
    random = next(m for m in found if m.group.get("against") == "random directions")
    # The control must not be the noise that a dictionary of the same seed and size began with.
    assert random.value < 0.8
    assert next(m for m in found if m.name == "mmcs over random directions").low > 0.1
    c = lens_of(m=20, seed=9)
    far = max_cosine(a.atoms, c.atoms)
    cosines = a.atoms @ c.atoms.T
    torch.testing.assert_close(far.values, cosines.max(1).values)
    assert torch.equal(far.indices, cosines.argmax(1))
    best = one_to_one(a.atoms, c.atoms[:5])
    assert sorted(best.indices[best.indices >= 0].tolist()) == [0, 1, 2, 3, 4]
    alive = torch.arange(20) < 4
    few = dictionary_similarity(a, b, alive=(alive, None))
    assert few[0].n == 4


def test_bad_input():
    model = tiny()
    with pytest.raises(InputError, match="no part 'cores'.*did you mean core"):
        evaluate(model, lens_of(d=32), tiny_texts(), parts=["cores"])
    with pytest.raises(InputError, match="no part was named"):
        evaluate(model, lens_of(d=32), tiny_texts(), parts=[])
    with pytest.raises(ShapeError, match="16 channels; the rows have 32"):
        evaluate(model, lens_of(), tiny_texts(), tokens=100)
    with pytest.raises(InputError, match="at least 2"):
        evaluate(model, lens_of(d=32), tiny_texts(), tokens=1)
    other = lens_of(d=32, fingerprint=trained().fingerprint)
    with pytest.raises(FingerprintError):
        evaluate(model, other, tiny_texts())
    with pytest.raises(InputError, match="core"):
        evaluate(model, lens_of(), torch.randn(50, 16), parts=PARTS)
    with pytest.raises(ShapeError, match="need the same channels"):
        dictionary_similarity(lens_of(), lens_of(d=32))
    with pytest.raises(InputError, match="at least 2 rows"):
        control_dictionaries(lens_of(), torch.ones(1, 16), 3)
    with pytest.raises(InputError, match="k is 25"):
        lens_of(k=25)
