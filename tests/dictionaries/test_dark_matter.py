"""Error decomposition against brute force in NumPy, on planted errors, and inside a small model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries.dark_matter import error_decomposition, token_means
from actlas.dictionaries.dark_matter_effects import downstream_recovery, error_scaling, same_tokens
from actlas.dictionaries.evaluation import Sample, UnitDirections
from actlas.dictionaries.itda import fit_itda
from tests.measure.letter_models import TEXTS, trained

D = 6


@dataclass(kw_only=True, eq=False)
class Shrunk(Dictionary):
    """Reconstructs x @ keep: every channel is a feature, so that its error is known."""

    keep: Tensor

    @property
    def channels(self) -> int:
        return self.keep.shape[0]

    @property
    def features(self) -> int:
        return self.keep.shape[0]

    @property
    def atoms(self) -> Tensor:
        return self.keep

    def encode_rows(self, x: Tensor) -> Codes:
        return Codes(torch.arange(x.shape[1]).expand(x.shape).contiguous(), x, x.shape[1])


def sample(n: int = 300, documents: int = 10, d: int = D, seed: int = 0) -> Sample:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) * torch.arange(1, d + 1) + 2
    token = torch.randint(0, 12, (n,), generator=g)
    return Sample(x, np.arange(n) * documents // n, token, torch.arange(n))


def some_directions(k: int = 2, m: int = 20, d: int = D) -> UnitDirections:
    g = torch.Generator().manual_seed(5)
    unit = torch.nn.functional.normalize(torch.randn(m, d, generator=g), dim=1)
    return UnitDirections(site="s", directions=unit, centre=torch.full((d,), 1.0), k=k)


@pytest.mark.parametrize("bias", [False, True])
def test_every_number_is_what_numpy_finds(bias):
    lens, s = some_directions(), sample()
    found = error_decomposition(lens, s, bias=bias, seed=3, controls=False)
    # The same, from the definitions.
    held_rows = torch.cat([(s.x == row).all(1).nonzero()[0] for row in found.held.x])
    mask = np.zeros(len(s), dtype=bool)
    mask[held_rows.numpy()] = True
    assert len({int(d) for d in s.document[mask]} & {int(d) for d in s.document[~mask]}) == 0
    x = s.x.double().numpy()
    e = x - lens.reconstruct(s.x).double().numpy()
    design = np.hstack([x, np.ones((len(x), 1))]) if bias else x
    fit, test = design[~mask], design[mask]
    B = np.linalg.lstsq(fit, e[~mask], rcond=None)[0]
    rest = e[mask] - test @ B
    r2 = 1 - (rest**2).sum(0) / ((e[mask] - e[mask].mean(0)) ** 2).sum(0)
    spread = ((x[mask] - x[mask].mean(0)) ** 2).sum()
    norm = (e**2).sum(1)
    guess = test @ np.linalg.lstsq(fit, norm[~mask], rcond=None)[0]

    def r2_of(p):
        return 1 - ((norm[mask] - p) ** 2).sum() / ((norm[mask] - norm[mask].mean()) ** 2).sum()

    by_token = {t: norm[~mask][s.token.numpy()[~mask] == t].mean() for t in range(12)}
    tokens = np.array([by_token[int(t)] for t in s.token.numpy()[mask]])
    length = np.linalg.norm(x, axis=1)
    line = np.polyfit(length[~mask], norm[~mask], 1)
    expected = {
        "vector_r2": r2.mean(),
        "norm_r2": r2_of(guess),
        "fvu": norm[mask].sum() / spread,
        "fvu_nonlinear": (rest**2).sum() / spread,
        "linear_share_of_fvu": 1 - (rest**2).sum() / norm[mask].sum(),
        "norm_r2_of_token_mean": r2_of(tokens),
        "norm_r2_of_activation_norm": r2_of(np.polyval(line, length[mask])),
        "norm_r2_over_token_mean": r2_of(guess) - r2_of(tokens),
    }
    for name, value in expected.items():
        m = found[name]
        assert m.value == pytest.approx(value, abs=1e-9), name
        assert m.low <= m.value <= m.high or name.startswith("norm_r2_of"), name
        assert m.seed == 3 and m.n == found.held.documents
    np.testing.assert_allclose(found.error_map.numpy(), B[:D], atol=1e-4)
    np.testing.assert_allclose(found.nonlinear.numpy(), (rest**2).sum(1), atol=1e-9)


def test_controls_and_planted_errors():
    found = error_decomposition(some_directions(d=24, m=60), sample(4000, 40, 24))
    assert abs(found["vector_r2 of isotropic noise"].value) < 0.05
    assert found["vector_r2 of a projection"].value == pytest.approx(1, abs=1e-9)
    g = torch.Generator().manual_seed(1)
    keep = torch.eye(D) + 0.3 * torch.randn(D, D, generator=g)
    linear = error_decomposition(Shrunk(site="s", keep=keep), sample())
    assert linear["vector_r2"].value == pytest.approx(1, abs=1e-6)
    assert linear["fvu_nonlinear"].value == pytest.approx(0, abs=1e-8) and linear["fvu"].value > 0.05
    torch.testing.assert_close(linear.error_map, torch.eye(D) - keep, atol=1e-4, rtol=0)


def test_pursuit_lowers_the_error_of_a_bad_encoder_and_says_so():
    lens = some_directions(k=3)
    bad = Shrunk(site="s", keep=torch.eye(D))
    own = error_decomposition(lens, sample(), controls=False)
    other = error_decomposition(lens, sample(), encoding="pursuit", controls=False)
    assert other["fvu"].group["encoding"] == "pursuit" and other["fvu"].value != own["fvu"].value
    exact = error_decomposition(bad, sample(), controls=False)
    assert exact["fvu"].value == 0 and np.isnan(exact["linear_share_of_fvu"].value)


def test_an_itda_has_dark_matter_too() -> None:
    s = sample(400)
    lens = fit_itda(None, s.x, "s", k=2, max_atoms=20, cos_min=0.95, batch=64)
    found = error_decomposition(lens, s)
    squared = (found.held.x - lens.reconstruct(found.held.x)).double().square().sum(1)
    torch.testing.assert_close(found.error, squared, rtol=1e-4, atol=1e-6)
    assert 0 < found["fvu_nonlinear"].value < found["fvu"].value


def test_tokens_that_the_fit_never_saw_get_the_overall_mean():
    token, value = torch.tensor([7, 3, 7, 3, 9]), torch.tensor([1.0, 10, 3, 20, 6])
    found = token_means(token, value, torch.tensor([3, 7, 8, 9, 100, 0]))
    torch.testing.assert_close(found, torch.tensor([15.0, 2, 8, 6, 8, 8], dtype=torch.float64))


def test_two_dictionaries_on_the_same_tokens():
    s = sample()
    a = error_decomposition(some_directions(k=2), s)
    b = error_decomposition(some_directions(k=3), s)
    r2, more = same_tokens(a, b)
    x, y = a.error.sqrt().numpy(), b.error.sqrt().numpy()
    assert r2.value == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-9)
    design = np.stack([x, a.nonlinear.sqrt().numpy(), np.ones_like(x)], 1)
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    left = y - np.polyval(np.polyfit(x, y, 1), x)
    assert more.value == pytest.approx(1 - (rest**2).sum() / (left**2).sum(), abs=1e-9)
    assert same_tokens(a, a)[0].value == pytest.approx(1)
    with pytest.raises(InputError, match="different rows"):
        same_tokens(a, error_decomposition(some_directions(), sample(seed=1)))


def test_a_law_of_width_is_found_again():
    widths = [500, 1000, 2000, 4000, 8000]
    found = error_scaling(widths, [0.2 + 5 * w**-0.6 for w in widths], [0.15] * 5)
    assert found.floor == pytest.approx(0.2, abs=1e-3) and found.power == pytest.approx(0.6, abs=0.01)
    assert found.nonlinear == pytest.approx(0.15) and found.error < 1e-4
    assert found.predict(3000) == pytest.approx(0.2 + 5 * 3000**-0.6, rel=1e-3)
    with pytest.raises(InputError, match="3 or more"):
        error_scaling([500, 1000, 1000], [0.3, 0.2, 0.2], [0.1] * 3)


def test_the_parts_are_put_back_into_a_model():
    model = trained()
    site = "blocks.1.resid_post"
    x = torch.cat([t.rows(site) for t in model.stream(TEXTS, site)]).float()
    g = torch.Generator().manual_seed(0)
    keep = torch.eye(16) * 0.6 + 0.05 * torch.randn(16, 16, generator=g)
    lens = Shrunk(site=site, keep=keep)
    found = error_decomposition(
        lens, Sample(x, np.arange(len(x)) // 10, torch.zeros(len(x)).long(), torch.arange(len(x)))
    )
    measured = downstream_recovery(model, TEXTS, found, tokens=200, context=64)
    get = {(m.name, m.group.get("part") or m.group.get("spliced")): m for m in measured}
    # The whole error is linear: with it back the model is whole again, without it nothing is.
    assert get["recovered_cross_entropy", "linear"].value == pytest.approx(1, abs=1e-3)
    assert get["recovered_cross_entropy", "nonlinear"].value == pytest.approx(0, abs=1e-3)
    assert get["share_of_squared_error", "linear"].value == pytest.approx(1, abs=1e-6)
    assert get["cross_entropy", "sae"].value > get["cross_entropy", "nothing"].value + 0.05
    with model.edit(lens.substitute(error="linear", error_map=found.error_map)):
        edited = model.logits(TEXTS[0])
    torch.testing.assert_close(edited, model.logits(TEXTS[0]), atol=1e-3, rtol=1e-3)
    late = downstream_recovery(model, TEXTS, found, tokens=200, context=64, skip_positions=20)
    losses = [m.value for m in late if m.name == "cross_entropy"]
    assert losses[0] < losses[1] < get["cross_entropy", "sae"].value


def test_bad_input():
    lens = some_directions()
    with pytest.raises(InputError, match="cannot fix a map of 6 x 6; give at least 12"):
        error_decomposition(lens, sample(12))
    assert "10 are advised" in error_decomposition(lens, sample(60)).measurements[0].note
    assert error_decomposition(lens, sample(300)).measurements[0].note == ""
    with pytest.raises(InputError, match="between 0 and 1"):
        error_decomposition(lens, sample(), fit=1.0)
    with pytest.raises(InputError, match="'own' or 'pursuit'"):
        error_decomposition(lens, sample(), encoding="omp")
    with pytest.raises(ShapeError, match="reads 6 channels and writes 4"):
        error_decomposition(Shrunk(site="s", keep=torch.ones(6, 4)), sample())
    with pytest.raises(InputError, match="there is no 'r2'"):
        error_decomposition(lens, sample())["r2"]
    lone = error_decomposition(lens, sample(100, documents=1))
    assert lone.fitted == 67 and lone["vector_r2"].low is None
