"""`fit_steer`: what comes back is what was asked for, its numbers are true, and unfit input gives one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from actlas.core.contrast import Contrast
from actlas.core.edit import Composition, Edit
from actlas.core.edits import Add, Clamp, ProjectOut, Rotate
from actlas.core.errors import InputError, ModelError, SiteError
from actlas.core.installation import EditHadNoEffect
from actlas.core.methods import find_method
from actlas.core.model import Model
from actlas.data.task_items import Pair
from actlas.steering import fit_direction, fit_steer, preparing
from actlas.steering.applying import Application, layer_weights
from actlas.steering.fits import fits
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

SITE = "blocks.1.resid_post"
WORDS = ("day", "film", "song", "talk", "walk", "meal", "house", "word", "game", "trip", "road", "book")
PAIRS = [(f"the {w} was {'good' if i % 2 else 'great'}.", f"the {w} was {'bad' if i % 2 else 'poor'}.")
         for i, w in enumerate(WORDS)]  # fmt: skip


@pytest.fixture(autouse=True)
def little_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Price on two openings of prose only."""
    monkeypatch.setattr(preparing, "_PROSE", 2)


def preference(model: Model, positive: str, negative: str) -> float:
    """Return log p(positive) - log p(negative) per token after what both begin with, text by text."""
    ids = [model.tokenizer(t)["input_ids"] for t in (positive, negative)]
    shared = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    means = []
    for row in ids:
        logp = model.logits(torch.tensor([row]))[0].double().log_softmax(-1)
        means.append(float(logp[torch.arange(shared - 1, len(row) - 1), row[shared:]].mean()))
    return means[0] - means[1]


def divergence(model: Model, edit: Edit, text: str) -> float:
    plain = model.logits(text)[0].double().log_softmax(-1)
    with model.edit(edit):
        new = model.logits(text)[0].double().log_softmax(-1)
    return float((plain.exp() * (plain - new)).sum(-1).mean())


def found(edit: Edit, name: str, **group: str) -> object:
    hits = [
        m for m in edit.measurements if m.name == name and all(m.group.get(k) == v for k, v in group.items())
    ]
    if not group:
        hits = [m for m in hits if not {"control", "texts"} & set(m.group)]
    assert len(hits) == 1, (name, group, [m.group for m in hits])
    return hits[0]


def test_the_edit_and_its_numbers() -> None:
    model = tiny()
    edit = fit_steer(model, PAIRS, budget=0.05)
    assert isinstance(edit, Add) and edit.strength == 1.0 and edit.fingerprint == model.fingerprint
    fit, test = Contrast.of(PAIRS).split(0.25, 0)
    effect, price = found(edit, "steering-effect"), found(edit, "kl-per-token")
    changes = []
    for p, n in zip(test.positive, test.negative, strict=True):
        before = preference(model, p, n)
        with model.edit(edit):
            changes.append(preference(model, p, n) - before)
    assert effect.value == pytest.approx(np.mean(changes), abs=1e-4) and effect.n == len(test)
    costs = [divergence(model, edit, t) for t in test.texts]
    assert price.value == pytest.approx(np.mean(costs), abs=1e-4)
    assert found(edit, "within-budget").value == pytest.approx(np.mean(np.array(costs) <= 0.05))
    details = effect.details
    assert (
        details["fitted on"] == len(fit) and details["data"] == fit.hash and details["method"] == "mean_diff"
    )
    direction = fit_direction(model, fit, edit.site)
    torch.testing.assert_close(edit.vector, direction.vector * details["strength"], rtol=1e-3, atol=1e-5)
    assert details["resid"] == pytest.approx(float(edit.vector.norm()) / direction.reference, rel=1e-3)
    for control in ("random", "flipped", "shuffled pairs"):
        assert found(edit, "steering-effect", control=control).n == len(test)
        assert found(edit, "kl-per-token", control=control).value > 0
    assert found(edit, "kl-per-token", texts="prose").value > 0
    assert effect.value > found(edit, "steering-effect", control="flipped").value
    assert "effect-over-random" in {m.name for m in edit.measurements}


