"""Layer and strength are chosen for the effect; curves, layer scores and controls say what they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actlas.core.contrast import Contrast, read_contrast
from actlas.core.direction import Direction
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.report.budget import Budget
from actlas.report.registry import Context, known_sections
from actlas.steering.auto import auto, report
from actlas.steering.curve import curve_chart, effect_curve, save_plot
from actlas.steering.layers import agreement_of, consistency_of, js_of_rows, layer_search
from actlas.steering.price import PairSuffix, preference
from actlas.steering.strength import level_of
from tests.core.tiny import tiny

WORDS = ("the river", "a house", "my friend", "this road", "her work", "that song", "the old man", "our town")
PAIRS = Contrast.of([(f"I like {w} a lot.", f"I hate {w} now") for w in WORDS])
SITES = ("blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.resid_post")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def directions(model: Model) -> dict[str, Direction]:
    """Mean differences, whose last one is replaced by the gradient of the preference: the best there is."""
    readings = read_contrast(model, PAIRS, SITES)
    found = {s: Direction.of(r, r.difference.mean(0), "mean_diff") for s, r in readings.items()}
    last = found[SITES[2]]
    best = torch.zeros(last.channels)
    for text, sign in [(t, 1.0) for t in PAIRS.positive] + [(t, -1.0) for t in PAIRS.negative]:
        trace = model.trace(text, [SITES[2]], grad=True, stop=False)
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
        score = trace.logits[0].log_softmax(-1)[6:-1].gather(1, ids[7:, None]).mean()
        best += sign * trace.gradients(score)[SITES[2]][0].sum(0)
    found[SITES[2]] = Direction(site=SITES[2], vector=best, method="gradient", reference=last.reference)
    return found


def test_auto_takes_the_site_with_the_most_effect_within_the_budget(
    model: Model, directions: dict[str, Direction]
) -> None:
    chosen = auto(model, PAIRS, directions, budget=0.05, random=2)
    alone = {
        site: auto(model, PAIRS, {site: d}, budget=0.05, random=0).effect.value
        for site, d in directions.items()
    }
    assert chosen.site == max(alone, key=lambda site: alone[site])
    assert chosen.direction is directions[chosen.site] and len(set(alone.values())) == 3
    assert chosen.effect.value == pytest.approx(alone[chosen.site], rel=0.1)
    effect, kl = PairSuffix(model, chosen.edit, PAIRS).effect(chosen.edit)
    assert level_of(0.95, [*range(8), *range(8)])(kl) <= 0.05 and chosen.within.value == 1.0
    assert chosen.effect.value == pytest.approx(effect.mean()) and chosen.effect.value > 0
    assert chosen.price.value == pytest.approx(kl.mean())
    with model.edit(chosen.edit):
        assert (preference(model, PAIRS) - preference(model, PAIRS)).mean() == 0
        under = preference(model, PAIRS)
    assert under.mean() - preference(model, PAIRS).mean() == pytest.approx(chosen.effect.value, abs=1e-5)
    over = {m.name: m for m in chosen.measurements if not m.group}["effect-over-random"]
    assert over.low is not None and over.low > 0
    controls = {m.group["control"] for m in chosen.measurements if m.group}
    assert controls == {"random", "flipped"}
    assert {row["site"] for row in chosen.screened} == set(SITES)
    assert [r["effect"] for r in chosen.screened] == sorted(
        (r["effect"] for r in chosen.screened), reverse=True
    )
    assert chosen.strength in [row["strength"] for row in chosen.curve]
    assert "chosen on" in chosen.note


def test_auto_reports_on_held_out_pairs_and_prices_other_texts(
    model: Model, directions: dict[str, Direction]
) -> None:
    fit, test = PAIRS.split(0.25)
    one = {SITES[1]: directions[SITES[1]]}
    chosen = auto(model, fit, one, texts=["Some other text here.", "And one more"], test=test, random=0)
    assert chosen.effect.n == len(test) and not chosen.note
    again = auto(model, fit, one, texts=["Some other text here.", "And one more"], test=test, random=0)
    assert again.strength == chosen.strength and again.effect.value == chosen.effect.value


def test_auto_works_for_edits_that_are_made_otherwise(model: Model, directions: dict[str, Direction]) -> None:
    chosen = auto(
        model, PAIRS, {SITES[1]: directions[SITES[1]]}, random=0,
        make=lambda d: d.steer(1.0, unit="resid", keep_norm=True),
    )  # fmt: skip
    assert "keep_norm" in repr(chosen.edit.__dict__) and chosen.within.value == 1.0


def test_auto_refuses_nothing_to_choose(model: Model, directions: dict[str, Direction]) -> None:
    with pytest.raises(InputError, match="no directions"):
        auto(model, PAIRS, {})
    with pytest.raises(InputError, match="budget"):
        auto(model, PAIRS, directions, budget=0.0)


def test_controls_are_as_long_as_the_direction(model: Model, directions: dict[str, Direction]) -> None:
    d = directions[SITES[1]]
    long = Direction(site=d.site, vector=d.vector * 100, method="shuffled", reference=d.reference)
    found = report(model, PAIRS, d, 0.5, random=0, others={"shuffled": long})
    same = {m.group.get("control", ""): m.value for m in found if m.name == "steering-effect"}
    assert same["shuffled"] == pytest.approx(same[""], rel=1e-4)
    assert same["flipped"] != pytest.approx(same[""])


def test_curve_holds_every_series_and_is_saved(
    model: Model, directions: dict[str, Direction], tmp_path: Path
) -> None:
    d = directions[SITES[2]]
    rows = effect_curve(model, PAIRS, d, (-1.0, 1.0, 2.0, 1e39), random=1)
    assert {r["series"] for r in rows} == {"gradient", "random 1"}
    assert [r["strength"] for r in rows] == [-1.0, 1.0, 2.0] * 2
    effect, kl = PairSuffix(model, d.edit(), PAIRS).effect(d.edit() * 2.0)
    assert rows[2]["effect"] == pytest.approx(effect.mean()) and rows[2]["price"] == pytest.approx(kl.mean())
    spec = curve_chart(rows).to_dict()
    assert {layer["mark"]["type"] for layer in spec["layer"]} == {"line", "rule", "point"}
    assert save_plot(rows, tmp_path / "curve.svg").read_text().startswith("<svg")
    with pytest.raises(InputError, match=r"\.html"):
        save_plot(rows, tmp_path / "curve.gif")
    with pytest.raises(InputError, match="at least one strength"):
        effect_curve(model, PAIRS, d, ())
    with pytest.raises(InputError, match="not finite"):
        effect_curve(model, PAIRS, d, (1e39,), random=0)


# -- layers -------------------------------------------------------------------------------------


def test_layer_scores_are_their_brute_force() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0, 0])
    cosines = torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1)
    for i in range(7):
        others = [j for j in range(7) if j != i]
        assert consistency_of(x)[i] == pytest.approx(float(cosines[i, others].mean()), abs=1e-9)
        assert bool(agreement_of(x)[i]) == (float(x[i] @ x[others].mean(0)) > 0)
    assert bool((js_of_rows(x, x) == 0).all())
    scaled = js_of_rows(x * 100, -x * 100)
    assert torch.allclose(scaled, js_of_rows(x, -x), atol=1e-6)
    assert not torch.allclose(js_of_rows(x * 100, -x * 100, normalise=False), scaled, atol=1e-3)


def test_layer_search_finds_the_layer_that_separates(model: Model) -> None:
    readings = read_contrast(model, PAIRS, SITES)
    noise = readings[SITES[0]]
    same = torch.randn(noise.positive.shape, generator=torch.Generator().manual_seed(3))
    jitter = torch.randn(noise.positive.shape, generator=torch.Generator().manual_seed(4))
    readings[SITES[0]] = type(noise)(SITES[0], same + 0.01 * jitter, same, 1.0)
    for by in ("js", "consistency"):
        rows = layer_search(readings, by=by)  # type: ignore[arg-type]
        assert rows[-1].site == SITES[0] and {r.site for r in rows} == set(SITES)
        assert [getattr(r, by).value for r in rows] == sorted(
            (getattr(r, by).value for r in rows), reverse=True
        )
    with pytest.raises(InputError, match="'js'"):
        layer_search(readings, by="loss")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one site"):
        layer_search({})
    with pytest.raises(InputError, match="2 pairs"):
        layer_search({SITES[1]: readings[SITES[1]].at([0])})


# -- card ---------------------------------------------------------------------------------------


def test_the_card_has_a_section_on_controllability(model: Model) -> None:
    info = known_sections()["controllability"]
    assert info.applies_to("causal-lm") and not info.applies_to("encoder")
    result = info.function(Context(model, Budget(), 0, None))  # type: ignore[arg-type]
    slopes = [m for m in result.measurements if m.name == "effect-per-nat"]
    assert slopes and len(slopes) % 2 == 0
    for m in slopes:
        own = [o for o in result.measurements if o.group == m.group]
        effect = next(o.value for o in own if o.name == "steering-effect")
        cost = next(o.value for o in own if o.name == "kl-per-token")
        assert m.value == pytest.approx(effect / cost) and m.low is not None
        if "control" not in m.group:
            assert 0.05 < cost <= 0.1
    assert len(result.figures) == 2 and result.tables[0].rows and result.tiles
