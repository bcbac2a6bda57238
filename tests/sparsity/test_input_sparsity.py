"""Input sparsity: thresholds, budgets, WINA's optimality, rotation, low-rank maps, the price of a rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import FingerprintError, InputError, NonFiniteError
from actlas.core.skip_inputs import SkipInputs
from actlas.measure.linear_layers import LinearLayer, linear_layers
from actlas.measure.sparsity_price import compare_rules, count_touched, sparsity_price
from actlas.sparsity.allocate import by_price, greedy
from actlas.sparsity.input_sparsity import calibrate_inputs, factors, skip_inputs, threshold_at, uniform
from actlas.sparsity.orthogonal import RotatedLinear
from actlas.sparsity.priced_inputs import fit_priced_inputs
from actlas.sparsity.r_sparse import RankAware, fit_r_sparse, search
from actlas.sparsity.rank_aware import RankAwareLinear, low_rank
from actlas.sparsity.sensitivity import input_gradients, loss_rises
from actlas.sparsity.wina import fit_magnitude, fit_wina
from tests.core.tiny import TEXTS, tiny

LONG = [" ".join([t] * 2)[:60] for t in TEXTS if len(t) > 10]
READ = {"tokens": 300, "context": 60}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate_inputs(model, LONG, tokens=300, context=60)


def test_wina_is_optimal_for_orthogonal_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        q, _ = torch.linalg.qr(torch.randn(9, 7, dtype=torch.float64, generator=generator))
        w = q * torch.rand(7, dtype=torch.float64, generator=generator)
        x = torch.randn(7, dtype=torch.float64, generator=generator)
        edit = SkipInputs("embed", w.norm(dim=0), keep=3 / 7)
        error = (w @ (x * ~edit.mask(x))).norm()
        best = min((w @ (x - x * _chosen(c, 7))).norm() for c in itertools.combinations(range(7), 3))
        assert float(error - best) < 1e-12


def _chosen(indices: tuple[int, ...], d: int) -> torch.Tensor:
    out = torch.zeros(d, dtype=torch.float64)
    out[list(indices)] = 1
    return out


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.999])
def test_threshold_skips_exactly_its_share(share: float) -> None:
    scores = torch.rand(40, 25, generator=torch.Generator().manual_seed(0))
    t = threshold_at(scores, share)
    assert int((scores < t).sum()) == int(share * 1000)


def test_layers_share_what_they_read(model) -> None:
    layers = linear_layers(model)
    assert [p.name for p in layers[:7]] == [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    assert layers[1].reads == layers[0].input_site and layers[5].reads == layers[4].input_site
    x = model.trace(TEXTS[0], [layers[0].input_site, layers[2].input_site])
    assert torch.equal(x[layers[0].input_site], x[layers[2].input_site])
    with pytest.raises(InputError, match="no block has a linear layer 'c_attn'"):
        linear_layers(model, ("c_attn",))


def test_fitted_edit_zeroes_the_smallest_scores(model, calibration) -> None:
    edit = fit_wina(model, calibration, sparsity=0.5)
    assert len(edit.parts()) == len(linear_layers(model))
    layer = linear_layers(model)[9]
    part = next(p for p in edit.parts() if p.site == layer.input_site)
    rows = calibration[layer.reads].rows
    scores = rows.double().abs() * layer.weight(model).double().norm(dim=0)
    kept = part.mask(rows)
    assert abs(float(kept.float().mean()) - 0.5) < 0.01
    assert float(scores[~kept].max()) <= float(scores[kept].min()) * (1 + 1e-5)
    released = fit_wina(model, calibration, norms="released")
    named = {p.site.split(".")[-2]: p.factor for p in released.parts()}
    assert isinstance(named["k_proj"], torch.Tensor) and named["q_proj"] == 1.0


def test_achieved_is_what_is_counted(model) -> None:
    top = fit_wina(model, LONG, sparsity=0.5, select="topk", **READ)
    price = sparsity_price(model, LONG, top, against_base=True)
    values = {m.name: m.value for m in price}
    assert values["weights-touched"] == pytest.approx(0.5) and values["achieved-sparsity"] == pytest.approx(
        0.5
    )
    assert values["kl-to-dense"] > 0
    with count_touched(model) as dense:
        model.logits(TEXTS[0])
    assert dense.weights == 1.0 and dense.sparsity == 0.0


def test_gate_rows_count_for_up_and_down(model) -> None:
    """One gated block, one token: brute force over rows and columns."""
    d_mlp = model.d_mlp
    frozen = torch.zeros(d_mlp, dtype=torch.bool)
    frozen[:12] = True
    edit = SkipInputs("blocks.0.mlp.act", frozen=frozen)
    with model.edit(edit), count_touched(model, edit) as found:
        model.logits(TEXTS[0])
    layers = {p.name: p for p in linear_layers(model) if p.block == 0}
    for name, want in (
        ("gate_proj", 12 / d_mlp),
        ("up_proj", 12 / d_mlp),
        ("down_proj", 12 / d_mlp),
        ("q_proj", 1.0),
    ):
        assert found.per_layer[layers[name].path] == pytest.approx(want)


def test_compare_rules_pairs_only_equal_budgets(model) -> None:
    rules = {
        "a": fit_wina(model, LONG, sparsity=0.5, **READ),
        "b": fit_magnitude(model, LONG, sparsity=0.5, **READ),
        "c": fit_magnitude(model, LONG, sparsity=0.2, **READ),
    }
    found = compare_rules(model, LONG, rules, equal=0.05)
    extra = {m.group["rule"]: m for m in found if m.name == "extra-loss"}
    ratio = {m.group["rule"]: m for m in found if m.name == "perplexity-ratio"}
    want = math.log(ratio["b"].value) - math.log(ratio["a"].value)
    assert extra["b"].value == pytest.approx(want, abs=1e-6)
    assert math.isnan(extra["c"].value) and "not at equal budgets" in extra["c"].note
    with pytest.raises(InputError, match="two rules"):
        compare_rules(model, LONG, {"a": rules["a"]})
    with pytest.raises(InputError, match="'z' is not one"):
        compare_rules(model, LONG, rules, pairs=[("z", "a")])


def test_rotation_changes_nothing_until_inputs_are_skipped(model, calibration) -> None:
    edit = fit_wina(model, calibration, norms="released", orthogonal=True, sparsity=0.5)
    before = model.logits(TEXTS[0])
    for part in edit.parts():
        module = getattr(part, "module", None)
        if isinstance(module, RotatedLinear):
            gram = (module.weight.double().T @ module.weight.double()).abs()
            if part.path.endswith(("k_proj", "gate_proj")):
                off = gram - gram.diag().diag()
                assert float(off.max()) < 1e-5 * float(gram.max())
            module.threshold.fill_(0.0)
    swaps = [p for p in edit.parts() if not isinstance(p, SkipInputs)]
    assert len(swaps) == 15
    with model.edit(*swaps):
        assert torch.allclose(model.logits(TEXTS[0]), before, atol=2e-4)


def test_low_rank_agrees_with_the_svd_and_full_rank_is_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, columns in ((6, 9), (9, 6)):
        w = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        up, down = low_rank(w, 3)
        assert torch.allclose(up @ down, (u[:, :3] * s[:3]) @ v[:3], atol=1e-10)
        up, down = low_rank(w, 6)
        module = RankAwareLinear.of(w, None, up, down, factor=torch.ones(columns), threshold=0.7)
        x = torch.randn(5, columns, dtype=torch.float64, generator=generator)
        assert 0 < int(module.inputs_kept(x).sum()) < x.numel()
        assert torch.allclose(module(x), x @ w.T, atol=1e-6)
    with pytest.raises(InputError, match="allows 1 to 6"):
        low_rank(w, 7)


def test_rank_aware_spends_one_budget(model, calibration) -> None:
    rule = RankAware(model, calibration, 0.5)
    exact = rule.edit(1.0)
    assert all(isinstance(p, SkipInputs) for p in exact.parts())
    mixed = rule.edit(0.5)
    with model.edit(mixed), count_touched(model, mixed) as found:
        model.logits(LONG)
    assert found.weights < 0.56  # ranks are rounded down, thresholds drift
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        rule.edit(1.5)
    with pytest.raises(InputError, match="give text"):
        fit_r_sparse(model, calibration, alpha="search")


def test_rank_aware_saves_and_loads(model, calibration, tmp_path: Path) -> None:
    edit = RankAware(model, calibration, 0.4).edit(0.6)
    edit.save(tmp_path / "e", model)
    with model.edit(edit):
        want = model.logits(TEXTS[0])
    with model.edit(Edit.load(tmp_path / "e", model)):
        assert torch.equal(model.logits(TEXTS[0]), want)


def test_search_is_never_worse_than_its_start() -> None:
    calls = []

    def loss(alphas) -> float:
        calls.append(dict(alphas))
        return (alphas["q"] - 0.8) ** 2 + (1 - alphas["v"]) ** 2

    best, value = search(loss, ["q", "v"], evaluations=60, seed=3)
    assert calls[0] == {"q": 1.0, "v": 1.0} and len(calls) == 60
    assert value < 0.01 < loss(calls[0]) and abs(best["q"] - 0.8) < 0.1
    assert search(lambda a: 2 - sum(a.values()), ["q", "v"], evaluations=20)[0] == {"q": 1.0, "v": 1.0}


def _layer(path: str, rows: int, columns: int) -> LinearLayer:
    return LinearLayer(path, 0, path, rows, columns, path)


def test_greedy_is_the_best_choice_of_steps() -> None:
    layers = [_layer("a", 10, 10), _layer("b", 10, 10), _layer("c", 10, 20)]
    levels = [0.25, 0.5, 0.75]
    rises = {"a": [1.0, 2.5, 5.0], "b": [0.2, 0.5, 4.0], "c": [1.0, 4.0, 9.0]}
    got = greedy(layers, rises, levels, 0.375)
    points = {p: [0.0, *r] for p, r in rises.items()}
    options = itertools.product(range(4), repeat=3)
    costs = [
        sum(points[p][i] for p, i in zip("abc", o, strict=True))
        for o in options
        if sum(i * s for i, s in zip(o, (25, 25, 50), strict=True)) == 150
    ]
    cost = sum(points[p][round(got[p] * 4)] for p in "abc")
    assert sum(got[p.path] * p.size for p in layers) == pytest.approx(0.375 * 400)
    assert cost == pytest.approx(min(costs))
    with pytest.raises(InputError, match="no layer may skip more than 0.75"):
        greedy(layers, rises, levels, 0.8)


def test_one_price_meets_the_budget_and_prefers_cheap_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [_layer("cheap", 10, 50), _layer("dear", 10, 50)]
    base = torch.randn(30, 50, generator=generator)
    got = by_price(layers, {"cheap": base, "dear": base * 10}, 0.5)
    assert sum(got.values()) / 2 == pytest.approx(0.5, abs=0.01)
    assert got["cheap"] > 0.8 > 0.2 > got["dear"]


def test_gradients_predict_the_loss(model) -> None:
    """The Fisher estimate of one layer's skipping against a brute force in float64."""
    layers = linear_layers(model)[:7]
    rule = factors(model, layers, "wina")
    rises = loss_rises(model, LONG, layers, rule, (0.25, 0.75), tokens=200, context=60)
    assert all(0 < low < high for low, high in rises.values())
    again = loss_rises(model, LONG, layers, rule, (0.25, 0.75), tokens=200, context=60)
    assert again == rises
    f = input_gradients(model, LONG, layers, tokens=200, context=60)
    assert all(torch.isfinite(v).all() and float(v.min()) >= 0 for v in f.values())
    k, v = (f[p.path] for p in layers[1:3])
    assert k.shape == (model.d_model,) and not torch.allclose(k, v)