def test_it_is_saved_with_its_numbers_and_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    model = tiny()
    edit = fit_steer(model, PAIRS, SITE, seed=3)
    again = Edit.load(edit.save(tmp_path / "vec"), model)
    assert torch.equal(again.vector, edit.vector) and again.strength == 1.0
    assert [m.to_json() for m in again.measurements] == [m.to_json() for m in edit.measurements]
    twin = fit_steer(model, PAIRS, SITE, seed=3)
    assert torch.equal(twin.vector, edit.vector)
    assert [m.value for m in twin.measurements] == [m.value for m in edit.measurements]


def test_a_given_strength_in_either_unit() -> None:
    model = tiny()
    fit, _ = Contrast.of(PAIRS).split(0.25, 0)
    d = fit_direction(model, fit, SITE)
    resid = fit_steer(model, PAIRS, SITE, strength=0.2)
    torch.testing.assert_close(resid.vector, d.unit * d.reference * 0.2, rtol=1e-4, atol=1e-5)
    raw = fit_steer(model, PAIRS, SITE, strength=1.5, unit="raw")
    torch.testing.assert_close(raw.vector, d.vector * 1.5, rtol=1e-4, atol=1e-5)
    back = fit_steer(model, PAIRS, SITE, strength=-0.2)
    plain = model.logits("the day")
    with model.edit(back, resid):
        torch.testing.assert_close(model.logits("the day"), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "method", [f.name for f in fits().values() if f.data != "texts" and f.name != "feature"]
)
def test_every_fit_gives_an_edit(method: str) -> None:
    edit = fit_steer(tiny(), PAIRS, SITE, method=method, strength=0.1, controls=0)
    assert found(edit, "steering-effect").details["method"] == method


