"""What an edit costs: suffix re-execution against whole passes, budgets, and the closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from actlas.core.contrast import Contrast
from actlas.core.direction import Direction
from actlas.core.divergence import js_divergence, kl_divergence, logit_variance
from actlas.core.edits import Add, Zero
from actlas.core.errors import InputError, ModelError, NonFiniteError, ShapeError
from actlas.core.model import Model
from actlas.steering.price import PairSuffix, Suffix, blocks_before, preference, price
from actlas.steering.strength import allowed, fisher_price, kl_budget, level_of, search
from tests.core.tiny import tiny

TEXTS = [
    "The committee met on Tuesday to discuss it.",
    "Nobody agreed!",
    "It was raining; the river had risen.",
    "We will come back to this, he said.",
    "Why not",
]
PAIRS = Contrast(
    ("It was good of you", "He is glad", "We are well here"),
    ("It was bad of you", "He is sad now", "We are ill"),
)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


def vector(model: Model, site: str, seed: int = 0) -> torch.Tensor:
    features = model.resolve(site)[0].features
    assert features is not None
    return torch.randn(features, generator=torch.Generator().manual_seed(seed))


def brute_kl(model: Model, edit: Add, text: str) -> float:
    p = model.logits(text)[0].double().log_softmax(-1)
    with model.edit(edit):
        q = model.logits(text)[0].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# -- divergences --------------------------------------------------------------------------------


def test_divergences_are_what_their_equations_say() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 9, generator=generator), 3 * torch.randn(6, 9, generator=generator)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    m = (p + q) / 2
    kl = (p * (p / q).log()).sum(-1)
    js = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert torch.allclose(kl_divergence(a, b), kl, rtol=1e-5)
    assert torch.allclose(js_divergence(a, b), js, rtol=1e-5)
    u = torch.randn(6, 9, generator=generator)
    mean = (p * u.double()).sum(-1, keepdim=True)
    assert torch.allclose(logit_variance(a, u), (p * (u.double() - mean) ** 2).sum(-1), rtol=1e-5)


def test_js_is_symmetric_bounded_and_zero_for_equals() -> None:
    a, b = torch.randn(4, 7), 50 * torch.randn(4, 7)
    one, other = js_divergence(a, b), js_divergence(b, a)
    assert torch.allclose(one, other, atol=1e-9)
    assert bool((one > 0).all()) and bool((one <= math.log(2)).all())
    assert js_divergence(a, a).abs().max() < 1e-7
    far = torch.tensor([[1000.0, 0.0]])
    assert float(js_divergence(far, -far)) == pytest.approx(math.log(2))
    with pytest.raises(ShapeError, match="one shape"):
        kl_divergence(a, b[:2])


# -- suffix re-execution ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "skipped"),
    [
        ("embed", 0),
        ("blocks.0.mlp.out", 0),
        ("blocks.1.attn.z", 1),
        ("blocks.1.resid_post", 2),
        ("blocks.2.resid_post", 3),
        ("final_norm", 3),
    ],
)
def test_price_from_the_edit_on_is_that_of_whole_passes(model: Model, site: str, skipped: int) -> None:
    edit = Add(site, vector(model, site)) * 0.3
    run = Suffix(model, edit, TEXTS, batch_tokens=60)
    assert run.skipped == skipped
    expected = [brute_kl(model, edit, text) for text in TEXTS]
    assert np.abs(run.outcome(edit).kl - expected).max() < 1e-6
    assert min(expected) > 1e-3


def test_no_edit_costs_nothing_and_scores_as_the_model_does(model: Model) -> None:
    site = "blocks.1.resid_post"
    run = Suffix(model, Add(site, vector(model, site)), TEXTS)
    outcome = run.outcome(None)
    assert (outcome.kl == 0).all()
    assert (run.outcome(Add(site, vector(model, site)) * 0.0).kl == 0).all()
    ids = torch.tensor(model.tokenizer(TEXTS[1])["input_ids"])
    log_p = model.logits(TEXTS[1])[0].double().log_softmax(-1)
    assert outcome.logp[1] == pytest.approx(float(log_p[:-1].gather(1, ids[1:, None]).mean()), abs=1e-5)


def test_plain_logits_that_are_not_kept_give_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post"))
    kept = Suffix(model, edit, TEXTS).outcome(edit).kl
    monkeypatch.setattr("actlas.steering.price.BASE_BYTES", 0)
    run = Suffix(model, edit, TEXTS)
    assert all(batch.base is None for batch in run._batches)
    assert np.array_equal(run.outcome(edit).kl, kept)


def test_scopes_gates_and_other_edits_are_priced_right(model: Model) -> None:
    direction = Direction(site="blocks.0.resid_post", vector=vector(model, "blocks.0.resid_post"))
    gated = Add("blocks.2.resid_post", vector(model, "blocks.2.resid_post")).when(direction)
    assert blocks_before(model, [gated]) == 1
    expected = [brute_kl(model, gated, text) for text in TEXTS]  # type: ignore[arg-type]
    assert np.abs(price(model, gated, TEXTS) - expected).max() < 1e-6
    assert max(expected) > 1e-3
    last = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post")).at(positions=-1)
    assert price(model, last, ["Why not"])[0] == pytest.approx(brute_kl(model, last, "Why not"), abs=1e-6)  # type: ignore[arg-type]
    other = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post", seed=5)) * 0.3
    with model.edit(other):
        both = price(model, other, TEXTS[:1])
        assert blocks_before(model, [other]) == 0
        assert both[0] == pytest.approx(brute_kl(model, other, TEXTS[0]), abs=1e-6)  # type: ignore[arg-type]


def test_an_edit_before_the_cut_is_refused(model: Model) -> None:
    run = Suffix(model, Add("blocks.2.resid_post", vector(model, "blocks.2.resid_post")), TEXTS)
    with pytest.raises(InputError, match="reaches before block 2"):
        run.outcome(Add("blocks.0.resid_post", vector(model, "blocks.0.resid_post")))


def test_bad_input_to_a_price_is_named(model: Model) -> None:
    edit = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post"))
    with pytest.raises(InputError, match="no texts"):
        Suffix(model, edit, [])
    with pytest.raises(InputError, match="empty"):
        Suffix(model, edit, ["fine", " "])
    with pytest.raises(InputError, match="1 tokens"):
        Suffix(model, edit, ["x"])
    with pytest.raises(ModelError, match="causal"):
        Suffix(Model(torch.nn.Linear(2, 2)), edit, TEXTS)
    with pytest.raises(NonFiniteError, match="smaller strength"):
        price(model, edit * 1e39, TEXTS)


# -- preference ---------------------------------------------------------------------------------


def test_preference_scores_what_differs(model: Model) -> None:
    expected = []
    for pair in zip(PAIRS.positive, PAIRS.negative, strict=True):
        ids = [model.tokenizer(t)["input_ids"] for t in pair]
        start = next(i for i, (x, y) in enumerate(zip(*ids, strict=False)) if x != y)
        means = []
        for text, own in zip(pair, ids, strict=True):
            log_p = model.logits(text)[0].double().log_softmax(-1)
            means.append(np.mean([float(log_p[i - 1, own[i]]) for i in range(start, len(own))]))
        expected.append(means[0] - means[1])
    assert np.abs(preference(model, PAIRS) - expected).max() < 1e-5
    assert np.abs(preference(model, PAIRS.flipped()) + np.array(expected)).max() < 1e-5


def test_effect_is_the_change_of_preference(model: Model) -> None:
    edit = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post"))
    effect, kl = PairSuffix(model, edit, PAIRS).effect(edit)
    with model.edit(edit):
        under = preference(model, PAIRS)
    assert np.abs(effect - (under - preference(model, PAIRS))).max() < 1e-5
    assert np.abs(kl - price(model, edit, PAIRS.texts)).max() < 1e-6
    assert np.abs(effect).max() > 1e-2


def test_a_text_that_is_the_beginning_of_the_other_is_scored(model: Model) -> None:
    assert np.isfinite(preference(model, Contrast(("We are",), ("We are ill",)))).all()


# -- budgets ------------------------------------------------------------------------------------


def test_closed_form_is_the_curvature_of_the_price(model: Model) -> None:
    edit = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post"))
    half = fisher_price(model, edit, TEXTS)
    small = 1e-3
    logits = []
    for s in (small, -small):
        with model.edit(edit * s):
            logits.append([model.logits(t)[0].double() for t in TEXTS])
    for i, text in enumerate(TEXTS):
        p = model.logits(text)[0].double().softmax(-1)
        u = (logits[0][i] - logits[1][i]) / (2 * small)
        variance = ((p * u**2).sum(-1) - (p * u).sum(-1) ** 2).mean()
        assert half[i] == pytest.approx(float(variance) / 2, rel=2e-2)
    ratio = price(model, edit * 5e-3, TEXTS) / (half * 25e-6)
    assert np.abs(ratio - 1).max() < 0.1


def test_a_price_grows_with_the_square_of_a_small_strength(model: Model) -> None:
    edit = Add("blocks.2.resid_post", vector(model, "blocks.2.resid_post"))
    one, two = (price(model, edit * s, TEXTS).mean() for s in (0.01, 0.02))
    assert two / one == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("share", [None, 0.6])
def test_the_budget_is_used_and_kept(model: Model, share: float | None) -> None:
    edit = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post"))
    found = kl_budget(model, edit, TEXTS, 0.02, share=share)
    kl = price(model, edit * found, TEXTS)  # type: ignore[operator]
    held = level_of(share)(kl)
    assert 0.9 * 0.02 <= held <= 0.02
    assert np.allclose(found.kl, kl) and found.level == pytest.approx(held)
    more = level_of(share)(price(model, edit * (found.value * 1.1), TEXTS))
    assert more > 0.02


def test_the_closed_form_solves_its_own_equation(model: Model) -> None:
    edit = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post"))
    mean = fisher_price(model, edit, TEXTS).mean()
    found = kl_budget(model, edit, TEXTS, 1e-4, method="fisher", share=None)
    assert found.value == pytest.approx(math.sqrt(1e-4 / mean), rel=1e-3)
    scaled = kl_budget(model, edit * 7, TEXTS, 1e-4, method="fisher", share=None)
    assert scaled.value == pytest.approx(found.value / 7, rel=2e-2)


def test_search_finds_the_crossing_of_a_known_curve() -> None:
    for power in (1.5, 2.0, 4.0):
        found = search(lambda s, p=power: np.array([3 * s**p]), 0.1, level_of(None), start=100.0)  # type: ignore[misc]
        exact = (0.1 / 3) ** (1 / power)
        assert 0.9 ** (1 / power) * exact <= found.value <= exact
    assert len(found.tried) <= 14


def test_search_gives_up_on_what_costs_nothing_and_stops_at_a_ceiling() -> None:
    with pytest.raises(InputError, match="does not change"):
        search(lambda s: np.zeros(3), 0.1, level_of(None), what="it")
    found = search(lambda s: np.array([0.05 * s / (1 + s)]), 0.1, level_of(None))
    assert "stops growing" in found.note and found.level < 0.05

    def breaks(s: float) -> np.ndarray:
        if s > 0.5:
            raise NonFiniteError("too far")
        return np.array([s**2])

    assert search(breaks, 0.1, level_of(None), start=8.0).value == pytest.approx(math.sqrt(0.1), rel=0.06)


def test_allowed_prompts_over_the_budget_are_a_tolerance_limit() -> None:
    for n, k in ((10, 0), (76, 0), (77, 1), (300, 9)):
        assert allowed(n, 0.95) == k
    over = 0.05
    n, k = 120, allowed(120, 0.95)
    below = sum(math.comb(n, i) * over**i * (1 - over) ** (n - i) for i in range(k + 1))
    further = below + math.comb(n, k + 1) * over ** (k + 1) * (1 - over) ** (n - k - 1)
    assert below <= 0.1 < further


def test_few_prompts_are_held_further_from_the_budget() -> None:
    kl = np.exp(np.random.default_rng(0).normal(-3, 0.5, 12))
    assert level_of(0.95)(kl) > kl.max()
    many = np.exp(np.random.default_rng(0).normal(-3, 0.5, 200))
    assert level_of(0.95)(many) == np.sort(many)[::-1][allowed(200, 0.95)]
    assert level_of(None)(many) == many.mean()


def test_texts_of_one_source_count_once() -> None:
    kl = np.random.default_rng(0).uniform(0.01, 0.1, 120)
    groups = list(range(60)) * 2
    whole = np.maximum(kl[:60], kl[60:])
    assert level_of(0.95, groups)(kl) == level_of(0.95)(whole) == whole.max()
    assert level_of(0.95)(kl) < whole.max()
    with pytest.raises(InputError, match="120 texts but 3 groups"):
        level_of(0.95, [1, 2, 3])(kl)


def test_level_covers_new_prompts_as_often_as_it_promises() -> None:
    draw, kept = np.random.default_rng(1), []
    for n in (8, 24, 60):
        limits = np.array([level_of(0.95)(np.exp(draw.normal(0, 0.6, n))) for _ in range(200)])
        coverage = np.array([(np.exp(draw.normal(0, 0.6, 4000)) <= limit).mean() for limit in limits])
        kept.append((coverage >= 0.95).mean())
    assert min(kept) >= 0.85


@pytest.mark.parametrize(
    ("eps", "share"), [(0.0, None), (-1.0, 0.95), (math.inf, None), (0.1, 1.0), (0.1, 0.0)]
)
def test_impossible_budgets_are_refused(model: Model, eps: float, share: float | None) -> None:
    edit = Add("blocks.1.resid_post", vector(model, "blocks.1.resid_post"))
    with pytest.raises(InputError, match="must"):
        kl_budget(model, edit, TEXTS, eps, share=share)


def test_an_edit_without_an_effect_has_no_strength(model: Model) -> None:
    nothing = Add("blocks.1.resid_post", torch.zeros(32))
    for method in ("bisect", "fisher"):
        with (
            pytest.warns(UserWarning, match="changed nothing"),
            pytest.raises(InputError, match="does not change"),
        ):
            kl_budget(model, nothing, TEXTS, method=method)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'bisect' or 'fisher'"):
        kl_budget(model, nothing, TEXTS, method="guess")  # type: ignore[arg-type]


def test_edits_other_than_addition_have_a_price(model: Model) -> None:
    found = kl_budget(model, Zero("blocks.1.mlp.out"), TEXTS, 0.01, share=None)
    assert price(model, Zero("blocks.1.mlp.out") * found.value, TEXTS).mean() <= 0.01
