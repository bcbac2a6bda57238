"""Observables, feature vectors and coupling against autograd and brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from actlas.circuits.coupling import coupling, coupling_agreement, coupling_bounds, measured_coupling
from actlas.circuits.nodes import Node, head, mlp
from actlas.circuits.observable import Observable
from actlas.circuits.propagate import (
    FeatureVector,
    norm_gradient,
    norm_scales,
    propagate,
    rank_paths,
    through,
)
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.layout import find
from tests.circuits.pairs import model_of, pairs_of
from tests.core.families import VOCAB

OBSERVABLE = Observable({5: 1, 7: -2, 9: 0.5})
FAMILIES = ("llama", "gpt2", "gpt-neox")


def _family(name: str) -> Any:
    try:
        return model_of(name, torch.float64)
    except KeyError:
        pytest.skip(f"no small model called {name}")


def _states(model: Any, sites: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (1, 6), generator=generator)
    trace = model.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, sites)
    return {s: trace[s][0, -1] for s in sites}


def _head_output(model: Any, block: int, number: int, x: Tensor) -> Tensor:
    """What a head writes that attends to one token alone, whose state is `x`: the model's own modules."""
    sites = {s.name.split(".", 2)[2]: s for s in model.resolve(f"blocks.{block}.*") if s.absent is None}
    normed = find(model.module, sites["attn_norm"].module)(x)
    value_site = sites["attn.v"]
    projected = find(model.module, value_site.module)(normed[None, None])
    v = value_site.read(projected)[0, 0]
    heads = model.n_heads
    z = torch.zeros(1, 1, heads, v.shape[-1], dtype=x.dtype)
    each = v.repeat_interleave(heads // v.shape[0], 0)
    z = z + torch.nn.functional.one_hot(torch.tensor(number), heads).to(x)[:, None] * each
    projection = find(model.block(block), model.tower.out_proj)
    return (projection(z.flatten(2)) - projection(torch.zeros_like(z.flatten(2))))[0, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_gradient_of_a_path_equals_autograd_through_the_models_modules(family: str) -> None:
    model = _family(family)
    last = f"blocks.{model.n_blocks - 1}.resid_post"
    at = _states(model, ["blocks.0.resid_pre", "blocks.2.resid_pre", last])
    found = propagate(model, OBSERVABLE, [head(0, 1), head(2, 3)], at=at)

    x = at["blocks.0.resid_pre"].clone().requires_grad_()
    with torch.enable_grad():
        first = _head_output(model, 0, 1, x)
        inner = at["blocks.2.resid_pre"] + first - first.detach()
        second = _head_output(model, 2, 3, inner)
        final = at[last] + second - second.detach()
        logits = model.unembed_module(model.final_norm_module(final))
        (expected,) = torch.autograd.grad(logits[5] - 2 * logits[7] + 0.5 * logits[9], x)
    assert found.site == "blocks.0.resid_pre"
    torch.testing.assert_close(found.vector.double(), expected, rtol=1e-4, atol=1e-7 * float(expected.norm()))


def test_path_through_an_mlp_equals_autograd() -> None:
    model = model_of("llama", torch.float64)
    at = _states(model, ["blocks.1.resid_mid", "blocks.2.resid_post"])
    found = propagate(model, OBSERVABLE, [mlp(1)], at=at)
    x = at["blocks.1.resid_mid"].clone().requires_grad_()
    block = model.block(1)
    with torch.enable_grad():
        out = block.mlp(block.post_attention_layernorm(x))
        final = at["blocks.2.resid_post"] + out - out.detach()
        logits = model.unembed_module(model.final_norm_module(final))
        (expected,) = torch.autograd.grad(logits[5] - 2 * logits[7] + 0.5 * logits[9], x)
    torch.testing.assert_close(found.vector.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_data_free_vector_is_the_gradient_without_scale_and_projection(family: str) -> None:
    model = _family(family)
    norm = model.final_norm_module
    y = OBSERVABLE.readout(model)
    x = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free, exact = through(y, norm), norm_gradient(y, norm, x)
    centred = x - x.mean() if family == "gpt2" else x
    sigma = centred.square().mean().sqrt()
    projected = free - centred * (free @ centred) / centred.square().sum()
    torch.testing.assert_close(exact * sigma, projected, rtol=1e-3, atol=1e-3 * float(free.norm()))


def test_ranked_paths_agree_with_propagate_and_come_longest_first() -> None:
    model = model_of("llama", torch.float64)
    ranked = rank_paths(model, OBSERVABLE, depth=2, top=60)
    assert [p.weight for p in ranked] == sorted((p.weight for p in ranked), reverse=True)
    assert {len(p.path) for p in ranked} == {1, 2}
    for found in (ranked[0], next(p for p in ranked if len(p.path) == 2)):
        alone = propagate(model, OBSERVABLE, found.path).vector.double()
        torch.testing.assert_close(found.feature, alone, rtol=1e-5, atol=1e-9)
        assert found.weight == pytest.approx(float(alone.norm()), rel=1e-5)


def test_norm_scales_are_inverse_root_mean_squares() -> None:
    model = model_of("llama")
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    x = model.trace(encoded, "blocks.1.resid_mid")["blocks.1.resid_mid"].double()
    expected = float(x.square().mean(-1).rsqrt().mean())
    assert norm_scales(model, encoded)["blocks.1.resid_mid"] == pytest.approx(expected, rel=1e-6)


def test_adding_a_feature_vector_moves_the_observable_up() -> None:
    model = model_of("llama")
    ids = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(0))
    feature = propagate(model, OBSERVABLE)
    before = OBSERVABLE.value(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    edits = {sign: feature.steer(sign, unit="raw") for sign in (1.0, -1.0)}
    moved = {}
    for sign, edit in edits.items():
        with model.edit(edit):
            moved[sign] = OBSERVABLE.value(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert bool((moved[1.0] > before).all()) and bool((moved[-1.0] < before).all())


def test_feature_vector_scores_raw_and_survives_saving(tmp_path: Any) -> None:
    model = model_of("llama")
    feature = propagate(model, OBSERVABLE, [head(1, 0)])
    x = torch.randn(5, 32)
    torch.testing.assert_close(feature.score(x), x @ feature.vector)
    back = FeatureVector.load(feature.save(tmp_path / "f"), model)
    assert back.path == ("L1H0",) and back.observable == OBSERVABLE.name
    torch.testing.assert_close(back.vector, feature.vector)


def test_value_of_an_observable_is_read_from_the_last_token() -> None:
    model = model_of("llama")
    ids = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
    logits = model.logits({"input_ids": ids})[:, -1].double()
    expected = logits[:, 5] - 2 * logits[:, 7] + 0.5 * logits[:, 9]
    torch.testing.assert_close(OBSERVABLE.value(model, {"input_ids": ids}), expected, rtol=1e-5, atol=1e-5)


def test_observable_of_pairs_weighs_answers_against_wrong_ones() -> None:
    model = model_of()
    pairs = pairs_of(model)
    found = Observable.of_pairs(pairs)
    for token, coefficient in found.tokens.items():
        up = int((pairs.answer_ids == token).sum()) - int((pairs.wrong_ids == token).sum())
        assert coefficient == pytest.approx(up / 4)


def test_bad_observables_and_paths_are_refused() -> None:
    model = model_of("llama")
    for tokens, said in (({}, "needs tokens"), ({5: 0.0}, "not 0"), ({5: math.inf}, "not 0")):
        with pytest.raises(InputError, match=said):
            Observable(tokens)
    with pytest.raises(InputError, match="vocabulary of"):
        Observable({VOCAB: 1}).readout(model)
    with pytest.raises(ModelError, match="no tokenizer"):
        Observable({" she": 1}).readout(model)
    with pytest.raises(InputError, match="order"):
        propagate(model, OBSERVABLE, [head(2, 0), head(1, 0)])
    with pytest.raises(InputError, match="order"):
        propagate(model, OBSERVABLE, [head(1, 0), head(1, 2)])
    with pytest.raises(InputError, match="give it in `at`"):
        propagate(model, OBSERVABLE, [mlp(1)])
    with pytest.raises(InputError, match="neither a head nor an MLP"):
        propagate(model, OBSERVABLE, [Node("blocks.1.resid_pre")])
    with pytest.raises(InputError, match="leave it out"):
        propagate(model, OBSERVABLE, [head(1, 0)], at={"blocks.0.resid_pre": torch.zeros(32)})
    with pytest.raises(ShapeError, match="must be"):
        propagate(model, OBSERVABLE, [head(1, 0)], at={"blocks.1.resid_pre": torch.zeros(3)})
    with pytest.raises(InputError, match="1 or 2"):
        rank_paths(model, OBSERVABLE, depth=3)


def test_coupling_is_the_mean_over_a_sphere_and_bounds_hold_and_are_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(200_000, 8, generator=generator, dtype=torch.float64)
    x = 3 * x / x.norm(dim=1, keepdim=True)
    s1, s2 = x @ a, x @ b
    near, band = (s1 - 2.0).abs() < 0.05, (s1 - 2.0).abs() < 0.5
    low, high = coupling_bounds(a, b, 2.0, 3.0)
    foretold = coupling(a, b) * float(s1[band].mean())
    assert float(s2[band].mean()) == pytest.approx(foretold, abs=0.1)
    assert low - 0.2 < float(s2[near].min()) and float(s2[near].max()) < high + 0.2
    across = b - a * (a @ b) / (a @ a)
    extreme = 2.0 * a / (a @ a) + across / across.norm() * math.sqrt(9 - 4 / float(a @ a))
    assert float(extreme @ b) == pytest.approx(high) and float(extreme.norm()) == pytest.approx(3.0)
    found = measured_coupling(a, b, x[:4000])
    assert found.inside == 1.0 and found.slope == pytest.approx(found.predicted, abs=0.1)
    assert coupling(a, b) != pytest.approx(coupling(b, a))


def test_agreement_counts_a_wrong_factor_as_a_miss() -> None:
    generator = torch.Generator().manual_seed(1)
    found, wrong = [], []
    for _ in range(8):
        a, b = torch.randn(2, 16, generator=generator, dtype=torch.float64)
        x = torch.randn(3000, 16, generator=generator, dtype=torch.float64)
        found.append(measured_coupling(a, b, x))
        stretched = x * torch.linspace(0.1, 4, 16, dtype=torch.float64)
        wrong.append(measured_coupling(a, b, stretched))
    good, bad = coupling_agreement(found), coupling_agreement(wrong)
    assert good.value > 0.95 and good.low is not None and good.low > 0.5
    assert bad.value < good.value - 0.1


def test_bad_couplings_are_refused() -> None:
    a = torch.ones(4)
    with pytest.raises(InputError, match="zero"):
        coupling(torch.zeros(4), a)
    with pytest.raises(ShapeError):
        coupling(a, torch.ones(5))
    with pytest.raises(InputError, match="at most"):
        coupling_bounds(a, a, 100.0, 1.0)
    with pytest.raises(InputError, match="too few"):
        measured_coupling(a, a, torch.ones(2, 4))
    with pytest.raises(InputError, match="all the same"):
        measured_coupling(a, a, torch.ones(5, 4))
    with pytest.raises(InputError, match="too few"):
        coupling_agreement([])
    model = model_of("llama")
    with pytest.raises(InputError, match="different sites"):
        coupling(*(propagate(model, OBSERVABLE, [head(b, 0)]) for b in (1, 2)))