def test_ways_to_apply() -> None:
    model = tiny()
    kinds = {"add": Add, "rotate": Rotate, "set": Clamp, "remove": ProjectOut}
    for apply, kind in kinds.items():
        edit = fit_steer(model, PAIRS, SITE, apply=apply, controls=1)
        assert isinstance(edit, kind)
        assert found(edit, "within-budget").value >= 0
    kept = fit_steer(model, PAIRS, SITE, keep_norm=True)
    trace = model.trace("the day", SITE)
    with model.edit(kept):
        moved = model.trace("the day", SITE)
    assert kept.keep_norm
    torch.testing.assert_close(moved[SITE].norm(dim=-1), trace[SITE].norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_setting_moves_the_projection_to_the_positive_side() -> None:
    model = tiny()
    d = fit_direction(model, PAIRS, SITE)
    with model.edit(Application("set")(d)):
        x = model.trace([p for p, _ in PAIRS], SITE).rows(SITE)
    goal = d.midpoint + d.norm / 2
    torch.testing.assert_close(x @ d.unit, torch.full((len(x),), goal), rtol=1e-3, atol=1e-3)
    positive = model.trace([p for p, _ in PAIRS], SITE).last(SITE) @ d.unit
    assert goal == pytest.approx(float(positive.mean()), rel=1e-3)


def test_limits_go_with_the_edit_and_not_into_the_measuring() -> None:
    model = tiny()
    free = fit_steer(model, PAIRS, SITE)
    late = fit_steer(model, PAIRS, SITE, phase="generated")
    last = fit_steer(model, PAIRS, SITE, positions="last")
    assert late.scope.phase == "generated" and last.scope.positions == "last"
    assert [m.value for m in late.measurements] == [m.value for m in free.measurements]
    plain = model.logits("the day")
    with warnings.catch_warnings(), model.edit(late):
        warnings.simplefilter("ignore", EditHadNoEffect)
        torch.testing.assert_close(model.logits("the day"), plain, rtol=0, atol=0)


def test_several_sites_with_weights() -> None:
    model = tiny()
    sites = ["blocks.0.resid_post", SITE]
    edit = fit_steer(model, PAIRS, sites, weights=[2.0, -1.0], budget=0.05)
    assert isinstance(edit, Composition) and [p.site for p in edit.parts()] == sites
    fit, test = Contrast.of(PAIRS).split(0.25, 0)
    factor = found(edit, "steering-effect").details["strength"]
    for part, weight in zip(edit.parts(), (2.0, -1.0), strict=True):
        d = fit_direction(model, fit, part.site)
        whole = part.vector * part.strength
        torch.testing.assert_close(
            whole, d.unit * d.reference * weight * 2**-0.5 * factor, rtol=1e-3, atol=1e-4
        )
    costs = [divergence(model, edit, t) for t in test.texts]
    assert found(edit, "kl-per-token").value == pytest.approx(np.mean(costs), abs=1e-4)
    fixed = fit_steer(model, PAIRS, sites, weights="equal", strength=0.1, controls=0)
    assert len(fixed.parts()) == 2
    assert layer_weights({SITE: 1.5}, dict.fromkeys(sites)) == {SITE: 1.5}


def test_pairs_in_every_form() -> None:
    model = tiny()
    forms = [
        PAIRS,
        [{"positive": p, "negative": n} for p, n in PAIRS],
        [Pair(str(i), p, n) for i, (p, n) in enumerate(PAIRS)],
        Contrast.of(PAIRS),
    ]
    vectors = [fit_steer(model, form, SITE, strength=0.1, controls=0).vector for form in forms]
    assert all(torch.equal(v, vectors[0]) for v in vectors)


def test_it_is_a_method_that_the_command_line_knows() -> None:
    info = find_method("steer")
    assert (info.room, info.returns, info.data, info.needs_site) == ("steering", "Edit", "pairs", False)
    assert info.options["method"] == "mean_diff" and info.open


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (PAIRS[:3], {}, "3 pairs cannot be split .* give at least 4"),
        ([*PAIRS, ("one side only", "")], {}, "pair 12 has no negative side"),
        ([*PAIRS, {"positive": "one side only"}], {}, "pair 12 has no negative side"),
        ([("a text", 1), ("another", 1)], {}, "pair 0 has no negative side"),
        (PAIRS, {"method": "mean_dif"}, "did you mean mean_diff"),
        (PAIRS, {"center": True, "method": "pca_diff"}, "no option 'center'; did you mean centre"),
        (PAIRS, {"strength": 0.1}, "strength 0.1 goes with one site, and there are"),
        (PAIRS, {"strength": 0}, "'auto' or a number other than 0"),
        (PAIRS, {"strength": "strong"}, "'auto' or a number other than 0"),
        (PAIRS, {"budget": 0}, "the budget is 0"),
        (PAIRS, {"budget": -1, "site": SITE}, "the budget is -1"),
        (PAIRS, {"unit": "metres", "strength": 1, "site": SITE}, "unit is 'metres'"),
        (PAIRS, {"apply": "shove"}, "apply is 'shove'"),
        (PAIRS, {"apply": "rotate", "keep_norm": True}, "keep_norm goes with apply='add'"),
        (PAIRS, {"phase": "later", "site": SITE}, "phase is 'later'"),
        (PAIRS, {"position": 99}, "position 99 does not exist"),
        (PAIRS, {"held_out": 1.5}, "held_out is 1.5"),
        (PAIRS, {"site": [SITE], "weights": [1, 2]}, "1 sites need 1 weights, not 2"),
        (PAIRS, {"site": [SITE], "weights": {"blocks.2.resid_post": 1}}, "has no direction"),
        (PAIRS, {"site": [SITE], "weights": [0.0]}, "not all 0"),
        (PAIRS, {"site": [SITE], "weights": "some"}, "give 'equal'"),
        (PAIRS, {"site": [SITE], "weights": ["x"]}, "each must be a number"),
    ],
)
def test_unfit_input_gives_one_line(data: object, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        fit_steer(tiny(), data, **options)
    assert "\n" not in str(error.value)


def test_unfit_sites_and_models() -> None:
    with pytest.raises(SiteError, match="did you mean"):
        fit_steer(tiny(), PAIRS, "blocks.1.resid_pots")
    with pytest.raises(ModelError, match="needs a causal language model"):
        fit_steer(BY_NAME["bert"].model(), PAIRS)


@pytest.mark.slow
def test_a_sentiment_vector_of_smollm2_beats_its_controls_within_the_budget() -> None:
    import actlas
    from actlas.data import labelled

    model = actlas.load("smollm2")
    pairs = labelled("sentiment", model.tokenizer, n=100, seed=1, only_pairs=True)
    edit = fit_steer(model, pairs)
    assert found(edit, "effect-over-random").low > 0.2
    assert found(edit, "steering-effect").low > found(edit, "steering-effect", control="shuffled pairs").high
    assert found(edit, "within-budget").value >= 0.95