def test_priced_inputs_meet_the_budget(model) -> None:
    edit = fit_priced_inputs(model, LONG, sparsity=0.4, gradient_tokens=200, **READ)
    values = {m.name: m.value for m in sparsity_price(model, LONG, edit)}
    assert values["weights-touched"] == pytest.approx(0.6, abs=0.04)


def test_greedy_wina_meets_the_budget(model) -> None:
    edit = fit_wina(model, LONG, sparsity=0.4, allocate="greedy", **READ)
    values = {m.name: m.value for m in sparsity_price(model, LONG, edit)}
    assert values["weights-touched"] == pytest.approx(0.6, abs=0.04)


def test_generated_phase_leaves_the_prompt_alone(model, calibration) -> None:
    edit = fit_wina(model, calibration, sparsity=0.6, phase="generated")
    before = model.logits(TEXTS[0])
    with model.edit(edit):
        assert torch.equal(model.logits(TEXTS[0]), before)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, math.nan])
def test_sparsity_outside_its_range(model, calibration, sparsity: float) -> None:
    for fit in (fit_wina, fit_magnitude, fit_r_sparse):
        with pytest.raises(InputError, match="sparsity is the share"):
            fit(model, calibration, sparsity=sparsity)


def test_bad_input(model, calibration) -> None:
    with pytest.raises(InputError, match="skips nothing"):
        fit_wina(model, calibration, sparsity=0.0)
    with pytest.raises(InputError, match="norms is 'some'"):
        fit_wina(model, calibration, norms="some")
    with pytest.raises(InputError, match="give text"):
        fit_wina(model, calibration, allocate="greedy")
    with pytest.raises(InputError, match="goes with norms='released'"):
        fit_wina(model, calibration, orthogonal=True)
    with pytest.raises(FingerprintError):
        fit_wina(tiny("qwen3"), calibration)
    layers = linear_layers(model)
    partial = replace(calibration, sites={k: v for k, v in calibration.sites.items() if "o_proj" not in k})
    with pytest.raises(InputError, match="has no rows of"):
        fit_wina(model, partial)
    with pytest.raises(InputError, match="select is 'best'"):
        skip_inputs(model, calibration, uniform(layers, 0.5), factors(model, layers, "wina"), select="best")
    with pytest.raises(InputError):
        fit_wina(model, [])
    broken = tiny()
    with torch.no_grad():
        linear_layers(broken)[3].module(broken).weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        fit_wina(broken, LONG, **READ)
